"""Signum: sign descent with momentum."""

from __future__ import annotations

from typing import Any

from .elementwise import Elementwise
from .kernels import Numbers


class Signum(Elementwise):
    """Moves every weight by exactly `lr` against the sign of its momentum, by 0 where that is 0 (decay aside).

    `m <- beta m + (1 - beta) g;  w <- w (1 - lr weight_decay) - lr sign(m)`. Source: Bernstein et al. 2018.
    """

    rule = "signum"
    states = ("exp_avg",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        *,
        rounding: str = "nearest",
        state_dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        if not (lr > 0 and weight_decay >= 0):
            raise ValueError(f"lr={lr}, weight_decay={weight_decay}: expected positive numbers")
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta}: expected a number from 0 to below 1")
        defaults = {"lr": lr, "beta": beta, "weight_decay": weight_decay}
        super().__init__(params, defaults, rounding=rounding, state_dtype=state_dtype, seed=seed)

    def numbers(self, group: dict[str, Any], step: int) -> Numbers:
        lr, beta = float(group["lr"]), group["beta"]
        return Numbers(lr, 1 - lr * group["weight_decay"], beta, 1 - beta, 0.0, 1.0, 1.0, 0.0)
