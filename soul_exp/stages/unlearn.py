"""One rank's share of a run: load the target, unlearn it, put the probes to it; rank 0 writes what came out."""

from __future__ import annotations

import gc
import logging
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from transformers import TrainerCallback, set_seed

from soul_exp import build, compat, files, results
from soul_exp.artifacts import answer_cache, prepared_models
from soul_exp.artifacts.prepared_models import UNLEARNED, Checkpoint
from soul_exp.artifacts.scores import RETAIN, known_answers, measure, not_learnt, validate, validation_metrics, why_null
from soul_exp.build import build_optimizer, parts_of_run
from soul_exp.distributed import ranks, zero3
from soul_exp.files import explain_full_disk
from soul_exp.losses import Objective
from soul_exp.metrics.answers import SUITE, Answers, Scores
from soul_exp.models import attention, loading, lora, saving
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.layers import has_dropout
from soul_exp.models.lora import Lora
from soul_exp.results import Results
from soul_exp.stages.keep_best import Best, note
from soul_exp.stages.wandb_log import Mirror
from soul_exp.tasks import toxicity
from soul_exp.tasks.task import Task
from soul_exp.training import checkpoints
from soul_exp.training.schedule import Schedule
from soul_exp.training.train import Outcome, train

log = logging.getLogger(__name__)

DROPOUT = (
    "train.dropout=true: the model is trained with dropout, its frozen start computed without: losses do not start at "
    "the values that docs/losses.md states (KL above 0)"
)
MODEL, RECORDS, CHECKPOINTS, LOSSES = "model", "records", "checkpoints", "train.jsonl"


def worker(
    rank: int,
    config: Mapping[str, Any],
    reasons: Mapping[str, str],
    fingerprint: str,
    seconds: dict[str, float],
    folder: str,
    trials: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Unlearn and evaluate, as `config["stages"]` says, and write results.json to `folder`; `trials` go into it."""
    out = Path(folder)
    with explain_full_disk(out, clear=lambda: checkpoints.remove_unmarked(out / CHECKPOINTS)):
        first = rank == 0
        device = start_process(config, rank)
        task = build.build_task(config)
        mirror = Mirror(config, out) if first else None
        subject, outcome = _unlearned(config, task, fingerprint, out, device, first, mirror)
        seconds["unlearn"] = outcome.seconds if outcome else 0.0
        if "evaluate" in config["stages"]:
            start = time.perf_counter()
            sound = zero3.is_finite(subject.model)  # else no question can be put to it
            answers = answer_cache.examined(subject, config, task, "unlearned") if sound else {}
            seconds["evaluate"] = time.perf_counter() - start
            if first:
                log.info("evaluate unlearned: %d probes in %.0f s", len(task.probes), seconds["evaluate"])
                answer_cache.write_answers(out / RECORDS, answers)
                found = _results(config, task, reasons, answers, outcome, seconds, device, trials)
                results.write(out, found)
                assert mirror is not None
                mirror.finish(found)
                checkpoints.remove_all(out / CHECKPOINTS)
        end_process()


def start_process(config: Mapping[str, Any], rank: int) -> str:
    """Threads, seeds, device and, where there are several ranks, their process group; returns the device."""
    compute = config["compute"]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    set_seed(config["seed"])
    attention.choose_kernel(config["model"]["attention"])
    device = "cpu"
    if compute["device"] == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    if compute["deepspeed"]:
        compat.skip_shared_memory_operator()
    if compute["processes"] > 1:
        ranks.start_group(device)
    return device


def end_process() -> None:
    """Leave the process group, where there is one, together."""
    ranks.barrier()
    ranks.leave_group()


def _unlearned(
    config: Mapping[str, Any], task: Task, fingerprint: str, out: Path, device: str, first: bool, mirror: Mirror | None
) -> tuple[LanguageModel, Outcome | None]:
    """The model to measure, and how its training ended: unlearned now, or before this run was killed, or given."""
    model, done = config["model"], out / MODEL / UNLEARNED
    if "unlearn" not in config["stages"]:
        subject = prepared_models.load(
            model, Checkpoint(model["path"], model["revision"]), config["compute"]["deepspeed"]
        )
        loading.move(subject.model, device)
        return subject, None
    before = ranks.broadcast(lambda: files.read_intact(done) if done.is_file() else None)
    if before and before["fingerprint"] == fingerprint:
        log.info("unlearn: done before, reading %s", out / MODEL)
        subject = prepared_models.load(model, Checkpoint(str(out / MODEL)), config["compute"]["deepspeed"])
        loading.move(subject.model, device)
        return subject, Outcome(**before["outcome"])

    best: list[Best] = []

    def callbacks(subject: LanguageModel) -> list[TrainerCallback]:
        if config["save"] == "best":
            best.append(_best(config, task, subject, out / CHECKPOINTS / fingerprint, first))
        return [*([mirror.callback()] if mirror else []), *best]

    subject, outcome = trained(
        config,
        task,
        folder=out / CHECKPOINTS / fingerprint,
        label="unlearn",
        records=out / LOSSES,
        device=device,
        callbacks=callbacks,
    )
    log.info(
        "unlearn: %d steps in %.0f s (%.2f s/step), peak %.2f GiB%s",
        outcome.num_steps, outcome.seconds, outcome.seconds / max(1, outcome.num_steps), peak_memory_gib(device),
        f"; diverged: {outcome.diverged}" if outcome.diverged else "",
    )  # fmt: skip
    for judge in best:
        if judge.seen != outcome.num_steps:  # it ended before its time
            judge.judge(outcome.num_steps)
        moment = judge.leader()
        assert moment is not None
        kept = Checkpoint(str(judge.place(moment)))
        subject = prepared_models.load(model, kept, config["compute"]["deepspeed"], may_have_diverged=True)
        loading.move(subject.model, device)
        said = note(moment, outcome.num_steps)
        log.info("%s", said)
        outcome = replace(outcome, notes=[*outcome.notes, said])
    if config["adapter"] and config["adapter"]["merge"]:
        subject = subject.with_model(lora.merged(subject.model))
    if config["save"] != "none":
        if first:
            shutil.rmtree(out / MODEL, ignore_errors=True)
        saving.save(subject.model, subject.tokenizer, out / MODEL, first)
        if first:
            content = {
                "fingerprint": fingerprint,
                "general": prepared_models.is_general(config),
                "outcome": vars(outcome),
            }
            files.seal(done, content)
    return subject, outcome


def _best(config: Mapping[str, Any], task: Task, subject: LanguageModel, folder: Path, first: bool) -> Best:
    """What keeps the best weights of `subject` while it is trained."""
    known = known_answers(config, task)
    start = measure(validation_metrics(config)[RETAIN], known["original"], known["retrained"])
    assert start is not None  # check saw to it
    return Best(
        folder,
        config["best_keep"] * start,
        validate=lambda: validate(config, task, subject, "best"),
        save=lambda place: saving.save(subject.model, subject.tokenizer, place, first),
        first=first,
    )


def trained(
    config: Mapping[str, Any],
    task: Task,
    *,
    folder: Path,
    label: str,
    device: str,
    records: Path | None = None,
    callbacks: Callable[[LanguageModel], Sequence[TrainerCallback]] = lambda subject: (),
) -> tuple[LanguageModel, Outcome]:
    """The target, unlearned as `config` says from its loss to its seed, and how that ended; checkpoints in `folder`."""
    start = prepared_models.start_of(config, task)
    subject = prepared_models.load(config["model"], start, config["compute"]["deepspeed"])
    saving.check_saving(subject.model, subject.tokenizer)
    random = config["train"]["dropout"] and has_dropout(subject.model)
    adapter: Lora | None = hydra.utils.instantiate(config["adapter"], _convert_="all")
    if adapter is not None:
        subject = subject.with_model(adapter.wrapped(subject.model, config["seed"], start.revision))
    objective: Objective = hydra.utils.instantiate(config["loss"], _convert_="all")
    make_optimizer = build_optimizer(config)
    names = parts_of_run(objective, make_optimizer, task)
    leader = sorted(names, key=lambda name: name == "retain")  # epochs count passes over what is to be forgotten
    parts = {name: task.parts[name] for name in leader}
    outcome = train(
        subject.model,
        subject.reader,
        {name: (part, subject.encode([item for row in part.rows for item in row])) for name, part in parts.items()},
        objective=objective,
        make_optimizer=make_optimizer,
        schedule=Schedule(**config["train"]),
        seed=config["seed"],
        pad_id=subject.pad_id,
        folder=folder,
        label=label,
        records=records,
        device=device,
        deepspeed=config["compute"]["deepspeed"],
        processes=config["compute"]["processes"],
        callbacks=callbacks(subject),
        compute=config["choices"]["compute"],
        resume=config["resume"],
    )
    if random:
        log.warning("%s: %s", label, DROPOUT)
        outcome = replace(outcome, notes=[*outcome.notes, DROPOUT])
    subject.model.zero_grad(set_to_none=True)
    gc.collect()  # the trainer, its optimizer and its engine refer to each other: questions need their memory
    return subject, outcome


def _results(
    config: Mapping[str, Any],
    task: Task,
    reasons: Mapping[str, str],
    answers: Mapping[str, Answers | Scores],
    outcome: Outcome | None,
    seconds: Mapping[str, float],
    device: str,
    trials: Sequence[Mapping[str, Any]],
) -> Results:
    metrics = {name: hydra.utils.instantiate(entry) for name, entry in config["task"]["metrics"].items()}
    by_model = {"unlearned": answers, **known_answers(config, task)}
    suites: dict[str, Any] = {model: given[SUITE] for model, given in by_model.items() if SUITE in given}
    retrained = by_model.get("retrained")
    wanted = {name: metric for name, metric in metrics.items() if name not in reasons}
    found = {
        model: {name: measure(metric, given, retrained) for name, metric in wanted.items()}
        for model, given in by_model.items()
    }
    diverged = (outcome.diverged if outcome else None) or _not_finite(answers, found["unlearned"])
    null: dict[str, str] = {}
    for model, values in found.items():
        for name, value in values.items():
            if why := why_null(wanted[name], value, by_model[model], retrained):
                of_unlearned = f"diverged: {diverged}" if diverged else why
                null |= {name: of_unlearned} if model == "unlearned" else {f"{model}.{name}": why}
                values[name] = None
    measured = {model: {name: values.get(name) for name in metrics} for model, values in found.items()}
    notes = [*task.notes, *(outcome.notes if outcome else ())]
    if little := not_learnt(task.learnt, measured.get("original", {})):
        notes.append(little)
    used = toxicity.report(task.scorer, Path(config["cache"]), device) if task.scorer is not None else None
    return Results(
        name=config["name"],
        status="diverged" if diverged else "finished",
        reason=diverged,
        caption=task.caption,
        choices=config["choices"],
        tuned=config["tuned"],
        config=config,
        metrics=measured,
        reasons={**null, **reasons},
        suite=suites,
        training=dict(outcome.last) if outcome else {},
        notes=[*notes, *([toxicity.note(used)] if used else ())],
        scorer=used,
        trials=trials,
        num_steps=outcome.num_steps if outcome else 0,
        seconds=dict(seconds),
        peak_memory_gib=peak_memory_gib(device),
        seeds={"seed": config["seed"], "prepare.seed": config["prepare"]["seed"]},
        data_hashes=prepared_models.hashes(config, task),
        commit=results.commit(Path(__file__).parent),
        versions=results.versions(),
        forget_quality=measured["unlearned"].get("forget_quality"),
        utility=measured["unlearned"].get("utility"),
        mia_auc=measured["unlearned"].get("mia_auc"),
    )


def _not_finite(answers: Mapping[str, Answers | Scores], unlearned: Mapping[str, float | None]) -> str | None:
    """What of the unlearned model is not finite: its weights, since no question was put to it, or a metric."""
    if not answers:
        return "the weights are not finite"
    broken = (name for name, value in unlearned.items() if value is not None and not math.isfinite(value))
    return next((f"the metric {name} is {unlearned[name]}" for name in broken), None)


def peak_memory_gib(device: str) -> float:
    """The most memory that this process has held, in GiB: of the device, or resident where there is none."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
