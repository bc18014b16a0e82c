"""Intervals of metrics: what a number would be if other authors, passages or items had been drawn.

The independent units of a sample are resampled: 20 questions on one author are not 20 observations. What a metric reads
are its samples: the answers to each probe, of either model; each is resampled over its own units.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from scipy.stats import t as student

from soul_exp.metrics.answers import Answers, UndefinedError
from soul_exp.metrics.suite import ScoredTask

LEVEL = 0.95
BOOTSTRAP = 20  # units of the smallest sample from which on the bootstrap serves; with 4 its intervals cover 79 %
JACKKNIFE = 5  # and the jackknife
DRAWS = 2000

Available = Mapping[str, Any]  # probe -> Answers, "suite" -> Scores, "retrained" -> (probe -> Answers), lists of such
Sample = Answers | ScoredTask
Compute = Callable[[Any], float]  # a metric, of what it reads by name
Units = np.ndarray | list[np.ndarray]  # the rows of each unit: a matrix where all have as many
# of a sample: its probe, or "suite" and its task; before it "retrained", or "retrained_seeds" and a number, where such
# a model gave it
Key = tuple[str, ...]


class NoIntervalError(ValueError):
    """A metric has no interval; the message is the reason."""


def interval(compute: Compute, available: Available, *, seed: int) -> tuple[float, float]:
    """The 95 % interval of `compute(available)` over the independent units of the samples that it reads.

    From 20 units in the smallest sample on by the percentile bootstrap: the quantiles of 2,000 draws, which `seed` and
    the sample's key decide, so that all metrics and models see the same ones. Below by the jackknife, which leaves out
    one unit at a time: Student's t (units of the smallest sample - 1 degrees of freedom), the variances of the samples
    added. Raises NoIntervalError for fewer than 5 units, for a value that is not finite, for one that some resampled
    units do not have, and where nothing is sampled. Sources: Efron and Tibshirani 1993, chapters 11 and 13; Tukey 1958.
    """
    read = _Read(available)
    value = compute(read)
    samples = read.samples
    if not math.isfinite(value):
        raise NoIntervalError(f"its value is {value}")
    if not samples:
        raise NoIntervalError("it is computed from numbers that are not recorded by item")
    if len({id(answers) for answers in samples.values()}) < len(samples):
        raise NoIntervalError("it compares the model with itself")
    units = {key: rows_of_units(answers) for key, answers in samples.items()}
    smallest = min(units, key=lambda key: len(units[key]))
    least = len(units[smallest])
    if least < JACKKNIFE:
        found = f"{least} independent unit{'s' * (least != 1)} in {smallest[-1]}"
        raise NoIntervalError(f"{found}, expected {JACKKNIFE} or more")
    try:
        if least < BOOTSTRAP:
            low, high = _jackknife(compute, available, samples, units, value, least - 1)
        else:
            low, high = _bootstrap(compute, available, samples, units, seed)
    except UndefinedError as error:
        raise NoIntervalError(f"on some of the resampled units it has no value: {error}") from error
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NoIntervalError("its value is not finite on some of the resampled units")
    return low, high


def rows_of_units(answers: Sample) -> Units:
    """The rows of each independent unit, in the order of their first rows; without `unit` each example is one."""
    if answers.unit is None:
        return np.arange(_num(answers))[:, None]
    rows: dict[str, list[int]] = {}
    for row, unit in enumerate(answers.unit):
        rows.setdefault(unit, []).append(row)
    found = [np.array(each) for each in rows.values()]
    return np.stack(found) if len({len(each) for each in found}) == 1 else found  # a matrix is indexed faster


def _num(sample: Sample) -> int:
    return sample.num if isinstance(sample, ScoredTask) else len(sample)


class _Read(dict[str, Any]):
    """What is available; `samples` are those answers that were read, and tasks of a suite of which a measure was."""

    def __init__(self, values: Mapping[str, Any], above: Key = (), samples: dict[Key, Sample] | None = None) -> None:
        super().__init__(values)
        self.above, self.samples = above, {} if samples is None else samples

    def __getitem__(self, name: str) -> Any:
        value, key = super().__getitem__(name), (*self.above, name)
        if isinstance(value, Answers):
            self.samples[key] = value
        elif isinstance(value, ScoredTask):
            return _ReadTask(value, key, self.samples)
        elif isinstance(value, Mapping):
            return _Read(value, key, self.samples)
        elif isinstance(value, list | tuple):  # of retrained models
            return [_Read(each, (*key, str(number)), self.samples) for number, each in enumerate(value)]
        return value


class _ReadTask(dict[str, float]):
    """The measures of a task of a suite, which becomes one of the `samples` when one of them is read."""

    def __init__(self, task: ScoredTask, key: Key, samples: dict[Key, Sample]) -> None:
        super().__init__(task)
        self.task, self.key, self.samples = task, key, samples

    def __getitem__(self, measure: str) -> float:
        self.samples[self.key] = self.task
        return super().__getitem__(measure)


def _replaced(available: Available, samples: Mapping[Key, Any]) -> dict[str, Any]:
    """`available` with `samples` in the place of those with the same keys."""
    found: dict[str, Any] = dict(available)
    for (name, *rest), answers in samples.items():
        if len(rest) == 2:
            models = list(found[name])
            models[int(rest[0])] = {**models[int(rest[0])], rest[1]: answers}
            found[name] = models
        else:
            found[name] = {**found[name], rest[0]: answers} if rest else answers
    return found


def _jackknife(
    compute: Compute, available: Available, samples: Mapping[Key, Sample], units: Mapping[Key, Units],
    value: float, degrees: int,
) -> tuple[float, float]:  # fmt: skip
    variance = 0.0
    for key, answers in samples.items():
        without = [
            compute(_replaced(available, {key: answers.take(np.delete(np.arange(_num(answers)), rows))}))
            for rows in units[key]
        ]
        number = len(without)
        variance += (number - 1) * float(np.var(without))
    half = float(student.ppf((1 + LEVEL) / 2, degrees)) * math.sqrt(variance)
    return value - half, value + half


def _bootstrap(
    compute: Compute, available: Available, samples: Mapping[Key, Sample], units: Mapping[Key, Units],
    seed: int,
) -> tuple[float, float]:  # fmt: skip
    draws = [[(key, answers.take(rows)) for rows in _draws(units[key], key, seed)] for key, answers in samples.items()]
    values = [compute(_replaced(available, dict(drawn))) for drawn in zip(*draws, strict=True)]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _draws(units: Units, key: Key, seed: int) -> Iterable[np.ndarray]:
    """The rows of as many units as there are, drawn with replacement, DRAWS times."""
    generator = np.random.default_rng([seed, zlib.crc32("/".join(key).encode())])
    chosen = generator.integers(0, len(units), (DRAWS, len(units)))
    if isinstance(units, np.ndarray):
        return units[chosen].reshape(DRAWS, -1)
    return (np.concatenate([units[unit] for unit in row]) for row in chosen)
