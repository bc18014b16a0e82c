"""All numbers of a run that come from the records of its models: what results.json states and `verify` recomputes."""

import contextlib
import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from soul_exp import binding, results
from soul_exp.artifacts.answer_cache import Measured
from soul_exp.artifacts.prepared_models import number_of
from soul_exp.artifacts.scores import Retrained, available_to, finite, of_probes, references, score, why_null
from soul_exp.metrics import attack_points, collapse
from soul_exp.metrics.answers import SUITE, UndefinedError
from soul_exp.metrics.dialects import of_first
from soul_exp.metrics.scale import UNINFORMATIVE, scale_of
from soul_exp.metrics.uncertainty import NoIntervalError, interval, paired_interval, rows_of_units, unit_values
from soul_exp.results import COMPARED
from soul_exp.run import Metric

Given = TypeVar("Given", "Measures", "AttackMeasures", results.Results)
OF_TEST = ("log10_forget_quality", "forget_quality", "forget_ks_distance")
NOT_JUDGED = (
    f"no probe has {collapse.LEAST} free answers that are no refusals, to prompts that the retrained or the original "
    f"model answered too"
)


@dataclass(frozen=True)
class Measures:
    """The fields of these names of `Results`, whose comments define them, and `not_finite`."""

    not_finite: str | None  # the first metric of the unlearned model that is not, and its value
    metrics: Mapping[str, Mapping[str, float | None]]
    reasons: Mapping[str, str]
    intervals: Mapping[str, Mapping[str, list[float] | None]]
    no_interval: Mapping[str, str]
    ceiling: Mapping[str, list[float]]
    retrained_seeds: Mapping[str, list[float | None]]
    samples: Mapping[str, Mapping[str, int]]
    collapsed: Mapping[str, str] | None
    free_answers: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    suite: Mapping[str, Any]
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # `with_attacks` adds this and the next
    unit_values: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def stated(self) -> dict[str, Any]:
        """What `Results` has."""
        return {name: value for name, value in vars(self).items() if name != "not_finite"}


def measures(metrics: Mapping[str, Metric], records: Mapping[str, Measured], seed: int) -> Measures:
    """What `records` (model, or role of a further retrained model -> answers) say, by `metrics`; `seed` draws units.

    Numbers that are not finite are None, with a reason.
    """
    metrics, records = of_first(metrics, records)
    by_model = {each.key: records[each.key] for each in COMPARED if each.key in records}
    further = sorted((role for role in records if role.startswith("retrained_")), key=number_of)
    retrained = [records[role] for role in ("retrained", *further) if role in records] if "retrained" in records else []
    found = {
        model: {name: score(metric, given, retrained) for name, metric in metrics.items()}
        for model, given in by_model.items()
    }
    broken = [f"the metric {name} is {value}" for name, value in found["unlearned"].items() if finite(value) != value]
    null: dict[str, str] = {}
    for model, values in found.items():
        for name, value in values.items():
            if why := why_null(metrics[name], value, by_model[model], retrained):
                null[name if model == "unlearned" else f"{model}.{name}"] = why
                values[name] = None
    ends, no_interval = intervals(metrics, found, by_model, retrained, seed)
    collapsed, free_answers = guarded(by_model)
    if collapsed is None:
        null["collapsed"] = NOT_JUDGED
    return Measures(
        not_finite=broken[0] if broken else None,
        metrics=found,
        reasons=null,
        intervals=ends,
        no_interval=no_interval,
        ceiling=ceiling(metrics, retrained),
        retrained_seeds=of_seeds(metrics, retrained),
        samples=samples(by_model["unlearned"]),
        collapsed=collapsed,
        free_answers=free_answers,
        suite={
            model: {task: dict(of) for task, of in given[SUITE].items()}
            for model, given in by_model.items()
            if SUITE in given
        },
    )


@dataclass(frozen=True)
class AttackMeasures:
    """The fields of these names of `Results`, or what attacks add to them."""

    metrics: Mapping[str, Mapping[str, float | None]]
    reasons: Mapping[str, str]
    intervals: Mapping[str, Mapping[str, list[float] | None]]
    no_interval: Mapping[str, str]
    attacks: Mapping[str, Mapping[str, Any]]
    unit_values: Mapping[str, Mapping[str, float | None]]


def attack_measures(
    metrics: Mapping[str, Mapping[str, Metric]], records: Mapping[str, Mapping[str, Mapping[str, Measured]]], seed: int
) -> AttackMeasures:
    """What `records` (attack -> model -> branch -> point -> answers) say, by `metrics` (attack -> metric)."""
    values: dict[str, dict[str, float | None]] = {}
    ends: dict[str, dict[str, list[float] | None]] = {}
    reasons: dict[str, str] = {}
    why: dict[str, str] = {}
    by_unit: dict[str, dict[str, float]] = {}
    for attack, by_model in records.items():
        for model, points in by_model.items():
            available = {**by_model, "attacked": points}
            for name, metric in metrics[attack].items():
                key = name if model == "unlearned" else f"{model}.{name}"
                values.setdefault(model, {})[name] = None
                ends.setdefault(model, {})[name] = None
                try:
                    values[model][name] = _value_of_attack(metric, available)
                    ends[model][name] = _ends_of_attack(metric, available, seed)
                    if model == "unlearned":
                        with contextlib.suppress(NoIntervalError):  # of several probes, whose units are no pairs
                            by_unit[name] = unit_values(functools.partial(binding.call, metric), available)
                except UndefinedError as error:
                    reasons[key] = str(error)
                except NoIntervalError as error:
                    why[key] = str(error)
    return AttackMeasures(values, reasons, ends, why, {name: _points(of) for name, of in records.items()}, by_unit)


def _value_of_attack(metric: Metric, available: Mapping[str, Any]) -> float:
    """The metric of points of models. Raises UndefinedError where it has none, or they lack what it reads."""
    if absent := [name for name in binding.names(metric) if name not in available]:
        raise UndefinedError(f"no points of the {' and the '.join(absent)} model")
    try:
        value = float(binding.call(metric, available))
    except KeyError as error:  # the attack's options leave it out
        raise UndefinedError(f"the attack has no branch or point {error}") from error
    if not math.isfinite(value):
        raise UndefinedError(f"its value is {value}")
    return value


def _ends_of_attack(metric: Metric, available: Mapping[str, Any], seed: int) -> list[float]:
    """Its 95 % interval, in the metric's range. Raises NoIntervalError where it has none."""
    scale = scale_of(metric)
    if scale is not None and scale.no_interval:
        raise NoIntervalError(scale.no_interval)
    found = paired_interval(functools.partial(binding.call, metric), available, seed=seed)
    return list(found) if scale is None else np.clip(found, scale.low, scale.high).tolist()


def with_attacks(given: Given, found: AttackMeasures) -> Given:
    """`given`, results or measures, with `found` in the place of what it has of the same metrics and attacks."""
    added = {name for of_model in found.metrics.values() for name in of_model}

    def merged(before: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        return {**{key: value for key, value in before.items() if key.rpartition(".")[2] not in added}, **new}

    def by_model(before: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        return {model: merged(values, new.get(model, {})) for model, values in ({**new, **before}).items()}

    return replace(
        given,
        metrics=by_model(given.metrics, found.metrics),
        intervals=by_model(given.intervals, found.intervals),
        reasons=merged(given.reasons, found.reasons),
        no_interval=merged(given.no_interval, found.no_interval),
        attacks={**given.attacks, **found.attacks},
        unit_values=merged(given.unit_values, found.unit_values),
    )


def _points(records: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    """model -> branch -> point -> measure; and "uninformative": branch -> points that leave nothing to recover."""
    found: dict[str, Any] = {
        model: {
            branch: {
                point: {name: finite(value) for name, value in attack_points.measured(answers).items()}
                for point, answers in points.items()
            }
            for branch, points in branches.items()
        }
        for model, branches in records.items()
    }
    if {"original", "retrained"} <= {*records}:
        found[UNINFORMATIVE] = attack_points.uninformative(found["original"], found["retrained"])
    return found


def intervals(
    metrics: Mapping[str, Metric], values: Mapping[str, Mapping[str, float | None]], by_model: Mapping[str, Measured],
    retrained: Retrained, seed: int,
) -> tuple[dict[str, dict[str, list[float] | None]], dict[str, str]]:  # fmt: skip
    """model -> metric -> its 95 % interval, in the metric's range, or None; and why: metric, or model.metric -> reason.

    `values` are those of `metrics`; what has no value has no interval, without a reason of its own.
    """
    found: dict[str, dict[str, list[float] | None]] = {model: dict.fromkeys(each) for model, each in values.items()}
    why: dict[str, str] = {}
    for model, answers in by_model.items():
        available = available_to(answers, retrained)
        for name, metric in metrics.items():
            if values[model].get(name) is None:
                continue
            scale = scale_of(metric)
            try:
                if scale is not None and scale.no_interval:
                    raise NoIntervalError(scale.no_interval)
                ends = interval(functools.partial(binding.call, metric), available, seed=seed)
                found[model][name] = list(ends) if scale is None else np.clip(ends, scale.low, scale.high).tolist()
            except NoIntervalError as error:
                why[f"{model}.{name}"] = str(error)
    common = {name: reason for key, reason in why.items() if (name := key.removeprefix("unlearned.")) != key}
    others = {key: why[key] for key in why if why[key] != common.get(key.partition(".")[2])}
    return found, {**common, **others}


def samples(answers: Measured) -> dict[str, dict[str, int]]:
    """probe -> how many examples it has, and of how many independent units they are."""
    probes = of_probes(answers).items()
    return {name: {"examples": len(each), "units": len(rows_of_units(each))} for name, each in probes}


def guarded(
    by_model: Mapping[str, Measured],
) -> tuple[dict[str, str] | None, dict[str, dict[str, dict[str, float | None]]]]:
    """What collapsed of the unlearned model (probe -> why; None: cannot be judged), and what is read of each model."""
    given = {model: of_probes(measured) for model, measured in by_model.items()}
    judged = collapse.verdicts(given["unlearned"], references(by_model))
    read = {
        model: {name: vars(collapse.free_answers(each)) for name, each in probes.items() if each.generation is not None}
        for model, probes in given.items()
    }
    return {probe: why for probe, why in judged.items() if why} if judged else None, read


def ceiling(metrics: Mapping[str, Metric], retrained: Retrained) -> dict[str, list[float]]:
    """Each metric of the test behind forget quality, between every two retrained models, in increasing order.

    Their median is the ceiling: what a model that never saw the forget set comes to. Empty for a single one.
    """
    pairs = list(itertools.combinations(retrained, 2))
    tested = {name: metrics[name] for name in OF_TEST if name in metrics and pairs}
    found = {name: [score(metric, one, [other]) for one, other in pairs] for name, metric in tested.items()}
    known = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: sorted(values) for name, values in known.items() if len(values) == len(pairs)}


def of_seeds(metrics: Mapping[str, Metric], retrained: Retrained) -> dict[str, list[float | None]]:
    """Each metric of each retrained model, None where it has no finite value; empty for a single one."""
    several = metrics if len(retrained) > 1 else {}
    found = {name: [score(metric, each, retrained) for each in retrained] for name, metric in several.items()}
    return {name: list(map(finite, values)) for name, values in found.items()}
