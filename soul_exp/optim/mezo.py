"""MeZO: descent along random directions, whose slopes two forward passes measure; no gradient is computed.

For each sample i of a step, z_i ~ N(0, I), generated from its key whenever it is needed and never stored:

    s_i = (loss(w + epsilon z_i) - loss(w - epsilon z_i)) / (2 epsilon)
    w <- w (1 - lr weight_decay) - lr mean_i(s_i z_i)

Source: Malladi et al. 2023 (arXiv 2305.17333), algorithm 1; the estimate is that of SPSA (Spall 1992).
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class MeZO(Optimizer):
    """The expected step is gradient descent's: `mean_i(s_i z_i)` is the gradient, up to epsilon^2 and noise.

    Its squared noise is (number of weights + 1) / num_samples times the gradient's squared norm, so that `lr` has to be
    orders of magnitude below a first-order method's. The caller calls `estimate`, then `step`; `.grad` is never read.
    """

    zeroth = True  # whether the next step needs `estimate` in place of a gradient
    elementwise = False

    def __init__(
        self,
        params: Any,
        lr: float,
        epsilon: float = 1e-3,
        num_samples: int = 1,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not (lr > 0 and epsilon > 0 and weight_decay >= 0):
            found = f"lr={lr}, epsilon={epsilon}, weight_decay={weight_decay}"
            raise ValueError(f"{found}: expected positive numbers (weight_decay: or 0)")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} is not a number of directions: expected 1 or more")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "step": 0})
        self.epsilon, self.num_samples, self.seed = epsilon, num_samples, seed
        self._slopes: list[float] = []  # s_i, from `estimate` to `step`

    def num_losses(self, step: int) -> int:
        """Losses that `estimate` asks for before step number `step`."""
        return 2 * self.num_samples

    @torch.no_grad()
    def estimate(self, loss: Callable[[], Tensor | float]) -> float:
        """Measure the slopes of the next step; returns the mean of the losses, and the weights are as before.

        `loss` reads the weights as they are and must be the same function at every call: the same rows, no dropout.
        16-bit weights are restored exactly, from a copy that lives as long as the call: their rounding, about 1e-4 at a
        weight of 0.02, exceeds the steps themselves. Others are restored within a few of their own roundings, without
        any memory. Raises FloatingPointError, weights restored, if a loss is not finite.
        """
        self._slopes = []
        kept = {p: p.clone() for p in self._params() if p.dtype.itemsize == 2}
        slopes, losses = [], []
        for sample in range(self.num_samples):
            offset = 0.0  # where the weights are, in units of z
            try:
                for target in (self.epsilon, -self.epsilon):
                    self._move(sample, target - offset)
                    offset = target
                    losses.append(float(loss()))
            finally:
                self._move(sample, -offset)
                for p, before in kept.items():
                    p.copy_(before)
            if not all(math.isfinite(value) for value in losses[-2:]):
                raise FloatingPointError(
                    f"the loss is {losses[-2]} and {losses[-1]} at a distance of epsilon={self.epsilon} from the "
                    f"weights: expected finite numbers, lower optimizer.lr or optimizer.epsilon"
                )
            slopes.append((losses[-2] - losses[-1]) / (2 * self.epsilon))
        self._slopes = slopes
        return math.fsum(losses) / len(losses)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.enable_grad():
            value = closure() if closure is not None else None
        if not self._slopes:
            raise RuntimeError("step() has no slopes: call estimate(loss) before each step()")
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                update = sum(slope * self._direction(p, number, i) for i, slope in enumerate(self._slopes))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] / len(self._slopes))
                number += 1
            group["step"] += 1
        self._slopes = []
        return value

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _move(self, sample: int, scale: float) -> None:
        for number, p in enumerate(self._params()):
            p.add_(self._direction(p, number, sample), alpha=scale)

    def _direction(self, p: Tensor, number: int, sample: int) -> Tensor:
        """z of tensor `number`: a function of seed, step, sample and tensor only; float32 for 16-bit weights."""
        key = repr((self.seed, self.param_groups[0]["step"], sample, number)).encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        generator = torch.Generator(p.device).manual_seed(seed)
        dtype = torch.promote_types(p.dtype, torch.float32)
        return torch.randn(p.shape, generator=generator, device=p.device, dtype=dtype)
