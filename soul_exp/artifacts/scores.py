"""Metrics of a model's answers: of every model that a run compares, and on the validation part while it trains."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from soul_exp import binding
from soul_exp.artifacts import prepared_models
from soul_exp.artifacts.answer_cache import Measured, cached_folder, original_of, read_answers, scored_by_original
from soul_exp.distributed import zero3
from soul_exp.errors import counted
from soul_exp.evaluation.probing import evaluate_probes
from soul_exp.evaluation.records import read_retrained
from soul_exp.metrics import collapse
from soul_exp.metrics.answers import Answers, NotRecordedError, UndefinedError
from soul_exp.metrics.general import ks_p_value, log10_p_value
from soul_exp.metrics.membership import rate_used
from soul_exp.metrics.scale import scale_of
from soul_exp.models import loading
from soul_exp.models.language_model import LanguageModel
from soul_exp.results import COMPARED, TASK
from soul_exp.run import Metric, Models, Run
from soul_exp.tasks.refusals import with_refused
from soul_exp.tasks.task import Probe, Task

KNOWN = "forget_probability"
WORTH_LOSING = 0.1  # of it: with less there is nothing to forget
RETRAINED = ("retrained", "retrained_seeds")  # what a metric names to be compared with
VALIDATION = "validation_"  # how the names of the validation part's probes and metrics begin
FORGET_QUALITY = "validation_log10_forget_quality"
RETAIN = "validation_retain_probability"
UTILITY = "validation_utility"
FLUENCY = "validation_fluency"  # share of the free answers to validation probes that are not degenerate
S_MIA = "validation_s_mia"
KEYS = [each.key for each in COMPARED]


Retrained = Sequence[Measured]  # the answers of the retrained models, one for each seed; that of prepare.seed first


def available_to(answers: Measured, retrained: Retrained) -> dict[str, Any]:
    """What a metric of one model's `answers` may name: its probes, `suite`, `retrained` and `retrained_seeds`."""
    return {**answers, **({"retrained": retrained[0], "retrained_seeds": retrained} if retrained else {})}


def score(metric: Metric, answers: Measured, retrained: Retrained) -> float | None:
    """The metric of one model's answers; None if it has no value, of which `why_null` gives the reason."""
    value = _value(metric, answers, retrained)
    return value if isinstance(value, float) else None


def versions(metrics: Mapping[str, Metric], task: Task) -> dict[str, int]:
    """Metric -> version of its definition, and the task's under `results.TASK`; without what declares none."""
    scales = {name: scale_of(metric) for name, metric in metrics.items()}
    return {TASK: len(task.history), **{name: scale.version for name, scale in scales.items() if scale is not None}}


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def why_null(metric: Metric, value: float | None, answers: Measured, retrained: Retrained) -> str | None:
    """The reason why `value`, which `score` returned, is not a number; None if it is one."""
    if value is not None:
        return None if math.isfinite(value) else f"its value is {value}"
    why = _value(metric, answers, retrained)
    return why if isinstance(why, str) else None


def _value(metric: Metric, answers: Measured, retrained: Retrained) -> float | str:
    """The metric, or why it has no value: answers or a field of them are missing, or it is not defined for them."""
    available = available_to(answers, retrained)
    if absent := [name for name in binding.names(metric) if name not in available]:
        return f"no answers: {', '.join(absent)}"
    try:
        return float(binding.call(metric, available))
    except (NotRecordedError, UndefinedError) as error:
        return str(error)


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


def of_rates(metrics: Mapping[str, Metric], answers: Measured) -> list[str]:
    """Which false positive rates of the `metrics` are below one text of the holdout, and the rate that is used."""
    stated = [metric.keywords for metric in metrics.values() if isinstance(metric, functools.partial)]
    rates = {constants["rate"] for constants in stated if "rate" in constants}
    number = len(answers.get("holdout", ()))
    lower = [f"{100 * rate:g} %" for rate in sorted(rates) if number and rate_used(rate, number) > rate]
    used = (
        f"the false positive rate is {100 / number:.2g} %, the lowest that {number} holdout texts allow"
        if lower
        else ""
    )
    return [f"TPR at {' and '.join(lower)}: {used}"] if lower else []


def of_guard(by_model: Mapping[str, Measured]) -> list[str]:
    """Which answers the collapse guard does not judge by their NLL, as there is no retrained model, and why."""
    left_out = collapse.without_nll(of_probes(by_model.get("unlearned", {})), references(by_model))
    found = f"whether the answers to {', '.join(left_out)} are fluent is judged by repetition alone"
    why = "without a retrained model nothing says how unlikely answers are under the original that differ from its own"
    return [f"{found}: {why}"] if left_out else []


def undecided(trials: Sequence[Mapping[str, Any]]) -> str | None:
    """A note if all `trials` have the same validation forget quality, so that it cannot choose one; else None."""
    values = {trial["metrics"].get(FORGET_QUALITY) for trial in trials if trial["diverged"] is None}
    if len(trials) < 2 or len(values) != 1 or (value := values.pop()) is None:
        return None
    return (
        f"all trials have the same {FORGET_QUALITY} ({value:.3g}), so that the rule cannot tell which forgets more: "
        f"raise train.epochs or task.validation_fraction, or give more rows"
    )


def cached_folders(models: Models) -> dict[str, Path]:
    """Key of a compared model, or role of a retrained one of a further seed -> the cache folder with its answers."""
    checkpoints = prepared_models.checkpoints(models)
    wanted = [(each.key, each.role, models.system_prompt if each.with_system_prompt else None) for each in COMPARED]
    without = {each.key for each in COMPARED if each.with_system_prompt and models.system_prompt is None}
    wanted += [(role, role, None) for role in checkpoints if prepared_models.number_of(role)]
    found = {
        key: cached_folder(models, checkpoints[role], prompt)
        for key, role, prompt in wanted
        if role in checkpoints and key not in without
    }
    return {key: folder for key, folder in found.items() if folder is not None}


def known_answers(models: Models) -> dict[str, Measured]:
    """key -> answers, of each compared model that prepare evaluated, or whose records were given."""
    folders = cached_folders(models).items()
    known = {key: read_answers(folder) for key, folder in folders if key in KEYS}
    if models.retrained_records:
        known["retrained"] = {
            name: _with_units(answers, models.task.probes.get(name))
            for name, answers in read_retrained(models.retrained_records).items()
        }
    return known


def retrained_answers(models: Models) -> dict[str, Measured]:
    """Role -> answers, of the retrained models of further seeds that are cached."""
    folders = cached_folders(models).items()
    return {role: read_answers(folder) for role, folder in folders if role not in KEYS}


def _with_units(answers: Answers, probe: Probe | None) -> Answers:
    """`answers` with the units of the `probe` that they answer, from its first item on, if they name none."""
    if probe is None or probe.units is None or answers.unit is not None:
        return answers
    return replace(answers, unit=probe.units[: len(answers)])


def validation_metrics(run: Run) -> dict[str, Metric]:
    """The metrics of the task that read the validation part only."""
    return {name: metric for name, metric in run.metrics.items() if name.startswith(VALIDATION)}


def validation_probes(run: Run) -> dict[str, Probe]:
    return {name: probe for name, probe in run.task.probes.items() if name.startswith(VALIDATION)}


@dataclass(frozen=True)
class Validated:
    """What the validation part says of a model; a number is None where weights or the number are not finite."""

    # the task's metrics of it; FLUENCY; and PROBE_MEASURE of each of its probes with free answers, the measures being
    # those of metrics/collapse.py that LIMITS names
    metrics: Mapping[str, float | None]
    collapsed: str | None  # why its free answers are those of a ruined model, or None


def validation_of_target(run: Run, reasons: Mapping[str, str]) -> dict[str, float]:
    """The validation numbers of the target, but for those that are not available, for which there are `reasons`."""
    known = known_answers(run)
    metrics = {name: metric for name, metric in validation_metrics(run).items() if name not in reasons}
    scored = {name: score(metric, known["original"], [known["retrained"]]) for name, metric in metrics.items()}
    scored |= of_free_answers(known["original"])
    return {name: value for name, value in scored.items() if value is not None}


def validate(run: Run, lm: LanguageModel, label: str) -> Validated:
    """What the validation part says of `lm`, whose training does not notice it; every rank calls it.

    It answers the prompts, and the original model, loaded beside it, scores what it generates.
    """
    probes = validation_probes(run)
    answers: Measured = {}
    if zero3.is_finite(lm.model):
        answered = evaluate_probes(lm, probes, **run.evaluation.of_probes, label=f"{label}: validation")
        answers = with_refused(answered, run.task.refusals)
        if any(probe.generate for probe in probes.values()) and (checkpoint := original_of(run)) is not None:
            original = prepared_models.load(run.model, checkpoint, run.compute.deepspeed)
            loading.move(original.model, str(next(lm.model.parameters()).device))
            answers = scored_by_original(run, answers, original, f"{label}: validation")
    known = known_answers(run)
    retrained = [known["retrained"]] if "retrained" in known else []
    measured = {name: score(metric, answers, retrained) for name, metric in validation_metrics(run).items()}
    judged = collapse.verdicts(of_probes(answers), references(known))
    collapsed = "; ".join(f"{probe}: {why}" for probe, why in judged.items() if why)
    return Validated(
        {name: finite(value) for name, value in {**measured, **of_free_answers(answers)}.items()}, collapsed or None
    )


def of_free_answers(answers: Measured) -> dict[str, float | None]:
    """FLUENCY, and PROBE_MEASURE of what the collapse guard reads, of the free answers to validation probes."""
    free = {
        name: each
        for name, each in of_probes(answers).items()
        if name.startswith(VALIDATION) and each.generation is not None
    }
    texts = [text for each in free.values() for text in each.needed("generation")]
    found: dict[str, float | None] = {FLUENCY: collapse.fluency(texts)} if texts else {}
    for name, each in free.items():
        measured = vars(collapse.free_answers(each))
        found |= {f"{name}_{measure}": measured[measure] for measure in collapse.LIMITS}
    return found


def references(by_model: Mapping[str, Measured]) -> dict[str, dict[str, Answers]]:
    """The models whose free answers the collapse guard compares with, the first of them first."""
    return {model: of_probes(by_model[model]) for model in ("retrained", collapse.ORIGINAL) if model in by_model}


def of_probes(measured: Measured) -> dict[str, Answers]:
    """The answers to probes, without the scores of a suite."""
    return {name: each for name, each in measured.items() if isinstance(each, Answers)}
