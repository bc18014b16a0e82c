"""Metrics of a model's answers: of every model that a run compares, and on the validation part while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra.utils

from soul_exp import binding
from soul_exp.artifacts import answer_cache, prepared_models
from soul_exp.distributed import zero3
from soul_exp.evaluation.probing import evaluate_probes
from soul_exp.evaluation.records import read_retrained
from soul_exp.metrics.answers import Answers, Scores
from soul_exp.models.language_model import LanguageModel
from soul_exp.tasks.task import Task

VALIDATION = "validation_"  # how the names of the validation part's probes and metrics begin
FORGET_QUALITY = "validation_log10_forget_quality"
RETAIN = "validation_retain_probability"


def measure(
    metric: Callable[..., float],
    answers: Mapping[str, Answers | Scores],
    retrained: Mapping[str, Answers | Scores] | None,
) -> float | None:
    """The metric of one model's answers; None if a probe that it names was not put to that model."""
    available: dict[str, Any] = dict(answers)
    if retrained is not None:
        available["retrained"] = retrained
    wanted = binding.names(metric)
    if any(name not in available for name in wanted):
        return None
    return float(binding.call(metric, available))


def why_null(
    metric: Callable[..., float],
    value: float | None,
    answers: Mapping[str, Answers | Scores],
    retrained: Mapping[str, Answers | Scores] | None,
) -> str | None:
    """Why the `value` that `measure` returned is no number; None if it is one."""
    if value is not None:
        return None if math.isfinite(value) else f"its value is {value}"
    available = [*answers, *(["retrained"] if retrained is not None else [])]
    return f"no answers: {', '.join(name for name in binding.names(metric) if name not in available)}"


def not_learnt(learnt: Mapping[str, float], original: Mapping[str, float | None]) -> str | None:
    """A sentence on what the target knows too little of to forget it: metrics of `original` below `learnt`, if any."""
    low = [
        f"{name} {value:.2f}, expected {least:g} or more"
        for name, least in learnt.items()
        if (value := original.get(name)) is not None and value < least
    ]
    return f"the original model has little to forget ({'; '.join(low)}): raise prepare.epochs" if low else None


def known_answers(config: Mapping[str, Any], task: Task) -> dict[str, Mapping[str, Answers | Scores]]:
    """The answers of the models that prepare left, each where it is to be had.

    `original`, `retrained`, and `input_based`: the original under a system prompt that asks it not to reveal.
    """
    known: dict[str, Mapping[str, Answers | Scores]] = {}
    places = prepared_models.checkpoints(config, task)
    asked: list[tuple[str, str, str | None]] = [("original", "target", None), ("retrained", "retrained", None)]
    if told := prepared_models.instruction(config):
        asked.insert(1, ("input_based", "target", told))
    for model, role, said in asked:
        if role in places and (answers := answer_cache.answers_of(config, task, places[role], said)) is not None:
            known[model] = answers
    if config["retrained"]["records"]:
        known["retrained"] = read_retrained(Path(config["retrained"]["records"]))
    return known


def validation_metrics(config: Mapping[str, Any]) -> dict[str, Callable[..., float]]:
    """The metrics of the task that look at the validation part only."""
    return {
        name: hydra.utils.instantiate(entry)
        for name, entry in config["task"]["metrics"].items()
        if name.startswith(VALIDATION)
    }


def validate(config: Mapping[str, Any], task: Task, subject: LanguageModel, label: str) -> dict[str, float | None]:
    """The validation metrics of `subject`, by likelihoods alone; None where weights or metric are not finite."""
    probes = {
        name: replace(probe, generate=False) for name, probe in task.probes.items() if name.startswith(VALIDATION)
    }
    finite = zero3.is_finite(subject.model)
    answers = evaluate_probes(subject, probes, **config["evaluate"], label=f"{label}: validation") if finite else {}
    retrained = known_answers(config, task).get("retrained")
    measured = {name: measure(metric, answers, retrained) for name, metric in validation_metrics(config).items()}
    return {name: value if value is not None and math.isfinite(value) else None for name, value in measured.items()}
