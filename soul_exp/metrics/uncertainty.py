"""Intervals of metrics: what a number would be if other authors, passages or items had been drawn.

The independent units of a sample are resampled: 20 questions on one author are not 20 observations. What a metric reads
are its samples: the answers to each probe, of either model; each is resampled over its own units.
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    read, value = _value(compute, available)
    samples = read.samples
    if len({id(answers) for answers in samples.values()}) < len(samples):
        raise NoIntervalError("it compares the model with itself")
    groups = [_Group([id(answers)], key, rows_of_units(answers), f" in {key[-1]}") for key, answers in samples.items()]
    return _of_groups(compute, available, value, groups, seed)


def paired_interval(compute: Compute, available: Mapping[str, Any], *, seed: int) -> tuple[float, float]:
    """As `interval`, but samples with the same units are drawn together: a draw, or a unit left out, is one of each.

    Pairs are models that answer the same probe, so that their differences are more certain than either. Samples of
    other units, such as those of another probe, are drawn by themselves.
    """
    value, groups, _ = _paired(compute, available)
    return _of_groups(compute, available, value, groups, seed)


def unit_values(compute: Compute, available: Mapping[str, Any]) -> dict[str, float]:
    """Unit -> its share in `compute(available)`, the jackknife's pseudo-value; their mean is about the value itself.

    Of a mean it is the unit's own mean. So any metric of paired samples can be compared unit by unit. Raises
    NoIntervalError as `paired_interval` does, and where not all samples have the same units. Source: Tukey 1958.
    """
    value, groups, attacked = _paired(compute, available)
    own = [group for group in groups if attacked & {*group.samples}]  # thresholds of other units stay as they are
    if len(own) != 1:
        raise NoIntervalError("its samples have different units")
    number, without = len(own[0].units), _without_each(compute, available, own[0])
    return {unit: number * value - (number - 1) * each for unit, each in zip(own[0].names, without, strict=True)}


@dataclass(frozen=True)
class _Group:
    """Samples that have the same units, which are drawn together."""

    samples: Sequence[int]  # the identity of each
    key: Key  # decides the draws
    units: Units
    where: str = ""  # for the message of too few
    names: Sequence[str] = ()  # of the units


def _value(compute: Compute, available: Available) -> tuple["_Read", float]:
    """What `compute` reads, and its value. Raises NoIntervalError where there is no interval."""
    read = _Read(available)
    value = compute(read)
    if not math.isfinite(value):
        raise NoIntervalError(f"its value is {value}")
    if not read.samples:
        raise NoIntervalError("it is computed from numbers that are not recorded by item")
    return read, value


def _paired(compute: Compute, available: Available) -> tuple[float, list[_Group], set[int]]:
    """The value of `compute`, the samples that it reads by their units, and the identities of the attacked model's."""
    read, value = _value(compute, available)
    samples: dict[tuple[str, ...], list[Sample]] = {}
    for sample in read.samples.values():
        samples.setdefault(_names(sample), []).append(sample)
    groups = []
    for place, (names, same) in enumerate(samples.items()):
        key = ("attack", *([str(place)] if place else []))
        identities = [id(sample) for sample in same]
        groups.append(_Group(identities, key, rows_of_units(same[0]), names=tuple(dict.fromkeys(names))))
    _smallest(groups)
    return value, groups, {id(sample) for (model, *_), sample in read.samples.items() if model == "attacked"}


def _smallest(groups: Sequence[_Group]) -> int:
    """The number of units in the smallest group. Raises NoIntervalError if these are too few."""
    smallest = min(groups, key=lambda group: len(group.units))
    number = len(smallest.units)
    if number < JACKKNIFE:
        found = f"{number} independent unit{'s' * (number != 1)}{smallest.where}"
        raise NoIntervalError(f"{found}, expected {JACKKNIFE} or more")
    return number


def _of_groups(
    compute: Compute, available: Available, value: float, groups: Sequence[_Group], seed: int
) -> tuple[float, float]:
    """The interval: each draw is one of every group; each unit is left out of its group alone."""
    number = _smallest(groups)
    if number < BOOTSTRAP:
        left_out = [np.array(_without_each(compute, available, group)) for group in groups]
        variance = sum((len(without) - 1) * float(np.var(without)) for without in left_out)
        half = float(student.ppf((1 + LEVEL) / 2, number - 1)) * math.sqrt(variance)
        low, high = value - half, value + half
    else:
        with _explained():
            drawn = [
                compute(
                    _taken(
                        available, {one: of for group, of in zip(groups, rows, strict=True) for one in group.samples}
                    )
                )
                for rows in zip(*(_draws(group.units, group.key, seed) for group in groups), strict=True)
            ]
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    _finite([low, high])
    return float(low), float(high)


def _without_each(compute: Compute, available: Mapping[str, Any], group: _Group) -> list[float]:
    """The value without each unit of `group`, one at a time."""
    every = np.arange(sum(map(len, group.units)))
    with _explained():
        left = (dict.fromkeys(group.samples, np.delete(every, rows)) for rows in group.units)
        return _finite([compute(_taken(available, rows)) for rows in left])


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except UndefinedError as error:
        raise NoIntervalError(f"on some of the resampled units it has no value: {error}") from error


def _finite(values: list[float]) -> list[float]:
    if not all(map(math.isfinite, values)):
        raise NoIntervalError("its value is not finite on some of the resampled units")
    return values


def _taken(available: Any, rows: Mapping[int, np.ndarray]) -> Any:
    """`available` with some examples of the samples in it: those in `rows`, by the identity of the sample."""
    if isinstance(available, Sample):
        return available.take(rows[id(available)]) if id(available) in rows else available
    if isinstance(available, Mapping):
        return {name: _taken(value, rows) for name, value in available.items()}
    return [_taken(value, rows) for value in available] if isinstance(available, list | tuple) else available


def rows_of_units(answers: Sample) -> Units:
    """The rows of each independent unit, in the order of their first rows; without `unit` each example is one."""
    if answers.unit is None:
        return np.arange(_num(answers))[:, None]
    rows: dict[str, list[int]] = {}
    for row, unit in enumerate(_names(answers)):
        rows.setdefault(unit, []).append(row)
    found = [np.array(each) for each in rows.values()]
    return np.stack(found) if len({len(each) for each in found}) == 1 else found  # a matrix is indexed faster


def _names(sample: Sample) -> tuple[str, ...]:
    """The unit of each example, its number where it is one of its own."""
    return tuple(sample.unit if sample.unit is not None else map(str, range(_num(sample))))


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


def _draws(units: Units, key: Key, seed: int) -> Iterable[np.ndarray]:
    """The rows of as many units as there are, drawn with replacement, DRAWS times."""
    generator = np.random.default_rng([seed, zlib.crc32("/".join(key).encode())])
    chosen = generator.integers(0, len(units), (DRAWS, len(units)))
    if isinstance(units, np.ndarray):
        return units[chosen].reshape(DRAWS, -1)
    return (np.concatenate([units[unit] for unit in row]) for row in chosen)
