"""The models that unlearning starts from and is judged by: the target, and the one retrained without the forget set.

Both are cached by a hash of everything that decides their weights, so a sweep trains them once; so are their answers.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra.utils
import torch
import transformers
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from soul_exp import adapters, attention, models, shards, suite
from soul_exp.answers import SUITE, Answers, Scores, read_records, write_records
from soul_exp.checkpoints import remove_all, remove_unmarked
from soul_exp.data import Item, Part, Template, content_hash, encode
from soul_exp.evaluate import ask, texts_of
from soul_exp.fulldisk import full_disk_told
from soul_exp.losses import Objective, Scored
from soul_exp.models import LanguageModel
from soul_exp.results import write_json
from soul_exp.schedule import Schedule
from soul_exp.tasks.task import Task
from soul_exp.toxicity import with_toxicity
from soul_exp.training import train

log = logging.getLogger(__name__)

VERSION = 3  # raise it when a change to this module or the trainer changes prepared weights or answers
DONE = "prepared.json"
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
        if (folder / DONE).is_file():
            return json.loads((folder / DONE).read_text())["recipe"]
        files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(folder.glob("*")) if f.is_file()]
        return [*files, Checkpoint(*adapters.base_of(folder)).identity()] if adapters.is_adapter(self.path) else files


def fit(train: Scored) -> Tensor:
    """The mean NLL per answer token: ordinary fine-tuning."""
    return train.mean_nll.mean()


def recipe(
    model: Mapping[str, Any], settings: Mapping[str, Any], rows: Sequence[Item], vocabulary: Sequence[Item]
) -> dict[str, Any]:
    """All that decides a prepared model's weights. `vocabulary` are the rows that a new tokenizer is trained on."""
    described = {"scratch": model["scratch"], "template": _form(model), "max_length": model["max_length"]}
    described |= _foreign_tokenizer(model)
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


def _form(model: Mapping[str, Any]) -> dict[str, str]:
    """The part of the model's template that training reads."""
    return {key: model["template"][key] for key in ("prompt", "answer") if key in model["template"]}


def _foreign_tokenizer(model: Mapping[str, Any]) -> dict[str, Any]:
    """What tells apart the tokenizer that is used for checkpoints which come without one; empty where it is theirs."""
    name = model.get("tokenizer")
    return {} if name in (None, model.get("path")) else {"tokenizer": Checkpoint(name).identity()}


def instruction(config: Mapping[str, Any]) -> str | None:
    """What the target is told before each question for the input-based baseline; None where that is not measured."""
    return config["task"]["system_prompt"] if config.get("input_based") else None


def baseline(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """What decides the prompts of the input-based baseline, or None where it is not measured."""
    told = instruction(config)
    return None if told is None else (told, config["model"]["template"]["system"])


def recipes(config: Mapping[str, Any], task: Task) -> dict[str, dict[str, Any]]:
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


def hashes(config: Mapping[str, Any], task: Task) -> dict[str, str]:
    """The content behind a run: the task's rows, recipes of prepared models, files of given ones and of records."""
    found = task.hashes()
    found |= {f"model.{role}": content_hash(made_by) for role, made_by in recipes(config, task).items()}
    for name, section in (("base", "model"), ("retrained", "retrained")):
        if config[section]["path"]:
            given = Checkpoint(config[section]["path"], config[section]["revision"])
            found[f"model.given_{name}"] = content_hash(given.identity())
    if asked := suite.identity(**suite.asked(config)):
        found[SUITE] = content_hash(asked)
    if config["retrained"]["records"]:
        path = Path(config["retrained"]["records"])
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        found["records"] = content_hash([[file.name, file.read_text()] for file in files])
    return found


def published_target(config: Mapping[str, Any]) -> Checkpoint | None:
    """The published checkpoint that is the target already, if the model names one for this task, source and base."""
    entry = (config["model"]["published"] or {}).get(config["choices"]["task"])
    if entry is None or entry["base"] != config["model"]["path"] or entry["source"] != config["task"]["source"]:
        return None
    return Checkpoint(entry["path"], entry["revision"])


def folder_of(cache: Path, made_by: Mapping[str, Any]) -> Path:
    return cache / "models" / content_hash(made_by)


def is_ready(folder: Path) -> bool:
    return (folder / DONE).is_file()


def answers_folder(config: Mapping[str, Any], checkpoint: Checkpoint, task: Task, told: str | None = None) -> Path:
    """Where the answers of `checkpoint` to probes and utility suite are kept; their batch size does not matter.

    `told` is the instruction under which it gave them.
    """
    model = config["model"]
    key: dict[str, Any] = {
        "version": VERSION,
        "model": checkpoint.identity(),
        "template": _form(model),
        **_foreign_tokenizer(model),
        **({"told": [model["template"]["system"], told]} if told is not None else {}),
        "max_length": model["max_length"],
        "dtype": model["dtype"],
        "max_new_tokens": config["evaluate"]["max_new_tokens"],
        "probes": {name: value for name, value in task.hashes().items() if name.startswith(("probe.", "scorer"))},
    }
    if asked := suite.identity(**suite.asked(config)):
        key[SUITE] = asked
    return Path(config["cache"]) / "answers" / content_hash(key)


def read_answers(folder: Path) -> dict[str, Answers | Scores]:
    """What `write_answers` wrote."""
    found: dict[str, Answers | Scores] = {path.stem: read_records(path) for path in sorted(folder.glob("*.jsonl"))}
    if (folder / f"{SUITE}.json").is_file():
        found[SUITE] = {
            name: {metric: math.nan if value is None else value for metric, value in measured.items()}
            for name, measured in json.loads((folder / f"{SUITE}.json").read_text()).items()
        }
    return found


def write_answers(folder: Path, answers: Mapping[str, Answers | Scores]) -> None:
    """Write one file a probe, and suite.json where there is a suite; the folder appears at once and whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, given in answers.items():
        if isinstance(given, Answers):
            write_records(partial / f"{name}.jsonl", given)
        else:
            write_json(partial / f"{name}.json", given)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load(model: Mapping[str, Any], checkpoint: Checkpoint, deepspeed: Mapping[str, Any] | None = None) -> LanguageModel:
    """The language model in `checkpoint`, with the template and the dtype of the configuration `model`.

    Under ZeRO-3, as `deepspeed` may say, its weights are divided over the ranks as they are read.
    """
    tokenizer = _tokenizer(model, checkpoint)
    with shards.loading(deepspeed):
        loaded = models.load_model(checkpoint.path, checkpoint.revision, model["dtype"], model["attention"])
        return LanguageModel.of(loaded, tokenizer, model["template"], model["max_length"])


def _tokenizer(model: Mapping[str, Any], checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer that the configuration `model` names, else the checkpoint's own."""
    name = model.get("tokenizer")
    if name is None:
        return models.load_tokenizer(checkpoint.path, checkpoint.revision)
    return models.load_tokenizer(name, model["revision"] if name == model["path"] else None)


def make(config: Mapping[str, Any], task: Task, role: str, cache: Path, device: str) -> float:
    """Train the model of `role` into the cache unless it is there; returns the seconds that it took.

    Two jobs that want the same model at once wait for each other; a killed one leaves nothing that looks finished, and
    the next resumes from its last complete checkpoint.
    """
    made_by = recipes(config, task)[role]
    folder = folder_of(cache, made_by)
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    partial = folder.with_name(f".{folder.name}.partial")
    halfway = folder.with_name(f".{folder.name}.checkpoints")
    with FileLock(f"{folder}.lock"), full_disk_told(cache, cleared=lambda: remove_unmarked(halfway)):
        if is_ready(folder):
            remove_all(halfway)  # of a job that was killed between the last two lines of this block
            return 0.0
        lm = _start_model(config, task)
        rows = task.target_rows if role == "target" else task.retrained_rows
        settings = dict(config["prepare"])
        outcome = train(
            lm.model,
            lm.reader,
            {"train": (Part.of(rows), lm.encode(rows))},
            objective=Objective(fit, retain_term=None),
            make_optimizer=functools.partial(torch.optim.AdamW, **settings.pop("adamw")),
            seed=settings.pop("seed"),
            schedule=Schedule(**settings, gradient_checkpointing=config["train"]["gradient_checkpointing"]),
            pad_id=lm.pad_id,
            folder=halfway,
            label=f"prepare {role}",
            device=device,
            compute="prepare",
        )
        shutil.rmtree(partial, ignore_errors=True)
        models.save(lm.model.cpu(), lm.tokenizer, partial)
        write_json(partial / DONE, {"recipe": made_by, "seconds": outcome.seconds, "role": role})
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        remove_all(halfway)
    log.info(
        "prepare %s: %d steps on %d rows in %.0f s, last loss %.3f",
        role, outcome.num_steps, len(rows), outcome.seconds, outcome.last["forget_loss"],
    )  # fmt: skip
    return time.perf_counter() - start


def answer(
    config: Mapping[str, Any], task: Task, checkpoint: Checkpoint, device: str, label: str, told: str | None = None
) -> None:
    """Put probes and suite to `checkpoint`, perhaps `told` something first, unless the cache has its answers."""
    folder = answers_folder(config, checkpoint, task, told)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        lm = load(config["model"], checkpoint)
        lm = lm if told is None else lm.told(told)
        models.move(lm.model, device)
        start = time.perf_counter()
        write_answers(folder, examined(lm, config, task, label))
        log.info("evaluate %s: %d probes in %.0f s", label, len(task.probes), time.perf_counter() - start)


def examined(lm: LanguageModel, config: Mapping[str, Any], task: Task, label: str) -> dict[str, Answers | Scores]:
    """All that a run wants to know of a model; every rank calls it, and gets the same."""
    label = f"evaluate {label}"
    answers = ask(lm, task.probes, **config["evaluate"], label=label)
    if task.scorer is not None:
        score = task.scorer.load(Path(config["cache"]), str(next(lm.model.parameters()).device))
        answers = with_toxicity(answers, task.scored, score)
    found: dict[str, Answers | Scores] = dict(answers)
    if config["utility_suite"] != suite.NONE:
        batch_size = config["evaluate"]["batch_size"]
        found[SUITE] = suite.scores(lm, **suite.asked(config), batch_size=batch_size, label=label)
    return found


def worker(rank: int, config: Mapping[str, Any], roles: Sequence[str], device: str) -> float:
    """One process's share of prepare: the role of its rank, made and questioned."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    attention.choose_kernel(config["model"]["attention"])
    role, cache = roles[rank], Path(config["cache"])
    task = build_task(config)
    wanted, told = recipes(config, task), instruction(config) if role == "target" else None
    if told is not None:
        _check_length(config, task, told)
    seconds = make(config, task, role, cache, device) if role in wanted else 0.0
    place = checkpoints(config, task)[role]
    answer(config, task, place, device, role)
    if told is not None:
        answer(config, task, place, device, "input-based", told)
    return seconds


def _check_length(config: Mapping[str, Any], task: Task, told: str) -> None:
    """Raises UsageError, before anything is trained, if a probe is too long for the model that is `told` something."""
    model = config["model"]
    place = checkpoints(config, task)["target"]
    made = Path(place.path).parent == Path(config["cache"]) / "models"
    tokenizer = _start_tokenizer(config, task) if made else _tokenizer(model, place)
    items = [item for probe in task.probes.values() for item in texts_of(probe)]
    encode(items, tokenizer, Template(**model["template"], instruction=told), model["max_length"])


def build_task(config: Mapping[str, Any]) -> Task:
    """The task that `config["task"]` describes; its `metrics` and its `system_prompt` are read elsewhere."""
    fields = {key: value for key, value in config["task"].items() if key not in ("metrics", "system_prompt")}
    task: Task = hydra.utils.instantiate(fields, _convert_="all")
    return task


def checkpoints(config: Mapping[str, Any], task: Task) -> dict[str, Checkpoint]:
    """role -> where its weights are or will be; a role whose weights are not to be had is absent."""
    cache, found = Path(config["cache"]), {}
    for role, made_by in recipes(config, task).items():
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


def _start_model(config: Mapping[str, Any], task: Task) -> LanguageModel:
    model = config["model"]
    if model["path"]:
        return load(model, Checkpoint(model["path"], model["revision"]))
    tokenizer = _start_tokenizer(config, task)
    fresh = models.from_scratch(model["scratch"]["config"], tokenizer, config["prepare"]["seed"])
    return LanguageModel.of(fresh, tokenizer, model["template"], model["max_length"])


def _start_tokenizer(config: Mapping[str, Any], task: Task) -> PreTrainedTokenizerBase:
    """The tokenizer of the prepared models: that of the model they start from, or a new one, of the target's rows."""
    model = config["model"]
    if model["path"]:
        return _tokenizer(model, Checkpoint(model["path"], model["revision"]))
    template = Template(**model["template"])
    texts = ["".join(template.texts(item)) for item in task.target_rows]
    return models.train_tokenizer(texts, model["scratch"]["vocab_size"], model["max_length"])


def answers_of(
    config: Mapping[str, Any], task: Task, checkpoint: Checkpoint, told: str | None = None
) -> dict[str, Answers | Scores] | None:
    """The cached answers of `checkpoint`, `told` something or not, to the probes; None if they are still to be had."""
    made = Path(checkpoint.path).parent == Path(config["cache"]) / "models"
    if made and not is_ready(Path(checkpoint.path)):
        return None
    folder = answers_folder(config, checkpoint, task, told)
    return read_answers(folder) if folder.is_dir() else None
