"""When a training counts as diverged, and the reason in words: what is not finite, or has grown too far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from soul_exp.training.schedule import Schedule

LABELS = {"loss": "loss", "forget_loss": "forget loss", "retain_loss": "retain loss", "retain_nll": "retain NLL"}
RETAIN = ("retain_loss", "retain_nll")  # these may not exceed the schedule's limit


def divergence(
    logs: Mapping[str, float], num_nonfinite: int, history: Sequence[Mapping[str, Any]], schedule: Schedule, when: str
) -> str | None:
    """Why a training whose last numbers are `logs` has diverged; None if it has not.

    `num_nonfinite` counts gradient coordinates that are not finite, `history` is what was logged before.
    """
    lost = next((key for key in LABELS if not math.isfinite(logs.get(key, 0.0))), None)
    if lost:
        return f"the {LABELS[lost]} is {logs[lost]} {when}"
    if num_nonfinite:
        return f"{num_nonfinite} gradient coordinates are not finite {when}"
    exceeded = (_exceeds_limit(key, logs[key], history, schedule, when) for key in RETAIN if key in logs)
    return next(filter(None, exceeded), None)


def _exceeds_limit(
    key: str, value: float, history: Sequence[Mapping[str, Any]], schedule: Schedule, when: str
) -> str | None:
    """Why `value` is too far above the first logged one; None if it is not, or is the first."""
    limit, floor = schedule.diverged_at, schedule.diverged_floor
    logged = [entry[key] for entry in history if key in entry]
    if limit is None or not logged or value <= limit * max(logged[0], floor):
        return None
    return f"the {LABELS[key]} is {value:.3g} {when}, above {limit:g} x max({logged[0]:.3g} at the start, {floor:g})"
