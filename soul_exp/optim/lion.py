"""Lion: the sign of a mix of momentum and gradient."""

from __future__ import annotations

from typing import Any

from .elementwise import Elementwise
from .kernels import Numbers


class Lion(Elementwise):
    """Moves every weight by `lr` against the sign of a mix of old momentum and new gradient, by 0 where that is 0.

    `u = sign(beta1 m + (1 - beta1) g);  w <- w (1 - lr weight_decay) - lr u;  m <- beta2 m + (1 - beta2) g`.
    Source: Chen et al. 2023 (arXiv 2302.06675), algorithm 2.
    """

    rule = "lion"
    states = ("exp_avg",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        rounding: str = "nearest",
        state_dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        if not (lr > 0 and weight_decay >= 0):
            raise ValueError(f"lr={lr}, weight_decay={weight_decay}: expected positive numbers")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}: expected two numbers from 0 to below 1")
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        super().__init__(params, defaults, rounding=rounding, state_dtype=state_dtype, seed=seed)

    def numbers(self, group: dict[str, Any], step: int) -> Numbers:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        return Numbers(lr, 1 - lr * group["weight_decay"], beta1, 1 - beta1, beta2, 1 - beta2, 1.0, 0.0)
