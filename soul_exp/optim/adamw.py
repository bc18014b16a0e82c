"""AdamW: torch's own update, with this package's precisions and statistics."""

from __future__ import annotations

import math
from typing import Any

from .elementwise import Elementwise
from .kernels import Numbers


class AdamW(Elementwise):
    """Equals `torch.optim.AdamW` to rounding: bias-corrected moments, decoupled weight decay.

    `m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  w <- w (1 - lr weight_decay)
    - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)`. Source: Loshchilov and Hutter 2019 (arXiv 1711.05101).
    """

    rule = "adamw"
    states = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rounding: str = "nearest",
        state_dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        if not (lr > 0 and eps > 0 and weight_decay >= 0):
            raise ValueError(f"lr={lr}, eps={eps}, weight_decay={weight_decay}: expected positive numbers")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}: expected two numbers from 0 to below 1")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, rounding=rounding, state_dtype=state_dtype, seed=seed)

    def numbers(self, group: dict[str, Any], step: int) -> Numbers:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        decay = 1 - lr * group["weight_decay"]
        corrected = lr / (1 - beta1**step)
        scale = 1 / math.sqrt(1 - beta2**step)
        return Numbers(corrected, decay, beta1, 1 - beta1, beta2, 1 - beta2, scale, group["eps"])
