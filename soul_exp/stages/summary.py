"""The results of a run: metrics of every compared model, reasons for those that are null, and what they cost."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from soul_exp import results
from soul_exp.artifacts.answer_cache import Measured
from soul_exp.artifacts.prepared_models import data_hashes
from soul_exp.artifacts.scores import known_answers, not_learnt, score, why_null
from soul_exp.metrics.answers import SUITE
from soul_exp.results import Results
from soul_exp.stages.stage import RankJob
from soul_exp.tasks import toxicity


def summary(job: RankJob, answers: Measured) -> Results:
    """The results of `job`, whose unlearned model gave `answers`; none where its weights are not finite."""
    run, outcome = job.run, job.outcome
    by_model = {"unlearned": answers, **known_answers(run)}
    suites: dict[str, Any] = {model: given[SUITE] for model, given in by_model.items() if SUITE in given}
    retrained = by_model.get("retrained")
    available = {name: metric for name, metric in run.metrics.items() if name not in job.reasons}
    found = {
        model: {name: score(metric, given, retrained) for name, metric in available.items()}
        for model, given in by_model.items()
    }
    diverged = (outcome.diverged if outcome else None) or _not_finite(answers, found["unlearned"])
    null: dict[str, str] = {}
    for model, values in found.items():
        for name, value in values.items():
            if why := why_null(available[name], value, by_model[model], retrained):
                of_unlearned = f"diverged: {diverged}" if diverged else why
                null |= {name: of_unlearned} if model == "unlearned" else {f"{model}.{name}": why}
                values[name] = None
    measured = {model: {name: values.get(name) for name in run.metrics} for model, values in found.items()}
    notes = [*run.task.notes, *(outcome.notes if outcome else ())]
    if little := not_learnt(run.task.learnt, measured.get("original", {})):
        notes.append(little)
    scorer = toxicity.report(run.task.scorer, run.cache, job.device) if run.task.scorer is not None else None
    return Results(
        name=run.name,
        status="diverged" if diverged else "finished",
        reason=diverged,
        caption=run.task.caption,
        choices=vars(run.choices),
        tuned=run.tuned,
        config=job.config,
        metrics=measured,
        reasons={**null, **job.reasons},
        suite=suites,
        training=dict(outcome.last) if outcome else {},
        notes=[*notes, *([toxicity.note(scorer)] if scorer else ())],
        scorer=scorer,
        trials=job.trials,
        num_steps=outcome.num_steps if outcome else 0,
        seconds=dict(job.seconds),
        peak_memory_gib=peak_memory_gib(job.device),
        seeds={"seed": run.seed, "prepare.seed": run.prepare.seed},
        data_hashes=data_hashes(run),
        commit=results.commit(Path(__file__).parent),
        versions=results.versions(),
        forget_quality=measured["unlearned"].get("forget_quality"),
        utility=measured["unlearned"].get("utility"),
        mia_auc=measured["unlearned"].get("mia_auc"),
    )


def _not_finite(answers: Measured, unlearned: dict[str, float | None]) -> str | None:
    """What of the unlearned model is not finite: its weights, as it gave no answers, or a metric."""
    if not answers:
        return "the weights are not finite"
    broken = (name for name, value in unlearned.items() if value is not None and not math.isfinite(value))
    return next((f"the metric {name} is {unlearned[name]}" for name in broken), None)


def peak_memory_gib(device: str) -> float:
    """The most memory that this process has held, in GiB: of the device, or resident on the CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
