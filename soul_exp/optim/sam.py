"""SAM: sharpness-aware minimisation around any optimizer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class SAM(Optimizer):
    """`base` steps from w along the gradient at `w + radius g / ||g||`, g the gradient at w and the norm a global one.

    The caller leaves g, of the whole batch and all ranks, in `.grad` and calls `ascend`; then computes the gradient
    there, clips it, and calls `step`. `base` builds an optimizer on given params with `lr=lr`; its groups and states
    are this one's. Memory: a copy of the weights in between. Weights of 16 bits ascend only where `radius g / ||g||`
    exceeds half of their rounding: prefer fp32 ones. Source: Foret et al. 2021 (arXiv 2010.01412), algorithm 1, p = 2.
    """

    elementwise = False

    def __init__(self, params: Any, lr: float, base: Callable[..., Optimizer], radius: float = 0.05) -> None:
        if not (lr > 0 and radius > 0):
            raise ValueError(f"lr={lr}, radius={radius}: expected positive numbers")
        if "lr" in getattr(base, "keywords", {}):
            raise ValueError("base states an lr of its own: leave it out, the rate is that of SAM")
        super().__init__(params, {"lr": lr})
        self.base = base(self.param_groups, lr=lr)
        if any(hasattr(self.base, name) for name in ("ascend", "estimate", "add_sample")):
            raise ValueError(f"base is {type(self.base).__name__}: expected one that needs a gradient only, as AdamW")
        self.radius = radius
        self._start: dict[Tensor, Tensor] = {}  # the weights before `ascend`
        self._adopt()

    @torch.no_grad()
    def ascend(self) -> None:
        """Move the weights by exactly `radius` along the gradient in `.grad`, and clear it; a zero gradient: stay.

        Raises FloatingPointError, weights untouched, if the gradient is not finite.
        """
        if self._start:
            raise RuntimeError("ascend() was called twice: step() comes in between")
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            raise RuntimeError("ascend() found no gradient: call backward() on the whole batch before it")
        wide = [torch.promote_types(p.dtype, torch.float32) for p in params]
        norms = [torch.linalg.vector_norm(p.grad, dtype=dtype) for p, dtype in zip(params, wide, strict=True)]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}: expected a finite one, lower optimizer.lr")
        for p in params:
            self._start[p] = p.clone()
            p.add_(p.grad, alpha=self.radius / norm if norm else 0.0)
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if not self._start:
            raise RuntimeError("step() came without an ascent: call ascend() before each step()")
        with torch.enable_grad():
            value = closure() if closure is not None else None
        for p, start in self._start.items():
            p.copy_(start)
        self._start = {}
        self.base.step()
        return value

    def state_dict(self) -> dict[str, Any]:
        """That of the base optimizer, and as one more key the weights before an ascent, by number."""
        params = [p for group in self.param_groups for p in group["params"]]
        start = {number: self._start[p] for number, p in enumerate(params) if p in self._start}
        return {**self.base.state_dict(), "start": start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self._adopt()
        params = [p for group in self.param_groups for p in group["params"]]
        self._start = {params[number]: start.to(params[number]) for number, start in state_dict["start"].items()}

    def _adopt(self) -> None:
        """Share the groups, which a schedule changes, and the state with `base`."""
        self.param_groups, self.state = self.base.param_groups, self.base.state
