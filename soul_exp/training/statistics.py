"""What a step does to the weights of this process, in eight sums over coordinates (STATISTICS), for every optimizer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from soul_exp.optim.kernels import STATISTICS

MOMENTUM = ("exp_avg", "momentum_buffer")  # names of the first moment in an optimizer's state
CURVATURE = ("hessian", "exp_avg_sq")  # and of its curvature or second moment
NORMS = {"m": "sum_m2", "h": "sum_h2", "update": "sum_dw2"}
SIGN_DESCENT = 0.05  # a win_rate below it: nearly every coordinate moves by the learning rate and no less


class ComparedSums:
    """The sums (StepSums) of an optimizer that has none: its weights are copied before a step and compared after it.

    Only while `counting` is on. Under ZeRO the sums are this rank's share: sum over ranks before `logged_statistics`.
    """

    clips, raise_nonfinite = False, False  # it does neither

    def __init__(self, optimizer: Optimizer) -> None:
        self.counting = False
        self._before: dict[Any, Tensor] = {}
        self._sums = torch.zeros(len(STATISTICS), dtype=torch.float64)
        optimizer.register_step_pre_hook(self._copy)
        optimizer.register_step_post_hook(self._compare)

    def take_statistics(self) -> Tensor:
        """[8] float64 sums since the last call."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        return sums

    @torch.no_grad()
    def _copy(self, optimizer: Any, *_: Any) -> None:
        if self.counting:
            self._before = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}

    @torch.no_grad()
    def _compare(self, optimizer: Any, *_: Any) -> None:
        for p, before in self._before.items():
            state = optimizer.state.get(p, {})
            m, h = (next((state[name] for name in names if name in state), None) for names in (MOMENTUM, CURVATURE))
            squares = {"sum_dw2": p.double() - before.double(), "sum_m2": m, "sum_h2": h}
            found: dict[str, Any] = {name: x.double().square().sum() for name, x in squares.items() if x is not None}
            found |= {"total": p.numel(), "changed": (p != before).sum()}
            self._sums += torch.tensor([float(found.get(name, 0)) for name in STATISTICS], dtype=torch.float64)
        self._before = {}


def logged_statistics(sums: Tensor, clips: bool) -> dict[str, float]:
    """The numbers that are logged of a step, from its sums over all ranks.

    `effective_update`: the share of weights that really changed, after rounding to their dtype. `update_norm`: of that
    change. `m_norm`, `h_norm`: of momentum and curvature or second moment, 0 where there is none. With `clips` also
    `win_rate`, the share of coordinates that were not clipped, and `untouched`, the share with m = h = 0.
    """
    found = dict(zip(STATISTICS, sums.tolist(), strict=True))
    total = max(found["total"], 1.0)
    shares = {"win_rate": found["won"] / total, "untouched": found["untouched"] / total} if clips else {}
    norms = {f"{name}_norm": math.sqrt(found[key]) for name, key in NORMS.items()}
    return {**shares, **norms, "effective_update": found["changed"] / total}


def sign_descent_note(win_rates: Sequence[float]) -> str | None:
    """A note if an optimizer degenerated to sign descent, from its win_rate at every logging step; else None.

    The mean over the later half of them decides: a curvature that starts at 0 clips everything at first.
    """
    later = win_rates[len(win_rates) // 2 :]
    if not later or sum(later) / len(later) >= SIGN_DESCENT:
        return None
    return (
        f"sign descent: in the later half of the steps only {sum(later) / len(later):.1%} of the coordinates were not "
        f"clipped (win_rate below {SIGN_DESCENT:g}), so the curvature hardly mattered; raise optimizer.rho"
    )
