"""The models that a run starts from and compares: each was given, or is prepared once and cached by its recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from soul_exp.data import Item, content_hash
from soul_exp.distributed import zero3
from soul_exp.errors import UsageError
from soul_exp.evaluation import lm_eval_suite
from soul_exp.files import is_intact
from soul_exp.metrics.answers import SUITE
from soul_exp.models import attention, loading
from soul_exp.models.checkpoint import DONE, UNLEARNED, Checkpoint
from soul_exp.models.language_model import LanguageModel, load_tokenizer
from soul_exp.run import Models, ModelSettings

VERSION = 6  # raise it when a change to preparing, evaluating or training changes weights, answers or numbers
TRAINING = "version of training"  # the key of VERSION among a run's hashes: runs of two versions are not the same


def recipe(models: Models, rows: str, vocabulary: str, number: int) -> dict[str, Any]:
    """All that decides the weights of a model that prepare trains, with the seed prepare.seed + `number`.

    `rows` is the hash of the rows that it is trained on, `vocabulary` of those that a new tokenizer is trained on.
    """
    model = replace(models.model, path=None) if models.measures_only else models.model
    scratch = vars(model.scratch) if model.scratch is not None else None
    described: dict[str, Any] = {"scratch": scratch, "template": dict(model.training_form)}
    described |= {"max_length": model.max_length, **foreign_tokenizer(model)}
    if model.path:
        described |= {"path": model.checkpoint.identity(), "dtype": model.dtype}
    return {
        "version": VERSION,
        "model": described,
        "prepare": {**models.prepare.identity, "seed": models.prepare.seed + number},
        "rows": rows,
        "vocabulary": vocabulary,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def recipes(models: Models) -> dict[str, dict[str, Any]]:
    """role -> recipe, for each model that this run needs and no checkpoint provides.

    With `retrained.seeds` of 2 or more, "retrained_1", ... are retrained models of further seeds.
    """
    if models.measures_only and models.model.scratch is None:
        return {}
    provided = models.target_is_given or models.published is not None
    if provided:
        return {}
    rows = {"target": (vocabulary := _rows_hash(models.task.target_rows))}
    if not (models.retrained or models.retrained_records):
        seeds = range(models.retrained_seeds)
        rows |= dict.fromkeys(map(retrained_role, seeds), _rows_hash(models.task.retrained_rows))
    return {role: recipe(models, trained_on, vocabulary, number_of(role)) for role, trained_on in rows.items()}


def retrained_role(number: int) -> str:
    return f"retrained_{number}" if number else "retrained"


def number_of(role: str) -> int:
    """How much is added to prepare.seed for the model of `role`."""
    return int(role.partition("_")[2] or 0)


def checkpoints(models: Models) -> dict[str, Checkpoint]:
    """role -> where its weights are or will be; a role without weights is absent."""
    found = {role: Checkpoint(str(folder_of(models.cache, made_by))) for role, made_by in recipes(models).items()}
    if models.target_is_given:
        found["target"] = models.model.checkpoint
    elif models.published is not None:
        found["target"] = models.published
    if models.retrained is not None:
        found["retrained"] = models.retrained
    return found


def data_hashes(models: Models) -> dict[str, str]:
    """Hashes of all that a run's numbers depend on: VERSION, the task's rows, recipes, given files and records."""
    found = {TRAINING: str(VERSION), **models.task.hashes}
    # retrained models of further seeds change no number of the unlearned model
    found |= {f"model.{role}": content_hash(by) for role, by in recipes(models).items() if not number_of(role)}
    given = {"base": models.model.checkpoint if models.model.path else None, "retrained": models.retrained}
    found |= {f"model.given_{name}": content_hash(at.identity()) for name, at in given.items() if at is not None}
    if suite := lm_eval_suite.identity(**vars(models.suite)):
        found[SUITE] = content_hash(suite)
    if path := models.retrained_records:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        found["records"] = content_hash([[file.name, file.read_text()] for file in files])
    return found


def folder_of(cache: Path, made_by: Mapping[str, Any]) -> Path:
    """The folder of the model with the recipe `made_by`."""
    return cache / "models" / content_hash(made_by)


def is_ready(folder: Path) -> bool:
    """Whether `folder` holds a prepared model as it was written; a damaged one counts as absent."""
    return (folder / DONE).is_file() and is_intact(folder / DONE)


def exists(models: Models, role: str) -> bool:
    """Whether the model of `role` was given, or is in the cache."""
    checkpoint, made_by = checkpoints(models).get(role), recipes(models).get(role)
    return checkpoint is not None and (made_by is None or is_ready(folder_of(models.cache, made_by)))


def load(
    model: ModelSettings,
    checkpoint: Checkpoint,
    deepspeed: Mapping[str, Any] | None = None,
    may_have_diverged: bool = False,
) -> LanguageModel:
    """The language model in `checkpoint`, with the template and the dtype of `model`.

    Under ZeRO-3, where `deepspeed` configures it, its weights are divided over the ranks as they are read. Raises
    UsageError if it is not causal, or has weights that are not finite unless it `may_have_diverged`.
    """
    tokenizer, path = tokenizer_of(model, checkpoint), checkpoint.path
    loaded = loading.load_model(path, checkpoint.revision, model.dtype, model.attention, deepspeed=deepspeed)
    with zero3.partitioned_loading(deepspeed):
        lm = LanguageModel.of(loaded, tokenizer, model.template, model.max_length)
    if not may_have_diverged and not (Path(path) / UNLEARNED).is_file():
        if name := zero3.nonfinite_weight(lm.model):
            raise UsageError(f"{path} has weights that are not finite numbers ({name}): copy or train it again")
        if model.attention in (*attention.PACKAGES, *attention.GPU_KERNELS):
            loading.move(lm.model, "cuda")
        loading.check_causal(lm.model, path)
    return lm


def tokenizer_of(model: ModelSettings, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer that `model` names, else the checkpoint's own."""
    name = model.tokenizer
    if name is None:
        return load_tokenizer(checkpoint.path, checkpoint.revision)
    return load_tokenizer(name, model.revision if name == model.path else None)


def foreign_tokenizer(model: ModelSettings) -> dict[str, Any]:
    """What identifies a tokenizer that does not come with the checkpoint; empty where it does."""
    name = model.tokenizer
    return {} if name in (None, model.path) else {"tokenizer": Checkpoint(str(name)).identity()}


def _rows_hash(rows: Sequence[Item]) -> str:
    return content_hash([(item.prompt, item.answer, item.raw) for item in rows])
