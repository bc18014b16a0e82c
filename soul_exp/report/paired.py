"""Methods compared unit by unit with one of them: exact sign-flip tests, with Holm's correction."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from soul_exp.report.statistics import ANY, Range, mean_of
from soul_exp.report.table import Cell, half_width

LEAST = 5  # units that an interval takes
MOST = 16  # units up to which all sign patterns are tried; with more, DRAWS of them
DRAWS = 100_000


def compared(
    values: Mapping[str, Sequence[Mapping[str, float | None]]], baseline: str, within: Range = ANY
) -> dict[str, Cell | None]:
    """Method -> its mean difference from `baseline`, with p; None: not comparable. The cell's n counts units.

    `values` are method -> seed -> unit -> value. Units are averaged over seeds first. A method without the baseline's
    units, or with a null among them, has no test. The half-width of the interval is the root of the sum of three
    squares, each of Student's t: of the units' differences, and of each method's means over units, where it has several
    seeds. It is cut to where the difference of two values `within` the metric's range lies.
    """
    means = {name: _over_seeds(seeds) for name, seeds in values.items()}
    base = means.get(baseline)
    gaps = {
        name: np.array([each[unit] - base[unit] for unit in base])
        for name, each in means.items()
        if name != baseline and base and each and each.keys() == base.keys()
    }
    p = holm({name: sign_flip(gap) for name, gap in gaps.items()})
    halves = {name: _over_runs([[*each.values()] for each in seeds]) for name, seeds in values.items() if means[name]}
    found: dict[str, Cell | None] = dict.fromkeys(name for name in values if name != baseline)
    for name, gap in gaps.items():
        mean, low, high = float(gap.mean()), None, None
        if len(gap) >= LEAST:
            half = math.hypot(half_width(mean_of(gap.tolist())), halves[name], halves[baseline])
            low, high = within.of_differences.cut(mean - half, mean, mean + half)
        found[name] = Cell(None, mean, low, high, n=len(gap), p=p[name])
    return found


def _over_runs(values: Sequence[Sequence[Any]]) -> float:
    """The half-width of the t interval of the mean of `values` [S][N] over seeds; 0 of one seed."""
    return half_width(mean_of([float(np.mean(each)) for each in values]))


def _over_seeds(seeds: Sequence[Mapping[str, float | None]]) -> dict[str, float] | None:
    units = {tuple(each) for each in seeds}
    if len(units) != 1 or any(value is None for each in seeds for value in each.values()):
        return None
    return {unit: float(np.mean([each[unit] for each in seeds])) for unit in seeds[0]}


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p-value that the mean of `differences` [N] is 0, if each had either sign with the same probability.

    Exact up to MOST units: the share of all 2^N sign patterns whose mean is at least as far from 0. Beyond, of DRAWS
    random ones and the observed one. Source: Fisher 1935.
    """
    observed = abs(differences.mean())
    means = np.abs(_signs(len(differences)) @ differences) / len(differences)
    return float(np.mean(means >= observed - 1e-12 * (1 + observed)))


@functools.lru_cache(maxsize=4)  # of a table's columns few have other units; each takes 100 kB for a unit at most
def _signs(number: int) -> np.ndarray:
    """Patterns [P, number] of 1 and -1: all up to MOST units, else DRAWS, the first of which is the observed."""
    if number <= MOST:
        return np.array([*itertools.product((1, -1), repeat=number)], dtype=np.int8)
    signs = np.random.default_rng(0).choice(np.array((1, -1), dtype=np.int8), (DRAWS, number))
    signs[0] = 1
    return signs


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """The p-values corrected for their number, in the order of `p`; never below those given. Source: Holm 1979."""
    ordered = sorted(p, key=lambda name: p[name])
    found: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        found[name] = largest
    return {name: found[name] for name in p}
