"""Metrics of a model's answers: of every model that a run compares, and on the validation part while it trains."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from soul_exp import binding
from soul_exp.artifacts import prepared_models
from soul_exp.artifacts.answer_cache import Measured, cached_answers
from soul_exp.distributed import zero3
from soul_exp.errors import counted
from soul_exp.evaluation.probing import evaluate_probes
from soul_exp.evaluation.records import read_retrained
from soul_exp.metrics import collapse
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.general import ks_p_value, log10_p_value
from soul_exp.metrics.scale import scale_of
from soul_exp.metrics.uncertainty import NoIntervalError, interval, rows_of_units
from soul_exp.models.language_model import LanguageModel
from soul_exp.results import COMPARED, TASK
from soul_exp.run import Metric, Models, Run
from soul_exp.tasks.task import Probe, Task

KNOWN = "forget_probability"
OF_TEST = ("log10_forget_quality", "forget_quality", "forget_ks_distance")
NOT_JUDGED = (
    f"no probe has {collapse.LEAST} free answers that are no refusals, to prompts that the retrained or the original "
    f"model answered too"
)
WORTH_LOSING = 0.1  # of it: with less there is nothing to forget
VALIDATION = "validation_"  # how the names of the validation part's probes and metrics begin
FORGET_QUALITY = "validation_log10_forget_quality"
RETAIN = "validation_retain_probability"


Retrained = Sequence[Measured]  # the answers of the retrained models, one for each seed; that of prepare.seed first


def available_to(answers: Measured, retrained: Retrained) -> dict[str, Any]:
    """What a metric of one model's `answers` may name: its probes, `suite`, `retrained` and `retrained_seeds`."""
    return {**answers, **({"retrained": retrained[0], "retrained_seeds": retrained} if retrained else {})}


def score(metric: Metric, answers: Measured, retrained: Retrained) -> float | None:
    """The metric of one model's answers; None if a probe that it names is missing among them."""
    available = available_to(answers, retrained)
    if any(name not in available for name in binding.names(metric)):
        return None
    return float(binding.call(metric, available))


def versions(metrics: Mapping[str, Metric], task: Task) -> dict[str, int]:
    """Metric -> version of its definition, and the task's under `results.TASK`; without what declares none."""
    scales = {name: scale_of(metric) for name, metric in metrics.items()}
    return {TASK: len(task.history), **{name: scale.version for name, scale in scales.items() if scale is not None}}


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
            scale = getattr(metric.func if isinstance(metric, functools.partial) else metric, "scale", None)
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
    probes = _of_probes(answers).items()
    return {name: {"examples": len(each), "units": len(rows_of_units(each))} for name, each in probes}


def guarded(
    by_model: Mapping[str, Measured],
) -> tuple[dict[str, str] | None, dict[str, dict[str, dict[str, float | None]]]]:
    """What collapsed of the unlearned model (probe -> why; None: cannot be judged), and what is read of each model."""
    given = {model: _of_probes(measured) for model, measured in by_model.items()}
    references: dict[str, dict[str, Answers]] = {
        model: given[model] for model in ("retrained", "original") if model in given
    }
    judged = collapse.verdicts(given["unlearned"], references)
    read = {
        model: {name: vars(collapse.free_answers(each)) for name, each in probes.items() if each.generation is not None}
        for model, probes in given.items()
    }
    return {probe: why for probe, why in judged.items() if why} if judged else None, read


def _of_probes(measured: Measured) -> dict[str, Answers]:
    return {name: each for name, each in measured.items() if isinstance(each, Answers)}


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
    return {name: list(map(_finite, values)) for name, values in found.items()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def why_null(metric: Metric, value: float | None, answers: Measured, retrained: Retrained) -> str | None:
    """The reason why `value`, which `score` returned, is not a number; None if it is one."""
    if value is not None:
        return None if math.isfinite(value) else f"its value is {value}"
    missing = [name for name in binding.names(metric) if name not in available_to(answers, retrained)]
    return f"no answers: {', '.join(missing)}"


def not_learnt(
    learnt: Mapping[str, float], original: Mapping[str, float | None], advice: str = "raise prepare.epochs"
) -> str | None:
    """A note if metrics of `original` are below `learnt`, so that it knows too little to forget; else None."""
    low = [
        f"{name} {value:.2f}, expected {least:g} or more"
        for name, least in learnt.items()
        if (value := original.get(name)) is not None and value < least
    ]
    return f"the original model has little to forget ({'; '.join(low)}): {advice}" if low else None


def not_forgotten(metrics: Mapping[str, Mapping[str, float | None]], num_steps: int) -> str | None:
    """A note if the unlearned model has kept more than half of the forget probability that there was to lose."""
    before, after, never = (metrics.get(m, {}).get(KNOWN) for m in ("original", "unlearned", "retrained"))
    to_lose = (before or 0) - (never or 0)
    if after is None or to_lose < WORTH_LOSING or after - (never or 0) <= to_lose / 2:
        return None
    return (
        f"little was forgotten in {counted(num_steps, 'step')} ({KNOWN} {before:.3f} before, {after:.3f} after): raise "
        f"train.epochs or optimizer.lr, or choose lr and gamma by trials (docs/custom.md)"
    )


def of_test(metrics: Mapping[str, Mapping[str, float | None]], by_model: Mapping[str, Measured]) -> list[str]:
    """What a reader has to know of the test behind forget quality: models at its floor, samples of different sizes."""
    name, notes = "log10_forget_quality", []
    sizes = {model: len(answers["forget"]) for model, answers in by_model.items() if "forget" in answers}
    tested = {model: metrics.get(model, {}).get(name) for model in sizes if model != "retrained"}
    values = {model: value for model, value in tested.items() if value is not None}
    for size in sorted({sizes[model] for model in values}):
        others = sizes["retrained"]
        floor = log10_p_value(ks_p_value(np.zeros(size), np.ones(others)))
        low = [model for model, value in values.items() if sizes[model] == size and value <= floor + 1e-9]
        if low:
            notes.append(
                f"{name} {floor:.1f} ({', '.join(low)}) is the lowest that its test of {size} against {others} answers "
                f"can give: of models that differ more it is the same"
            )
        if size != others:
            notes.append(f"forget quality compares {size} answers with {others} of the retrained model")
    return notes


def undecided(trials: Sequence[Mapping[str, Any]]) -> str | None:
    """A note if all `trials` have the same validation forget quality, so that it cannot choose one; else None."""
    values = {trial["metrics"].get(FORGET_QUALITY) for trial in trials if trial["diverged"] is None}
    if len(trials) < 2 or len(values) != 1 or (value := values.pop()) is None:
        return None
    return (
        f"all trials have the same {FORGET_QUALITY} ({value:.3g}), so that the rule cannot tell which forgets more: "
        f"raise train.epochs or task.validation_fraction, or give more rows"
    )


def known_answers(models: Models) -> dict[str, Measured]:
    """key -> answers, of each compared model that prepare evaluated, or whose records were given."""
    known: dict[str, Measured] = {}
    checkpoints = prepared_models.checkpoints(models)
    for compared in COMPARED:
        system_prompt = models.system_prompt if compared.with_system_prompt else None
        if compared.role not in checkpoints or (compared.with_system_prompt and system_prompt is None):
            continue
        if (answers := cached_answers(models, checkpoints[compared.role], system_prompt)) is not None:
            known[compared.key] = answers
    if models.retrained_records:
        known["retrained"] = {
            name: _with_units(answers, models.task.probes.get(name))
            for name, answers in read_retrained(models.retrained_records).items()
        }
    return known


def retrained_answers(models: Models, known: Mapping[str, Measured]) -> Retrained:
    """The answers of the retrained model among the `known` ones, and of those of further seeds that are cached."""
    if "retrained" not in known:
        return []
    checkpoints = prepared_models.checkpoints(models)
    others = [cached_answers(models, checkpoints[role]) for role in checkpoints if prepared_models.number_of(role)]
    return [known["retrained"], *(answers for answers in others if answers is not None)]


def _with_units(answers: Answers, probe: Probe | None) -> Answers:
    """`answers` with the units of the `probe` that they answer, from its first item on, if they name none."""
    if probe is None or probe.units is None or answers.unit is not None:
        return answers
    return replace(answers, unit=probe.units[: len(answers)])


def validation_metrics(run: Run) -> dict[str, Metric]:
    """The metrics of the task that read the validation part only."""
    return {name: metric for name, metric in run.metrics.items() if name.startswith(VALIDATION)}


def validation_of_target(run: Run, reasons: Mapping[str, str]) -> dict[str, float]:
    """The validation metrics of the target, but for those that are not available, for which there are `reasons`."""
    known = known_answers(run)
    metrics = {name: metric for name, metric in validation_metrics(run).items() if name not in reasons}
    scored = {name: score(metric, known["original"], [known["retrained"]]) for name, metric in metrics.items()}
    return {name: value for name, value in scored.items() if value is not None}


def validate(run: Run, lm: LanguageModel, label: str) -> dict[str, float | None]:
    """The validation metrics of `lm`, by likelihoods alone; None where weights or metric are not finite."""
    items = run.task.probes.items()
    probes = {name: replace(probe, generate=False) for name, probe in items if name.startswith(VALIDATION)}
    finite = zero3.is_finite(lm.model)
    answers = evaluate_probes(lm, probes, **run.evaluation.of_probes, label=f"{label}: validation") if finite else {}
    known = known_answers(run)
    retrained = [known["retrained"]] if "retrained" in known else []
    measured = {name: score(metric, answers, retrained) for name, metric in validation_metrics(run).items()}
    return {name: _finite(value) for name, value in measured.items()}
