"""Influence unlearning: one step along the gradient, preconditioned by an inverse curvature.

    w <- w - lr ratio (H + damping I)^-1 g

g is the gradient in `.grad`. With g that of minus the mean NLL of the forget set, and ratio = N_f / N_r, this is
`w + alpha (N_f / N_r) (H + lambda I)^-1 grad L_f`: `lr` is alpha, `damping` lambda. H is made of the
gradients g_i of N single sequences (of their mean NLL per token), as one of

    diagonal     H = diag( (1/N) sum_i g_i^2 )
    woodfisher   H = (1/N) sum_i g_i g_i'

The second inverse is exact for the one vector that it is applied to, by Woodbury, G [N, D] the rows g_i:

    (H + lambda I)^-1 g = g / lambda - G' (lambda N I + G G')^-1 G g / lambda

Source: Koh & Liang 2017 (influence functions); Singh & Alistarh 2020 (WoodFisher, whose recursion ends at the same
matrix); as an unlearner: Izzo et al. 2021 and Jia et al. 2023.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

CHOICES = {"inverse": ("diagonal", "woodfisher"), "estimator": ("fisher", "gnb"), "hessian": ("retain", "all")}
BLOCK = 2**16  # columns of G that are held in float64 at once: 50 MiB for 100 samples


def woodfisher_bytes(num_weights: int, num_samples: int, itemsize: int = 4) -> int:
    """Memory of the samples that the woodfisher inverse keeps: G [num_samples, num_weights] in float32."""
    return num_weights * num_samples * itemsize


class Influence(Optimizer):
    """Moves the weights once, by exactly `-lr ratio (H + damping I)^-1 g`, H from `num_samples` calls of `add_sample`.

    `estimator` and `hessian` are for the caller, who computes the samples: "fisher" means the true labels, "gnb" labels
    sampled from the model; "retain" means sequences of the retain set, "all" those of both. The caller sets `ratio`
    before the step. Samples are kept in float32 (float64 for float64 weights), woodfisher's matrix is solved
    in float64; they are no part of a state_dict. A group's `weight_decay` is ignored: the formula has none. Weights
    without a gradient at the step are left out, of H too. Raises ValueError if the samples would exceed `memory_gib`.
    """

    elementwise = False

    def __init__(
        self,
        params: Any,
        lr: float,
        damping: float,
        num_samples: int,
        inverse: str = "diagonal",
        estimator: str = "fisher",
        hessian: str = "retain",
        memory_gib: float = 8.0,
        ratio: float | None = None,
    ) -> None:
        for (name, known), value in zip(CHOICES.items(), (inverse, estimator, hessian), strict=True):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(known)}")
        if not (lr > 0 and damping > 0 and memory_gib > 0 and (ratio is None or ratio > 0)):
            found = f"lr={lr}, damping={damping}, memory_gib={memory_gib}, ratio={ratio}"
            raise ValueError(f"{found}: expected positive numbers")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} is not a number of sequences: expected 1 or more")
        super().__init__(params, {"lr": lr, "taken": False})
        self.damping, self.num_samples, self.inverse = damping, num_samples, inverse
        self.estimator, self.hessian, self.ratio = estimator, hessian, ratio
        self.num_added = 0
        self._samples: dict[Tensor, Tensor] = {}  # sum of squares [...], or rows [N, numel], of each tensor
        needed = sum(woodfisher_bytes(p.numel(), num_samples, _wide(p).itemsize) for p in self._params()) / 2**30
        if inverse == "woodfisher" and needed > memory_gib:
            raise ValueError(
                f"inverse=woodfisher needs {needed:.3g} GiB for {num_samples} samples of "
                f"{sum(p.numel() for p in self._params())} weights, more than memory_gib={memory_gib:g}: lower "
                f"num_samples, raise memory_gib, or choose inverse=diagonal"
            )

    @torch.no_grad()
    def add_sample(self) -> None:
        """Add the gradient in `.grad`, of one sequence, to H, and clear it."""
        if self.num_added == self.num_samples:
            raise RuntimeError(f"add_sample() was called more than num_samples={self.num_samples} times")
        for p in self._params():
            if p.grad is None:
                continue
            gradient = _finite_gradient(p)
            if self.inverse == "diagonal":
                total = self._samples.setdefault(p, torch.zeros_like(gradient))
                total.addcmul_(gradient, gradient, value=1 / self.num_samples)
            else:
                if p not in self._samples:
                    self._samples[p] = gradient.new_zeros(self.num_samples, p.numel())
                self._samples[p][self.num_added] = gradient.flatten()
        self.num_added += 1
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.enable_grad():
            value = closure() if closure is not None else None
        if self.param_groups[0]["taken"]:
            raise RuntimeError("influence unlearning takes one step, and it was taken: expected no second step()")
        if self.num_added < self.num_samples:
            found = f"step() found {self.num_added} of num_samples={self.num_samples} samples"
            raise RuntimeError(f"{found}: call add_sample() before it")
        gradients = {p: _finite_gradient(p) for p in self._params() if p.grad is not None}
        if not gradients:
            raise RuntimeError("step() found no gradient: call backward() on the forget loss before it")
        directions = self._diagonal(gradients) if self.inverse == "diagonal" else self._woodfisher(gradients)
        for group in self.param_groups:
            for p in group["params"]:
                if p in directions:
                    p.add_(directions[p], alpha=-group["lr"] * (1.0 if self.ratio is None else self.ratio))
            group["taken"] = True
        self._samples = {}
        return value

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _diagonal(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        for p, gradient in gradients.items():
            self.state[p]["hessian"] = self._samples.get(p, torch.zeros_like(gradient))
        return {p: gradient / (self.state[p]["hessian"] + self.damping) for p, gradient in gradients.items()}

    def _woodfisher(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        blocks = [
            (rows, gradient)
            for p, full in gradients.items()
            if p in self._samples  # else H is zero there
            for rows, gradient in zip(self._samples[p].split(BLOCK, dim=1), full.flatten().split(BLOCK), strict=True)
        ]
        device = next(iter(gradients.values())).device
        gram = self.damping * self.num_samples * torch.eye(self.num_samples, dtype=torch.float64, device=device)
        inner = torch.zeros(self.num_samples, dtype=torch.float64, device=device)  # G g
        for rows, gradient in blocks:
            wide = rows.double()
            gram += wide @ wide.T
            inner += wide @ gradient.double()
        weight = torch.cholesky_solve(inner[:, None], torch.linalg.cholesky(gram))[:, 0]
        for rows, gradient in blocks:  # a view of its tensor's gradient, which becomes the direction
            gradient.copy_(gradient.double() - rows.double().T @ weight)
        return {p: gradient.div_(self.damping) for p, gradient in gradients.items()}


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _finite_gradient(p: Tensor) -> Tensor:
    """A copy of the gradient of `p` in float32 or better; raises FloatingPointError if it is not finite."""
    assert p.grad is not None
    if not torch.isfinite(p.grad).all():
        raise FloatingPointError("a gradient is not finite: influence unlearning needs a model with a finite loss")
    return p.grad.to(_wide(p), copy=True, memory_format=torch.contiguous_format)
