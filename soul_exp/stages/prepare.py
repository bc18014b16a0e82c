"""The models that no checkpoint provides are trained: the target, and the one retrained without the forget set."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from soul_exp import build
from soul_exp.artifacts import prepared_models
from soul_exp.artifacts.answer_cache import answer
from soul_exp.artifacts.prepared_models import DONE, Checkpoint, load, tokenizer_of
from soul_exp.data import Item, Part, Template, encode
from soul_exp.distributed import zero3
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import evaluating, likelihoods, texts_of
from soul_exp.files import explain_full_disk, seal
from soul_exp.losses import Objective, Scored
from soul_exp.models import attention, saving, scratch, vocabulary
from soul_exp.models.language_model import LanguageModel
from soul_exp.tasks.task import Task
from soul_exp.training.checkpoints import remove_all, remove_unmarked
from soul_exp.training.schedule import Schedule
from soul_exp.training.train import train

log = logging.getLogger(__name__)


def fit(train: Scored) -> Tensor:
    """The mean NLL per answer token: ordinary fine-tuning."""
    return train.mean_nll.mean()


def worker(rank: int, config: Mapping[str, Any], roles: Sequence[str], device: str) -> float:
    """One process's share of prepare: the role of its rank, made and questioned."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    attention.choose_kernel(config["model"]["attention"])
    role, cache = roles[rank], Path(config["cache"])
    task = build.build_task(config)
    wanted, told = (
        prepared_models.needed(config, task),
        prepared_models.instruction(config) if role == "target" else None,
    )
    if told is not None:
        _check_length(config, task, told)
    seconds = make(config, task, role, cache, device) if role in wanted else 0.0
    place = prepared_models.checkpoints(config, task)[role]
    answer(config, task, place, device, role)
    if told is not None:
        answer(config, task, place, device, "input-based", told)
    return seconds


def make(config: Mapping[str, Any], task: Task, role: str, cache: Path, device: str) -> float:
    """Train the model of `role` into the cache unless it is there; returns the seconds that it took.

    Two jobs that want the same model at once wait for each other; a killed one leaves nothing that looks finished, and
    the next resumes from its last complete checkpoint.
    """
    made_by = prepared_models.needed(config, task)[role]
    folder = prepared_models.folder_of(cache, made_by)
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    partial = folder.with_name(f".{folder.name}.partial")
    halfway = folder.with_name(f".{folder.name}.checkpoints")
    with FileLock(f"{folder}.lock"), explain_full_disk(cache, clear=lambda: remove_unmarked(halfway)):
        if prepared_models.is_ready(folder):
            remove_all(halfway)  # of a job that was killed between the last two lines of this block
            return 0.0
        lm = _start_model(config, task)
        saving.check_saving(lm.model, lm.tokenizer)
        rows = task.target_rows if role == "target" else task.retrained_rows
        settings = dict(config["prepare"])
        outcome = train(
            lm.model,
            lm.reader,
            {"train": (Part.of(rows), lm.encode(rows))},
            objective=Objective(fit, retain_term=None),
            make_optimizer=functools.partial(torch.optim.AdamW, **settings.pop("adamw")),
            seed=settings.pop("seed"),
            schedule=Schedule(
                **settings, gradient_checkpointing=config["train"]["gradient_checkpointing"], dropout=True
            ),
            pad_id=lm.pad_id,
            folder=halfway,
            label=f"prepare {role}",
            device=device,
            compute="prepare",
        )
        if lost := outcome.diverged or _not_finite(lm, rows, config["prepare"]["batch_size"]):
            remove_all(halfway)
            raise UsageError(
                f"prepare {role}: {lost}, and nothing of it is kept: type a prepare.adamw.lr below "
                f"{config['prepare']['adamw']['lr']}"
            )
        shutil.rmtree(partial, ignore_errors=True)
        saving.save(lm.model.cpu(), lm.tokenizer, partial)
        general = prepared_models.is_general(config)
        content = {"recipe": made_by, "seconds": outcome.seconds, "role": role, "general": general}
        seal(partial / DONE, content)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        remove_all(halfway)
    log.info(
        "prepare %s: %d steps on %d rows in %.0f s, last loss %.3f",
        role, outcome.num_steps, len(rows), outcome.seconds, outcome.last["forget_loss"],
    )  # fmt: skip
    return time.perf_counter() - start


def _not_finite(lm: LanguageModel, rows: Sequence[Item], count: int) -> str | None:
    """What of a trained model is not finite: its weights, or the NLL of the first `count` of its `rows`."""
    if not zero3.is_finite(lm.model):
        return "the weights are not finite"
    with evaluating(lm):
        read = likelihoods(lm, rows[:count], batch_size=count)
    return None if all(np.isfinite(row.logp).all() for row in read) else "the NLL of its own rows is not finite"


def _check_length(config: Mapping[str, Any], task: Task, told: str) -> None:
    """Raises UsageError, before anything is trained, if a probe is too long for the model that is `told` something."""
    model = config["model"]
    place = prepared_models.checkpoints(config, task)["target"]
    made = Path(place.path).parent == Path(config["cache"]) / "models"
    tokenizer = _start_tokenizer(config, task) if made else tokenizer_of(model, place)
    items = [item for probe in task.probes.values() for item in texts_of(probe)]
    encode(items, tokenizer, Template(**model["template"], instruction=told), model["max_length"])


def _start_model(config: Mapping[str, Any], task: Task) -> LanguageModel:
    model = config["model"]
    if model["path"]:
        return load(model, Checkpoint(model["path"], model["revision"]))
    tokenizer = _start_tokenizer(config, task)
    fresh = scratch.from_scratch(model["scratch"]["config"], tokenizer, config["prepare"]["seed"])
    return LanguageModel.of(fresh, tokenizer, model["template"], model["max_length"])


def _start_tokenizer(config: Mapping[str, Any], task: Task) -> PreTrainedTokenizerBase:
    """The tokenizer of the prepared models: that of the model they start from, or a new one, of the target's rows."""
    model = config["model"]
    if model["path"]:
        return tokenizer_of(model, Checkpoint(model["path"], model["revision"]))
    template = Template(**model["template"])
    texts = ["".join(template.texts(item)) for item in task.target_rows]
    return vocabulary.train_tokenizer(texts, model["scratch"]["vocab_size"], model["max_length"])
