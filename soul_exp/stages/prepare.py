"""The models that no checkpoint provides are trained: the target, and the one retrained without the forget set."""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from soul_exp.artifacts import answer_cache, prepared_models, texts
from soul_exp.build import Config, build_models
from soul_exp.data import Item, Part
from soul_exp.distributed import zero3
from soul_exp.distributed.processes import launch
from soul_exp.errors import UsageError, counted
from soul_exp.evaluation.probing import evaluating, likelihoods
from soul_exp.files import complete_folder, explain_full_disk, locked, remove, seal, shared_folder
from soul_exp.models import attention, loading, saving
from soul_exp.models.checkpoint import DONE
from soul_exp.models.language_model import LanguageModel
from soul_exp.results import COMPARED
from soul_exp.run import Models
from soul_exp.stages.stage import Job, check_unchanged
from soul_exp.training.checkpoints import remove_all, remove_unmarked
from soul_exp.training.train import FINE_TUNING, train

log = logging.getLogger(__name__)


def prepare(job: Job) -> Job:
    """Make and evaluate the target and the retrained models that the cache does not have."""
    compute = job.run.compute
    if roles := unprepared(job.run):
        number = at_once(job.run, compute.device, roles)
        shares = [roles[first::number] for first in range(number)]
        launch(
            worker, job.config, dict(job.run.task.hashes), shares, compute.device,
            processes=number, threads=compute.threads, logs=job.out / "ranks" / "prepare", alone=True,
        )  # fmt: skip
    return job


def at_once(models: Models, device: str, roles: Sequence[str]) -> int:
    """How many of `roles` are made side by side: a checkpoint may be as large as a GPU, which all would share."""
    return 1 if device == "cuda" and models.model.path else len(roles)


def unprepared(models: Models) -> list[str]:
    """The roles that still have to be made, or evaluated, before this run's other stages can begin."""
    checkpoints = prepared_models.checkpoints(models)
    if "prepare" not in models.stages:  # nothing is trained, but what exists may still have to answer
        exist = [role for role in checkpoints if role != "target" and prepared_models.exists(models, role)]
        checkpoints = {role: checkpoints[role] for role in exist}
    wanted = [(each.role, models.system_prompt if each.with_system_prompt else None) for each in COMPARED]
    wanted += [(role, None) for role in checkpoints if prepared_models.number_of(role)]
    return [
        role
        for role, checkpoint in checkpoints.items()
        if any(answer_cache.cached_folder(models, checkpoint, prompt) is None for of, prompt in wanted if of == role)
    ]


def worker(rank: int, config: Config, hashes: Mapping[str, str], shares: Sequence[Sequence[str]], device: str) -> None:
    """One process's share of prepare: the roles of its rank, made and evaluated one after the other."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    models = build_models(config)
    check_unchanged(hashes, models.task)
    attention.choose_kernel(models.model.attention)
    if not texts.are_here(models):  # else they have been checked
        texts.check(models)
    for role in shares[rank]:
        _make_and_evaluate(models, role, device)


def _make_and_evaluate(models: Models, role: str, device: str) -> None:
    system_prompt = models.system_prompt if role == "target" else None
    for needed in (role, "target"):  # under which all generated texts are scored: waits for the process that makes it
        if needed in prepared_models.recipes(models):
            make(models, needed, device)
    checkpoint = prepared_models.checkpoints(models)[role]
    answer_cache.fill(models, checkpoint, device, role)
    if system_prompt is not None:
        answer_cache.fill(models, checkpoint, device, "input-based", system_prompt)


def make(models: Models, role: str, device: str) -> None:
    """Train the model of `role` into the cache unless it is there.

    Two jobs that want the same model at once wait for each other; a killed one leaves nothing that looks finished, and
    the next resumes from its last complete checkpoint.
    """
    task, settings = models.task, models.prepare
    made_by = prepared_models.recipes(models)[role]
    seed = settings.seed + prepared_models.number_of(role)
    folder = prepared_models.folder_of(models.cache, made_by)
    halfway = folder.with_name(f".{folder.name}.checkpoints")
    if prepared_models.is_ready(folder):
        remove_all(halfway)  # of a job that was killed between the last two lines of the block below
        return
    shared_folder(folder.parent)
    if halfway.exists() and not os.access(halfway, os.W_OK):  # of another user, whose job was killed
        halfway = halfway.with_name(f"{halfway.name}.{os.getuid()}")
    with locked(Path(f"{folder}.lock")), explain_full_disk(models.cache, clear=lambda: remove_unmarked(halfway)):
        if prepared_models.is_ready(folder):
            return
        remove(folder)  # it is damaged, or not there
        lm = _start_model(models, seed)
        saving.check_saving(lm.model, lm.tokenizer)
        rows = task.target_rows if role == "target" else task.retrained_rows
        outcome = train(
            lm.model,
            lm.reader,
            {"train": (Part.of(rows), lm.encode(rows))},
            objective=FINE_TUNING,
            make_optimizer=functools.partial(torch.optim.AdamW, **settings.adamw),
            seed=seed,
            schedule=settings.schedule,
            pad_id=lm.pad_id,
            folder=halfway,
            label=f"prepare {role}",
            device=device,
            compute="prepare",
        )
        for note in outcome.notes:
            log.warning("prepare %s: %s", role, note)
        if lost := outcome.diverged or _not_finite(lm, rows, settings.schedule.batch_size):
            remove_all(halfway)
            raise UsageError(
                f"prepare {role}: {lost}, and nothing of it is kept: type a prepare.adamw.lr below "
                f"{settings.adamw['lr']}"
            )
        with complete_folder(folder) as partial:
            saving.save(lm.model.cpu(), lm.tokenizer, partial)
            content = {"recipe": made_by, "seconds": outcome.seconds, "role": role, "general": models.general}
            seal(partial / DONE, content)
        remove_all(halfway)
    log.info(
        "prepare %s: %s on %s in %.0f s, last loss %.3f",
        role, counted(outcome.num_steps, "step"), counted(len(rows), "row"), outcome.seconds,
        outcome.last["forget_loss"],
    )  # fmt: skip


def _not_finite(lm: LanguageModel, rows: Sequence[Item], count: int) -> str | None:
    """What of a trained model is not finite: its weights, or the NLL of the first `count` of its `rows`."""
    if not zero3.is_finite(lm.model):
        return "the weights are not finite"
    with evaluating(lm):
        read = likelihoods(lm, rows[:count], batch_size=count)
    return None if all(np.isfinite(row.logp).all() for row in read) else "the NLL of its own rows is not finite"


def _start_model(models: Models, seed: int) -> LanguageModel:
    model = models.model
    if model.path:
        return prepared_models.load(model, model.checkpoint)
    assert model.scratch is not None
    tokenizer = texts.start_tokenizer(models)
    fresh = loading.from_scratch(model.scratch.config, tokenizer, seed)
    return LanguageModel.of(fresh, tokenizer, model.template, model.max_length)
