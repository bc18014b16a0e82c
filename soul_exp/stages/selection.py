"""Which weights are best: the rule by which trials of `tune`, and checkpoints with save=best, are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from soul_exp.artifacts.scores import FORGET_QUALITY, RETAIN


@dataclass(frozen=True)
class Trial:
    """What one learning rate and one gamma came to on the validation part; a metric is None where it is not finite."""

    lr: float
    gamma: float
    metrics: Mapping[str, float | None]
    diverged: str | None  # why, or None
    num_steps: int
    seconds: float  # of unlearning


def order(metrics: Mapping[str, float | None], enough: float) -> tuple[bool, float]:
    """What the best is the largest of: those that keep `enough`, by forget quality; then the others, by what they keep.

    `metrics` are the validation metrics, `enough` a validation retain probability.
    """
    forgotten, kept = metrics.get(FORGET_QUALITY), metrics.get(RETAIN)
    if forgotten is None or kept is None:
        return False, float("-inf")
    return (True, forgotten) if kept >= enough else (False, kept)


def best_forgetting(trials: Sequence[Trial], start: Mapping[str, float], *, keep: float) -> Trial:
    """The largest validation log10 forget quality among trials that keep the target's validation retain probability.

    `keep` is the share of it (`start`, the target's metrics) that is enough. A trial that diverged does not count. Ties
    go to the smaller learning rate, then to the gamma named first. If none keeps enough: the one that keeps most; if
    all diverged: the smallest learning rate, so that the run reports it.
    """

    def value(trial: Trial) -> tuple[bool, float]:
        return order({} if trial.diverged is not None else trial.metrics, keep * start[RETAIN])

    return max(sorted(trials, key=lambda trial: trial.lr), key=value)
