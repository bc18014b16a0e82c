"""What a run wants to know of a model: the answers to its task's questions, the scorer's and the suite's verdicts.

Answers of models that runs share are cached by a hash of everything that decides them.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from soul_exp.artifacts.prepared_models import VERSION, Checkpoint, foreign_tokenizer, form, is_ready, load
from soul_exp.data import content_hash
from soul_exp.evaluation import lm_eval_suite
from soul_exp.evaluation.probing import ask
from soul_exp.evaluation.records import read_records, write_records
from soul_exp.files import is_intact, seal
from soul_exp.metrics.answers import SUITE, Answers, Scores
from soul_exp.models import loading
from soul_exp.models.language_model import LanguageModel
from soul_exp.results import write_json
from soul_exp.tasks.task import Task
from soul_exp.tasks.toxicity import with_toxicity
from soul_exp.training.checkpoints import COMPLETE

log = logging.getLogger(__name__)


def answers_folder(config: Mapping[str, Any], checkpoint: Checkpoint, task: Task, told: str | None = None) -> Path:
    """Where the answers of `checkpoint` to probes and utility suite are kept; their batch size does not matter.

    `told` is the instruction under which it gave them.
    """
    model = config["model"]
    key: dict[str, Any] = {
        "version": VERSION,
        "model": checkpoint.identity(),
        "template": form(model),
        **foreign_tokenizer(model),
        **({"told": [model["template"]["system"], told]} if told is not None else {}),
        "max_length": model["max_length"],
        "dtype": model["dtype"],
        "max_new_tokens": config["evaluate"]["max_new_tokens"],
        "probes": {name: value for name, value in task.hashes().items() if name.startswith(("probe.", "scorer"))},
    }
    if asked := lm_eval_suite.identity(**lm_eval_suite.asked(config)):
        key[SUITE] = asked
    return Path(config["cache"]) / "answers" / content_hash(key)


def answers_of(
    config: Mapping[str, Any], task: Task, checkpoint: Checkpoint, told: str | None = None
) -> dict[str, Answers | Scores] | None:
    """The cached answers of `checkpoint`, `told` something or not, to the probes; None if they are still to be had."""
    made = Path(checkpoint.path).parent == Path(config["cache"]) / "models"
    if made and not is_ready(Path(checkpoint.path)):
        return None
    folder = answers_folder(config, checkpoint, task, told)
    return read_answers(folder) if _is_answered(folder) else None


def examined(lm: LanguageModel, config: Mapping[str, Any], task: Task, label: str) -> dict[str, Answers | Scores]:
    """All that a run wants to know of a model; every rank calls it, and gets the same."""
    label = f"evaluate {label}"
    answers = ask(lm, task.probes, **config["evaluate"], label=label)
    if task.scorer is not None:
        score = task.scorer.load(Path(config["cache"]), str(next(lm.model.parameters()).device))
        answers = with_toxicity(answers, task.scored, score)
    found: dict[str, Answers | Scores] = dict(answers)
    if config["utility_suite"] != lm_eval_suite.NONE:
        batch_size = config["evaluate"]["batch_size"]
        found[SUITE] = lm_eval_suite.scores(lm, **lm_eval_suite.asked(config), batch_size=batch_size, label=label)
    return found


def answer(
    config: Mapping[str, Any], task: Task, checkpoint: Checkpoint, device: str, label: str, told: str | None = None
) -> None:
    """Put probes and suite to `checkpoint`, perhaps `told` something first, unless the cache has its answers."""
    folder = answers_folder(config, checkpoint, task, told)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if _is_answered(folder):
            return
        lm = load(config["model"], checkpoint)
        lm = lm if told is None else lm.with_instruction(told)
        loading.move(lm.model, device)
        start = time.perf_counter()
        write_answers(folder, examined(lm, config, task, label))
        log.info("evaluate %s: %d probes in %.0f s", label, len(task.probes), time.perf_counter() - start)


def _is_answered(folder: Path) -> bool:
    return folder.is_dir() and is_intact(folder / COMPLETE)


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
    """Write one file a probe, and suite.json where there is a suite; the folder appears at once, with checksums."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, given in answers.items():
        if isinstance(given, Answers):
            write_records(partial / f"{name}.jsonl", given)
        else:
            write_json(partial / f"{name}.json", given)
    seal(partial / COMPLETE, {})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
