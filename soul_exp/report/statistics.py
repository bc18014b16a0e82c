"""Statistics of several runs of a method: means with intervals, dominance, probability of improvement, profiles."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import mannwhitneyu
from scipy.stats import t as student

from soul_exp.metrics.general import IS_TEST
from soul_exp.metrics.scale import Scale
from soul_exp.report.table import TINY, Cell

Ends = Sequence[float]  # low, high
LEVEL = 0.95


@dataclass(frozen=True)
class Range:
    """Where values of a metric lie, and whether they are averaged as logarithms."""

    low: float = -math.inf
    high: float = math.inf
    is_p_value: bool = False

    @classmethod
    def of(cls, scale: Scale | None) -> "Range":
        """That of a metric's declaration; unbounded without one."""
        if scale is None:
            return cls()
        return cls(scale.low, scale.high, scale.no_interval == IS_TEST and (scale.low, scale.high) == (0, 1))

    @property
    def of_differences(self) -> "Range":
        """Where the difference of two values lies."""
        return Range(self.low - self.high, self.high - self.low)

    def cut(self, low: float, value: float, high: float) -> tuple[float, float]:
        """The ends of an interval around `value`, neither beyond the range unless `value` is, as a jackknife's may."""
        return min(max(low, self.low), value), max(min(high, self.high), value)


ANY = Range()


def mean_of(
    values: Sequence[float | None],
    ends: Sequence[Ends | None] = (),
    studies: Sequence[Hashable] = (),
    within: Range = ANY,
) -> Cell:
    """The mean of a metric over runs, with its 95 % interval; null values are left out.

    `ends` are the runs' own intervals over independent units, `studies` the tuning study each belongs to, if any. A
    single run keeps its own interval. Of more, the half-width is the root of the sum of two squares (Zou and Donner
    2008): of Student's t over the runs, or over the means of the studies where there are several; and, where every run
    has an interval, of the root mean square of the runs' half-widths, separately below and above: all answer the same
    questions, so that more runs do not make these more certain. Cut to the metric's range; p-values are averaged as
    logarithms, which gives their geometric mean. No interval where all runs have the same value and none of its own.
    """
    none = [None] * len(values)
    runs = zip(values, ends or none, studies or none, strict=True)
    given = [(value, own, study) for value, own, study in runs if value is not None]
    partial = len(given) < len(values)
    if not given:
        return Cell(is_partial=partial)
    if len(given) == 1:
        value, own, _ = given[0]
        low, high = own or (None, None)
        return Cell(None, value, low, high, n=1, is_partial=partial)
    numbers = [math.log10(max(value, TINY)) if within.is_p_value else value for value, *_ in given]
    by_study: dict[Hashable, list[float]] = {}
    for value, (_, _, study) in zip(numbers, given, strict=True):
        by_study.setdefault(study, []).append(value)
    repeats = numbers if len(by_study) == 1 else [statistics.fmean(each) for each in by_study.values()]
    mean = statistics.fmean(repeats)
    degrees = len(repeats) - 1
    over_runs = float(student.ppf((1 + LEVEL) / 2, degrees)) * statistics.stdev(repeats) / math.sqrt(len(repeats))
    of_units = [(value - own[0], own[1] - value) for value, own, _ in given if own is not None]
    if not over_runs and not of_units:  # ties, as of a statistic with few values, are no certainty
        return Cell(None, 10**mean if within.is_p_value else mean, n=len(given), is_partial=partial)
    if len(of_units) < len(given):
        of_units = [(0.0, 0.0)]
    below, above = (
        math.hypot(over_runs, *(half / math.sqrt(len(of_units)) for half in halves))
        for halves in zip(*of_units, strict=True)
    )
    low, high = mean - below, mean + above
    if within.is_p_value:
        mean, low, high = 10**mean, 10**low, 10 ** min(high, 0.0)
    low, high = within.cut(low, mean, high)
    return Cell(None, mean, low, high, n=len(given), is_partial=partial)


def dominated_by(losses: Mapping[str, Sequence[float]]) -> dict[str, list[str]]:
    """Method -> the methods that are at least as good in every objective and better in one (Pareto dominance).

    `losses` are those of each method, smaller is better. On the front nobody does.
    """

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)

    return {name: [rival for rival, of in losses.items() if dominates(of, own)] for name, own in losses.items()}


def probability_of_improvement(losses: Sequence[float], baseline: Sequence[float]) -> float:
    """P(a run is better than one of the baseline): the mean over all pairs of 1 if smaller, 1/2 if equal, else 0.

    Source: Agarwal et al. 2021 (rliable), of one task; it is Mann and Whitney's U, divided by the number of pairs.
    """
    return float(mannwhitneyu(baseline, losses).statistic) / (len(losses) * len(baseline))


def performance_profile(scores: Sequence[float], thresholds: Sequence[float]) -> list[float]:
    """The share of `scores` above each threshold: the tail of their distribution. Source: Agarwal et al. 2021."""
    return [float(np.mean(np.asarray(scores) > threshold)) for threshold in thresholds]
