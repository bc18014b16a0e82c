"""AdamW, Lion and Signum: elementwise steps from momentum, at this package's precisions and with its statistics."""

import math
from typing import Any

from .elementwise import Elementwise
from .kernels import Numbers


class AdamW(Elementwise):
    """Equals `torch.optim.AdamW` to rounding: bias-corrected moments, decoupled weight decay.

    `m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  w <- w (1 - lr weight_decay)
    - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)`. Source: Loshchilov and Hutter 2019 (arXiv 1711.05101).

    v is in fp32 under bf16 weights: in bf16 a beta2 of 0.999 leaves it where it is, as 0.001 v is less than half of the
    distance to the next number, so v could not fall and steps would become too small.
    """

    rule = "adamw"
    states = ("exp_avg", "exp_avg_sq")
    precise = ("exp_avg_sq",)

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
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, rounding=rounding, state_dtype=state_dtype, seed=seed)

    def numbers(self, group: dict[str, Any], step: int) -> Numbers:
        plain = super().numbers(group, step)
        return plain._replace(lr=plain.lr / (1 - plain.beta1**step), scale=1 / math.sqrt(1 - plain.beta2**step))


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
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        super().__init__(params, defaults, rounding=rounding, state_dtype=state_dtype, seed=seed)


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
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta}: expected a number from 0 to below 1")
        defaults = {"lr": lr, "beta": beta, "weight_decay": weight_decay}
        super().__init__(params, defaults, rounding=rounding, state_dtype=state_dtype, seed=seed)

    def numbers(self, group: dict[str, Any], step: int) -> Numbers:
        lr, beta = float(group["lr"]), group["beta"]
        return Numbers(lr, 1 - lr * group["weight_decay"], beta, 1 - beta, 0.0, 1.0, 1.0, 0.0)
