"""Sophia: momentum divided by a running diagonal curvature, each coordinate clipped to one learning rate.

Elementwise, in this order (m = h = 0 at the start, no bias correction):

    h <- beta2 h + (1 - beta2) c        when there is a curvature estimate c
    m <- beta1 m + (1 - beta1) g
    w <- w (1 - lr weight_decay)
    w <- w - lr clip(m / max(rho B h, eps), -1, 1)

Source: Liu et al. 2023 (arXiv 2305.14342); as an unlearner: Jia et al. 2024 (SOUL).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .elementwise import Elementwise


class Sophia(Elementwise):
    """Clipped second-order steps; sign descent where the curvature is small, negative or not yet known.

    `estimator` is the source of c, every `interval` steps. "gnb" (Gauss-Newton-Bartlett) and "hutchinson", 10 steps
    unless stated: the caller hands over a gradient within `refreshing()`, for gnb the one whose square is c, for
    hutchinson c itself, of either sign; B is 1. "gradient", 1 step: c is the bare square of the training gradient, so
    that B is `num_labels`, the number of labels behind it (the SOUL release fixes 5120). `curvature_on` ("retain",
    "forget" or "both"; None for "gradient") and `curvature_rows` (None: all) tell the caller whose NLL c is of, and on
    how many rows.
    """

    rule = "sophia"
    states = ("exp_avg", "hessian")
    clips = True
    estimators = ("gnb", "hutchinson", "gradient")
    parts = ("retain", "forget", "both")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: float = 1.0,
        weight_decay: float = 0.0,
        eps: float = 1e-12,
        estimator: str = "gnb",
        interval: int | None = None,
        num_labels: int = 1,
        curvature_on: str | None = None,
        curvature_rows: int | None = None,
        *,
        rounding: str = "nearest",
        state_dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        if estimator not in self.estimators:
            raise ValueError(f"estimator={estimator!r} is unknown: choose one of {', '.join(self.estimators)}")
        if interval is not None and interval < 1:
            raise ValueError(f"interval={interval} is not a number of steps: expected 1 or more")
        if estimator != "gradient" and num_labels != 1:
            raise ValueError(f"num_labels={num_labels}: {estimator} carries its own scale, leave num_labels at 1")
        if estimator == "gradient" and not (curvature_on is None and curvature_rows is None):
            found = f"curvature_on={curvature_on!r}, curvature_rows={curvature_rows}"
            raise ValueError(f"{found}: the gradient estimate has no pass of its own, leave them out")
        if curvature_on not in (None, *self.parts):
            raise ValueError(f"curvature_on={curvature_on!r} is unknown: choose one of {', '.join(self.parts)}")
        if curvature_rows is not None and curvature_rows < 1:
            raise ValueError(f"curvature_rows={curvature_rows} is not a number of rows: expected 1 or more")
        if not rho > 0:
            raise ValueError(f"rho={rho}: expected a number above 0")
        self.estimator = estimator
        self.interval = interval or (1 if estimator == "gradient" else 10)
        self.curvature_on = None if estimator == "gradient" else curvature_on or "retain"
        self.curvature_rows = curvature_rows
        self._refreshing = False
        scale = rho * num_labels
        defaults = {"lr": lr, "betas": tuple(betas), "scale": scale, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, defaults, rounding=rounding, state_dtype=state_dtype, seed=seed)

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """In the block, `step` takes the gradients as those of a curvature pass: h changes, nothing else does.

        A mode and not a method, because DeepSpeed's ZeRO owns the gradients and calls `step` only.
        """
        self._refreshing = True
        try:
            yield
        finally:
            self._refreshing = False

    def rule_at(self, step: int) -> str:
        if self._refreshing:
            return "refresh" if self.estimator == "hutchinson" else "refresh_squared"
        return "sophia_refresh" if self.estimator == "gradient" and step % self.interval == 0 else "sophia"
