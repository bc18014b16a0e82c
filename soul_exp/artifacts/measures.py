"""All numbers of a run that come from the records of its models: what results.json states and `verify` recomputes."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from soul_exp import binding
from soul_exp.artifacts.answer_cache import Measured
from soul_exp.artifacts.prepared_models import number_of
from soul_exp.artifacts.scores import Retrained, available_to, finite, of_probes, references, score, why_null
from soul_exp.metrics import collapse
from soul_exp.metrics.answers import SUITE
from soul_exp.metrics.dialects import of_first
from soul_exp.metrics.scale import scale_of
from soul_exp.metrics.uncertainty import NoIntervalError, interval, rows_of_units
from soul_exp.results import COMPARED
from soul_exp.run import Metric

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
