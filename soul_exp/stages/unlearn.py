"""The stage that unlearns: from the target, or what an earlier request left of it, to the model in the run's folder."""

import functools
import gc
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import TrainerCallback

from soul_exp.artifacts import prepared_models
from soul_exp.artifacts.scores import validate, validation_of_target
from soul_exp.distributed.ranks import broadcast
from soul_exp.errors import counted
from soul_exp.files import read_intact, seal
from soul_exp.models import lora, saving
from soul_exp.models.checkpoint import UNLEARNED, Checkpoint
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.layers import has_dropout
from soul_exp.run import Run
from soul_exp.stages.process import peak_memory_gib
from soul_exp.stages.selection import KeepBest
from soul_exp.stages.stage import CHECKPOINTS, LOSSES, MODEL, RankJob
from soul_exp.stages.trajectory import NAME as TRAJECTORY
from soul_exp.stages.trajectory import ByStep, Trajectory
from soul_exp.training.train import Outcome, train

log = logging.getLogger(__name__)

DROPOUT = (
    "train.dropout=true: the model is trained with dropout, its frozen start computed without: losses do not start at "
    "the values that docs/losses.md states (KL above 0)"
)


def unlearn(job: RankJob) -> RankJob:
    """`job` with the unlearned model and the outcome of its training: trained now, or before this run was killed."""
    run, done = job.run, job.out / MODEL / UNLEARNED
    before = broadcast(lambda: read_intact(done) if done.is_file() else None)
    if before and before["fingerprint"] == job.fingerprint:
        log.info("unlearn: done before, reading %s", job.out / MODEL)
        return replace(job, lm=job.load(Checkpoint(str(job.out / MODEL))), outcome=Outcome(**before["outcome"]))

    best: list[KeepBest] = []
    folder = job.out / CHECKPOINTS / job.fingerprint

    def callbacks(lm: LanguageModel) -> list[TrainerCallback]:
        validated = ByStep(lambda: validate(run, lm, "unlearn"))
        if run.save == "best":
            best.append(
                KeepBest(
                    folder=folder,
                    start=validation_of_target(run, job.reasons),
                    validated=validated,
                    save=functools.partial(saving.save, lm.model, lm.tokenizer, first=job.first),
                    first=job.first,
                    keep=run.best_keep,
                    s_mia=run.best_s_mia,
                )
            )
        watched: list[TrainerCallback] = []
        if every := run.evaluation.every:
            watched.append(Trajectory(every, job.out / TRAJECTORY, validated, job.first))
        return [*watched, *([job.wandb_log] if job.wandb_log else []), *best]

    lm, outcome = unlearned(
        run, folder=folder, label="unlearn", records=job.out / LOSSES, device=job.device, callbacks=callbacks
    )
    log.info(
        "unlearn: %s in %.0f s (%.2f s/step), peak %.2f GiB%s",
        counted(outcome.num_steps, "step"), outcome.seconds, outcome.seconds / max(1, outcome.num_steps),
        peak_memory_gib(job.device), f"; diverged: {outcome.diverged}" if outcome.diverged else "",
    )  # fmt: skip
    for keeper in best:
        kept, note = keeper.end(outcome.num_steps)
        lm = job.load(Checkpoint(str(kept)), may_have_diverged=True)
        outcome = replace(outcome, notes=[*outcome.notes, note])
    if "evaluate" not in run.stages:  # else the results have the notes
        for note in outcome.notes:
            log.info("unlearn: %s", note)
    if run.adapter and run.adapter.merge:
        lm = lm.with_model(lora.merged(lm.model))
    if run.save != "none":
        if job.first:
            shutil.rmtree(job.out / MODEL, ignore_errors=True)
        saving.save(lm.model, lm.tokenizer, job.out / MODEL, job.first)
        if job.first:
            seal(done, {"fingerprint": job.fingerprint, "general": run.general, "outcome": vars(outcome)})
    return replace(job, lm=lm, outcome=outcome)


def unlearned(
    run: Run,
    *,
    folder: Path,
    label: str,
    device: str,
    records: Path | None = None,
    callbacks: Callable[[LanguageModel], Sequence[TrainerCallback]] = lambda lm: (),
) -> tuple[LanguageModel, Outcome]:
    """The model that `run` unlearns, and how its training ended; checkpoints go to `folder`, step logs to `records`."""
    start = run.start or prepared_models.checkpoints(run)["target"]
    lm = prepared_models.load(run.model, start, run.compute.deepspeed)
    saving.check_saving(lm.model, lm.tokenizer)
    notes = [DROPOUT] if run.schedule.dropout and has_dropout(lm.model) else []
    if run.adapter is not None:
        lm = lm.with_model(run.adapter.wrapped(lm.model, run.seed, start.revision))
        if run.model.path and not Path(run.model.path).is_dir():  # of the hub; otherwise the check has said it
            notes.append(lora.coverage(lm.model))
    in_order = sorted(run.parts, key=lambda name: name == "retain")  # epochs count passes over what is to be forgotten
    parts = {name: run.task.parts[name] for name in in_order}
    outcome = train(
        lm.model,
        lm.reader,
        {name: (part, lm.encode([item for row in part.rows for item in row])) for name, part in parts.items()},
        objective=run.objective,
        make_optimizer=run.make_optimizer,
        schedule=run.schedule,
        seed=run.seed,
        pad_id=lm.pad_id,
        folder=folder,
        label=label,
        records=records,
        device=device,
        deepspeed=run.compute.deepspeed,
        processes=run.compute.processes,
        callbacks=callbacks(lm),
        compute=run.compute.name,
        resume=run.resume,
    )
    outcome = replace(outcome, notes=[*outcome.notes, *notes])
    lm.model.zero_grad(set_to_none=True)
    gc.collect()  # the trainer, its optimizer and its engine refer to each other: evaluation needs their memory
    return lm, outcome
