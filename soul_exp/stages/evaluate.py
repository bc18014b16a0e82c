"""The stage that evaluates: the unlearned model answers every probe, and results.json compares it with the others."""

import logging
import math
import time
from dataclasses import replace
from typing import Any

from soul_exp import results
from soul_exp.artifacts import answer_cache, prepared_models, scores
from soul_exp.distributed import zero3
from soul_exp.metrics.answers import SUITE
from soul_exp.stages.process import peak_memory_gib
from soul_exp.stages.stage import CHECKPOINTS, RECORDS, RankJob
from soul_exp.tasks import scorers
from soul_exp.training import checkpoints

log = logging.getLogger(__name__)

GIVEN = "name a model.path that knows the forget rows, or type task.trained_before=false to train it on them"


def evaluate(job: RankJob) -> RankJob:
    """Evaluate the model of `job`, or the one that model.path names; rank 0 writes records and results.json."""
    run, lm, start = job.run, job.lm or job.load(job.run.model.checkpoint), time.perf_counter()
    finite = zero3.is_finite(lm.model)  # else it cannot answer
    answers = answer_cache.answers_of(lm, run, "unlearned") if finite else {}
    seconds = {"unlearn": job.outcome.seconds if job.outcome else 0.0, "evaluate": time.perf_counter() - start}
    job = replace(job, lm=lm, seconds={**job.seconds, **seconds})
    if job.wandb_log is not None:
        log.info("evaluate unlearned: %d probes in %.0f s", len(run.task.probes), seconds["evaluate"])
        answer_cache.write_answers(job.out / RECORDS, answers)
        found = summary(job, answers)
        results.write(job.out, found)
        job.wandb_log.finish(found)
        checkpoints.remove_all(job.out / CHECKPOINTS)
    return job


def summary(job: RankJob, answers: answer_cache.Measured) -> results.Results:
    """The results of `job`, whose unlearned model gave `answers`; none where its weights are not finite."""
    run, outcome = job.run, job.outcome
    by_model = {"unlearned": answers, **scores.known_answers(run)}
    suites: dict[str, Any] = {model: given[SUITE] for model, given in by_model.items() if SUITE in given}
    retrained = by_model.get("retrained")
    available = {name: metric for name, metric in run.metrics.items() if name not in job.reasons}
    found = {
        model: {name: scores.score(metric, given, retrained) for name, metric in available.items()}
        for model, given in by_model.items()
    }
    diverged = (outcome.diverged if outcome else None) or _not_finite(answers, found["unlearned"])
    null: dict[str, str] = {}
    for model, values in found.items():
        for name, value in values.items():
            if why := scores.why_null(available[name], value, by_model[model], retrained):
                of_unlearned = f"diverged: {diverged}" if diverged else why
                null |= {name: of_unlearned} if model == "unlearned" else {f"{model}.{name}": why}
                values[name] = None
    measured = {model: {name: values.get(name) for name in run.metrics} for model, values in found.items()}
    notes = [*run.task.notes, *job.notes, *(outcome.notes if outcome else ())]
    advice = [GIVEN] if run.target_is_given else []
    if little := scores.not_learnt(run.task.learnt, measured.get("original", {}), *advice):
        notes.append(little)
    elif outcome and not diverged and (left := scores.not_forgotten(measured, outcome.num_steps)):
        notes.append(left)
    notes += [
        *scores.of_test(measured, by_model),
        *scores.of_rates(available, answers),
        *filter(None, [scores.undecided(job.trials)]),
    ]
    scorer = scorers.report(run.task.scorer, run.cache, job.device) if run.task.scorer is not None else None
    headline: dict[str, Any] = {key: measured["unlearned"].get(key) for key in results.HEADLINE}
    return results.Results(
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
        notes=[*notes, *([scorers.note(scorer)] if scorer else ())],
        scorer=scorer,
        trials=job.trials,
        num_steps=outcome.num_steps if outcome else 0,
        seconds=job.seconds,
        peak_memory_gib=peak_memory_gib(job.device),
        seeds={"seed": run.seed, "prepare.seed": run.prepare.seed},
        data_hashes=prepared_models.data_hashes(run),
        commit=results.commit(),
        versions=results.versions(),
        **headline,
    )


def _not_finite(answers: answer_cache.Measured, unlearned: dict[str, float | None]) -> str | None:
    """What of the unlearned model is not finite: its weights, as it gave no answers, or a metric."""
    if not answers:
        return "the weights are not finite"
    broken = (name for name, value in unlearned.items() if value is not None and not math.isfinite(value))
    return next((f"the metric {name} is {unlearned[name]}" for name in broken), None)
