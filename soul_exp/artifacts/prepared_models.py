"""The models that a run starts from and is judged by: what decides their weights, where they are, how they are loaded.

Each is a folder or a hub name that was given, or is prepared and cached by its recipe, so that a sweep trains it once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from soul_exp.data import Item, content_hash
from soul_exp.distributed import zero3
from soul_exp.evaluation import lm_eval_suite
from soul_exp.files import is_intact, read_intact, read_sealed
from soul_exp.metrics.answers import SUITE
from soul_exp.models import attention, checking, loading, lora, vocabulary
from soul_exp.models.language_model import LanguageModel
from soul_exp.tasks.task import Task

VERSION = 4  # raise it when a change to preparing, asking or training changes prepared weights, answers or numbers
TRAINING = "version of training"  # the key of VERSION among a run's hashes: runs of two versions are not the same
DONE = "prepared.json"  # beside the weights of a model that prepare made
UNLEARNED = "unlearned.json"  # beside those of a model that a run of ours unlearned
NO_NUMBER = ("logging_steps", "save_steps")  # settings of `prepare` that change no weight


@dataclass(frozen=True)
class Checkpoint:
    """A model to load: `path` is a folder or a hub name."""

    path: str
    revision: str | None = None

    def identity(self) -> Any:
        """What decides the weights: our own folders are named by their recipe, others told apart by their files."""
        folder = Path(self.path)
        if not folder.is_dir():
            return [self.path, self.revision]
        sealed = isinstance(read_sealed(folder / DONE), dict)  # not where an earlier version made it
        if sealed and (prepared := read_intact(folder / DONE)):
            return prepared["recipe"]
        files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(folder.glob("*")) if f.is_file()]
        return [*files, Checkpoint(*lora.base_of(folder)).identity()] if lora.is_adapter(self.path) else files


def instruction(config: Mapping[str, Any]) -> str | None:
    """What the target is told before each question for the input-based baseline; None where that is not measured."""
    return config["task"]["system_prompt"] if config.get("input_based") else None


def baseline(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """What decides the prompts of the input-based baseline, or None where it is not measured."""
    told = instruction(config)
    return None if told is None else (told, config["model"]["template"]["system"])


def recipe(
    model: Mapping[str, Any], settings: Mapping[str, Any], rows: Sequence[Item], vocabulary: Sequence[Item]
) -> dict[str, Any]:
    """All that decides a prepared model's weights. `vocabulary` are the rows that a new tokenizer is trained on."""
    described = {"scratch": model["scratch"], "template": form(model), "max_length": model["max_length"]}
    described |= foreign_tokenizer(model)
    if model["path"]:
        described |= {"path": Checkpoint(model["path"], model["revision"]).identity(), "dtype": model["dtype"]}
    return {
        "version": VERSION,
        "model": described,
        "prepare": {key: value for key, value in settings.items() if key not in NO_NUMBER},
        "rows": content_hash([(item.prompt, item.answer, item.raw) for item in rows]),
        "vocabulary": content_hash([(item.prompt, item.answer, item.raw) for item in vocabulary]),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def needed(config: Mapping[str, Any], task: Task) -> dict[str, dict[str, Any]]:
    """The recipes of the models that `config` needs and no checkpoint provides: role -> recipe.

    Where a checkpoint is only measured, `model.path` names that one, and says nothing of what the two were made from.
    """
    model = config["model"]
    if config["stages"] == ["evaluate"]:
        model = {**model, "path": None}
        if not model["scratch"]:
            return {}
    rows = {"target": task.target_rows, "retrained": task.retrained_rows}
    given = {
        "target": is_given(config, task) or published_target(config) is not None,
        "retrained": bool(
            is_given(config, task)
            or config["retrained"]["path"]
            or config["retrained"]["records"]
            or published_target(config)
        ),
    }
    return {role: recipe(model, config["prepare"], rows[role], task.target_rows) for role in rows if not given[role]}


def is_given(config: Mapping[str, Any], task: Task) -> bool:
    """Whether model.path is the target as it is; where a checkpoint is only measured, it names that one."""
    return task.trained_before and config["stages"] != ["evaluate"]


def published_target(config: Mapping[str, Any]) -> Checkpoint | None:
    """The published checkpoint that is the target already, if the model names one for this task, source and base."""
    entry = (config["model"]["published"] or {}).get(config["choices"]["task"])
    if entry is None or entry["base"] != config["model"]["path"] or entry["source"] != config["task"]["source"]:
        return None
    return Checkpoint(entry["path"], entry["revision"])


def checkpoints(config: Mapping[str, Any], task: Task) -> dict[str, Checkpoint]:
    """role -> where its weights are or will be; a role whose weights are not to be had is absent."""
    cache, found = Path(config["cache"]), {}
    for role, made_by in needed(config, task).items():
        found[role] = Checkpoint(str(folder_of(cache, made_by)))
    published = published_target(config)
    if is_given(config, task):
        found["target"] = Checkpoint(config["model"]["path"], config["model"]["revision"])
    elif published is not None:
        found["target"] = published
    if config["retrained"]["path"]:
        found["retrained"] = Checkpoint(config["retrained"]["path"], config["retrained"]["revision"])
    return found


def start_of(config: Mapping[str, Any], task: Task) -> Checkpoint:
    """What unlearning starts from: the target, or what an earlier request of the same sequence left of it."""
    return Checkpoint(config["start"]) if config.get("start") else checkpoints(config, task)["target"]


def is_taught(path: str) -> bool:
    """Whether the checkpoint in `path` was made by this program, with general questions in its training.

    Of earlier versions, which did not write that down, every one was.
    """
    markers = [_content(Path(path).expanduser() / name) for name in (DONE, UNLEARNED)]
    return any(isinstance(marker, dict) and marker.get("general", True) for marker in markers)


def _content(marker: Path) -> Any:
    """The JSON in `marker`, checked or not; None if there is none."""
    try:
        return json.loads(marker.read_bytes())
    except (OSError, ValueError):
        return None


def is_general(config: Mapping[str, Any]) -> bool:
    """Whether the model of `config` has general questions in its training, this run's or a former one's."""
    trains = config["stages"] != ["evaluate"] and bool(config["task"].get("train_general"))
    return trains or (config["model"]["path"] is not None and is_taught(config["model"]["path"]))


def hashes(config: Mapping[str, Any], task: Task) -> dict[str, str]:
    """What is behind a run's numbers: VERSION, the task's rows, recipes of prepared models, given files and records."""
    found = {TRAINING: str(VERSION), **task.hashes()}
    found |= {f"model.{role}": content_hash(made_by) for role, made_by in needed(config, task).items()}
    for name, section in (("base", "model"), ("retrained", "retrained")):
        if config[section]["path"]:
            given = Checkpoint(config[section]["path"], config[section]["revision"])
            found[f"model.given_{name}"] = content_hash(given.identity())
    if asked := lm_eval_suite.identity(**lm_eval_suite.asked(config)):
        found[SUITE] = content_hash(asked)
    if config["retrained"]["records"]:
        path = Path(config["retrained"]["records"])
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        found["records"] = content_hash([[file.name, file.read_text()] for file in files])
    return found


def folder_of(cache: Path, made_by: Mapping[str, Any]) -> Path:
    return cache / "models" / content_hash(made_by)


def is_ready(folder: Path) -> bool:
    """Whether `folder` holds a prepared model as it was written; a damaged one is as good as absent."""
    return (folder / DONE).is_file() and is_intact(folder / DONE)


def load(
    model: Mapping[str, Any],
    checkpoint: Checkpoint,
    deepspeed: Mapping[str, Any] | None = None,
    may_have_diverged: bool = False,
) -> LanguageModel:
    """The language model in `checkpoint`, with the template and the dtype of the configuration `model`.

    Under ZeRO-3, as `deepspeed` may say, its weights are divided over the ranks as they are read. Raises UsageError if
    it is not causal or has weights that are not finite; of what a run unlearned, which `may_have_diverged`, the
    results report that.
    """
    tokenizer, path = tokenizer_of(model, checkpoint), checkpoint.path
    loaded = loading.load_model(path, checkpoint.revision, model["dtype"], model["attention"], deepspeed=deepspeed)
    with zero3.partitioned_loading(deepspeed):
        lm = LanguageModel.of(loaded, tokenizer, model["template"], model["max_length"])
    if not may_have_diverged and not (Path(path) / UNLEARNED).is_file():
        checking.check_finite(lm.model, path)
        if attention.needs_gpu(model["attention"]):
            loading.move(lm.model, "cuda")
        checking.check_causal(lm.model, path)
    return lm


def tokenizer_of(model: Mapping[str, Any], checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer that the configuration `model` names, else the checkpoint's own."""
    name = model.get("tokenizer")
    if name is None:
        return vocabulary.load_tokenizer(checkpoint.path, checkpoint.revision)
    return vocabulary.load_tokenizer(name, model["revision"] if name == model["path"] else None)


def form(model: Mapping[str, Any]) -> dict[str, str]:
    """The part of the model's template that training reads."""
    return {key: model["template"][key] for key in ("prompt", "answer") if key in model["template"]}


def foreign_tokenizer(model: Mapping[str, Any]) -> dict[str, Any]:
    """What tells apart the tokenizer that is used for checkpoints which come without one; empty where it is theirs."""
    name = model.get("tokenizer")
    return {} if name in (None, model.get("path")) else {"tokenizer": Checkpoint(name).identity()}
