"""The stage that evaluates: the unlearned model answers every probe, and results.json compares it with the others."""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from soul_exp import results
from soul_exp.artifacts import answer_cache, prepared_models, scores
from soul_exp.artifacts.measures import measures
from soul_exp.distributed import zero3
from soul_exp.errors import counted
from soul_exp.evaluation.durations import timed
from soul_exp.files import complete_folder, hashes
from soul_exp.models import loading
from soul_exp.stages.process import hardware, peak_memory_gib
from soul_exp.stages.stage import CHECKPOINTS, MODEL, RECORDS, RankJob
from soul_exp.tasks import scorers
from soul_exp.training import checkpoints

WEIGHTS = "*.safetensors"
NOT_FINITE = "the weights are not finite"
NOT_EVALUATED = "stages has no evaluate"
log = logging.getLogger(__name__)

GIVEN = "name a model.path that knows the forget rows, or type task.trained_before=false to train it on them"


def evaluate(job: RankJob) -> RankJob:
    """Evaluate the model of `job`, or the one that model.path names; rank 0 writes records and results.json."""
    run, start = job.run, time.perf_counter()
    if "evaluate" not in run.stages:  # the stage that attacks adds its numbers to these
        if job.wandb_log is not None:
            results.write(job.out, summary(job, recorded(job, {"unlearned": {}})))
        return job
    lm = job.lm or job.load(run.model.checkpoint)
    finite = zero3.is_finite(lm.model)  # else it cannot answer
    with timed() as stages:
        answers: answer_cache.Measured = answer_cache.answers_of(lm, run, "unlearned") if finite else {}
        if finite and (original := answer_cache.original_of(run)) is not None:
            loading.move(lm.model, "cpu")  # one model at a time on the device
            answers = answer_cache.scored_by_original(run, answers, job.load(original), "unlearned")
            loading.move(lm.model, job.device)
    spent = {"unlearn": job.outcome.seconds if job.outcome else 0.0, "evaluate": time.perf_counter() - start}
    job = replace(job, lm=lm, seconds={**job.seconds, **spent})
    if job.wandb_log is not None:
        log.info("evaluate unlearned: %s in %.0f s", counted(len(run.task.probes), "probe"), spent["evaluate"])
        by_model = {"unlearned": answers, **scores.known_answers(run), **scores.retrained_answers(run)}
        seconds = {key: answer_cache.seconds_of(folder) for key, folder in scores.cached_folders(run).items()}
        seconds["unlearned"] = stages
        ordered = {key: seconds[key] for key in dict.fromkeys((*scores.KEYS, *seconds)) if key in seconds}
        found = replace(summary(job, recorded(job, by_model)), evaluation_seconds=ordered)
        results.write(job.out, found)
        job.wandb_log.finish(found)
        checkpoints.remove_all(job.out / CHECKPOINTS)
    return job


def recorded(job: RankJob, by_model: Mapping[str, answer_cache.Measured]) -> dict[str, answer_cache.Measured]:
    """The answers of each model as its records hold them, which are written here: metrics come from nothing else."""
    with complete_folder(job.out / RECORDS) as partial:
        for model, answers in by_model.items():
            answer_cache.write_answers(partial / model, answers)
    return {model: answer_cache.read_answers(job.out / RECORDS / model) for model in by_model}


def summary(job: RankJob, by_model: Mapping[str, answer_cache.Measured]) -> results.Results:
    """The results of `job`, whose models gave the answers `by_model`: the unlearned one none if it is not finite."""
    run, outcome, answers = job.run, job.outcome, by_model["unlearned"]
    available = {name: metric for name, metric in run.metrics.items() if name not in job.reasons}
    evaluated = "evaluate" in run.stages
    found = measures(available, by_model, run.seed)
    not_finite = found.not_finite if answers or not evaluated else NOT_FINITE
    diverged = (outcome.diverged if outcome else None) or not_finite
    null = dict(found.reasons) if evaluated else dict.fromkeys([*available, "collapsed"], NOT_EVALUATED)
    if diverged:
        null |= {name: f"diverged: {diverged}" for name in null if name in available or not answers}
    num_retrained = sum(role.startswith("retrained") for role in by_model)
    if num_retrained < run.retrained_seeds:
        null["ceiling"] = f"{num_retrained} of {run.retrained_seeds} retrained models are here: add prepare to stages"
    measured = {model: {name: values.get(name) for name in run.metrics} for model, values in found.metrics.items()}
    notes = [*run.task.notes, *job.notes, *(outcome.notes if outcome else ())]
    advice = [GIVEN] if run.target_is_given else []
    if little := scores.not_learnt(run.task.learnt, measured.get("original", {}), *advice):
        notes.append(little)
    elif outcome and not diverged and (left := scores.not_forgotten(measured, outcome.num_steps)):
        notes.append(left)
    notes += [
        *scores.of_test(measured, by_model),
        *scores.of_rates(available, answers),
        *scores.of_guard(by_model),
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
        **{**found.stated(), "metrics": measured, "reasons": {**null, **job.reasons}},
        unit=run.task.unit,
        training=dict(outcome.last) if outcome else {},
        notes=[*notes, *([scorers.note(scorer)] if scorer else ())],
        scorer=scorer,
        trials=job.trials,
        num_steps=outcome.num_steps if outcome else 0,
        passes=dict(outcome.passes) if outcome else {},
        seconds=job.seconds,
        cached=job.cached,
        peak_memory_gib=peak_memory_gib(job.device),
        hardware=hardware(job.device),
        seeds={"seed": run.seed, "prepare.seed": run.prepare.seed},
        data_hashes=prepared_models.data_hashes(run),
        commit=results.commit(),
        versions=results.versions(),
        metric_versions=scores.versions(run.metrics, run.task),
        sha256=_sha256(job, by_model),
        **headline,
    )


def _sha256(job: RankJob, models: Iterable[str]) -> dict[str, Any]:
    """The SHA-256 of all that the results of `job` rest on: records, weights, code."""
    weights = prepared_models.checkpoints(job.run)
    paths = {each.key: weights[each.role].path for each in results.COMPARED if each.role in weights}
    if job.run.save != "none" or not job.run.unlearns:
        paths["unlearned"] = str(job.out / MODEL) if job.run.unlearns else job.run.model.checkpoint.path
    return {
        "records": hashes(job.out / RECORDS, "*"),
        "models": {model: hashes(Path(paths[model]), WEIGHTS) or None if model in paths else None for model in models},
        "code": results.source_hash(),
    }
