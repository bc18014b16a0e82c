"""All that a run measures of a model, cached by what decides it: answers to probes, toxicity, the suite's scores."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from soul_exp.artifacts.code import code_hash
from soul_exp.artifacts.prepared_models import checkpoints, exists, foreign_tokenizer, is_ready, load
from soul_exp.data import content_hash
from soul_exp.errors import counted
from soul_exp.evaluation import lm_eval_suite
from soul_exp.evaluation.durations import stage, timed
from soul_exp.evaluation.fluency import with_fluency
from soul_exp.evaluation.probing import evaluate_probes
from soul_exp.evaluation.records import read_records, write_records
from soul_exp.files import complete_folder, is_intact, locked, read_sealed, remove, seal, shared_folder
from soul_exp.metrics.answers import SUITE, Answers, Scores
from soul_exp.metrics.suite import ScoredTask
from soul_exp.models import loading
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import LanguageModel
from soul_exp.options import COMPARED, option_of
from soul_exp.results import write_json
from soul_exp.run import Models
from soul_exp.tasks.embeddings import with_similarity
from soul_exp.tasks.refusals import with_refused
from soul_exp.tasks.scorers import with_toxicity
from soul_exp.tasks.task import rephrased_probes
from soul_exp.training.checkpoints import COMPLETE

log = logging.getLogger(__name__)

CODE = (  # what decides the answers of a model to a probe, of this package
    *("compat.py", "data.py", "distributed/zero3.py", "evaluation/*.py", "losses/scored.py", "metrics/answers.py"),
    *("metrics/text.py", "models/*.py", "tasks/task.py"),
    *("tasks/embeddings.py", "tasks/encoders.py", "tasks/scorers.py"),
)
Measured = Mapping[str, Answers | Scores]  # probe -> answers, and SUITE -> scores
RECORDS = 2  # raise it when answers get further fields, which change no number of the others


def folder_of(models: Models, checkpoint: Checkpoint, system_prompt: str | None = None) -> Path:
    """The cache folder for the answers of `checkpoint` to probes and utility suite, with `system_prompt` if any."""
    model, hashes = models.model, models.task.hashes
    evaluation = models.evaluation.of_probes.items()
    key: dict[str, Any] = {
        "code": code_hash(CODE),
        **identity_of(models, checkpoint),
        # its name is part of the keys of cached answers, and so stays
        **({"told": [model.template.system, system_prompt]} if system_prompt is not None else {}),
        **{name: value for name, value in evaluation if option_of(f"evaluate.{name}").changes in COMPARED},
        "probes": {
            name: value
            for name, value in hashes.items()
            if name.startswith(("probe.", "rows.prefix", "scorer", "embedding"))
        },
    }
    if suite := lm_eval_suite.identity(**vars(models.suite)):
        key[SUITE] = suite
    key["records"] = [RECORDS, {name: probe.units for name, probe in models.task.probes.items()}]
    if (scored_by := original_of(models)) is not None:
        key["scored by"] = scored_by.identity()
    return models.cache / "answers" / content_hash(key)


def identity_of(models: Models, checkpoint: Checkpoint) -> dict[str, Any]:
    """What decides how the model in `checkpoint` reads any text."""
    model = models.model
    return {
        "model": checkpoint.identity(),
        "template": dict(model.training_form),
        **foreign_tokenizer(model),
        "max_length": model.max_length,
        "dtype": model.dtype,
        # rounding to bf16 depends on the shapes of a batch: the NLL by up to 1e-2
        **({"batch_size": models.evaluation.batch_size} if model.dtype != "float32" else {}),
    }


def cached_folder(models: Models, checkpoint: Checkpoint, system_prompt: str | None = None) -> Path | None:
    """The cache folder that has the answers of `checkpoint`, with `system_prompt` if any; None if there is none."""
    prepared_here = Path(checkpoint.path).parent == models.cache / "models"
    if prepared_here and not is_ready(Path(checkpoint.path)):
        return None
    folder = folder_of(models, checkpoint, system_prompt)
    return folder if _is_answered(folder) else None


def answers_of(lm: LanguageModel, models: Models, label: str) -> dict[str, Answers | Scores]:
    """All that a run measures of a model; every rank calls it and gets the same answers."""
    label, task, evaluation = f"evaluate {label}", models.task, models.evaluation
    answers = evaluate_probes(lm, task.probes, **evaluation.of_probes, prefix=task.prefix, label=label)
    device = str(next(lm.model.parameters()).device)
    if task.scorer is not None:
        with stage("toxicity"):
            answers = with_toxicity(answers, task.scored, task.scorer.load(models.cache, device))
    if task.embedding is not None:
        asked = rephrased_probes(task.probes).items()
        choices = {name: probe.choices for name, probe in asked if probe.generate and probe.choices}
        with stage("embedding"):
            answers = with_similarity(answers, choices, task.embedding, device)
    answers = with_refused(answers, task.refusals)
    found: dict[str, Answers | Scores] = dict(answers)
    if models.suite.suite != lm_eval_suite.NONE:
        with stage("suite"):
            found[SUITE] = lm_eval_suite.scores(lm, **vars(models.suite), batch_size=evaluation.batch_size, label=label)
    return found


def original_of(models: Models) -> Checkpoint | None:
    """The original model, under which all generated texts are scored; None if it is not here (yet)."""
    return checkpoints(models).get("target") if exists(models, "target") else None


def scored_by_original(models: Models, answers: Measured, original: LanguageModel, label: str) -> Measured:
    """`answers` with the NLL of their generated texts under `original`; every rank calls it."""
    given = {name: each for name, each in answers.items() if isinstance(each, Answers)}
    batch_size, label = models.evaluation.batch_size, f"evaluate {label}: fluency"
    return {**answers, **with_fluency(original, models.task.probes, given, batch_size=batch_size, label=label)}


def fill(models: Models, checkpoint: Checkpoint, device: str, label: str, system_prompt: str | None = None) -> None:
    """Evaluate `checkpoint`, under `system_prompt` if any, unless the cache has its answers."""
    folder = folder_of(models, checkpoint, system_prompt)
    if _is_answered(folder):
        return
    shared_folder(folder.parent)
    with locked(Path(f"{folder}.lock")):
        if _is_answered(folder):
            return
        remove(folder)  # it is damaged, or not there
        start = time.perf_counter()

        def on_device(checkpoint: Checkpoint) -> LanguageModel:
            lm = load(models.model, checkpoint)
            loading.move(lm.model, device)
            return lm

        lm = on_device(checkpoint)
        with timed() as stages:
            asked = lm if not system_prompt else lm.with_system_prompt(system_prompt)
            answers: Measured = answers_of(asked, models, label)
            del asked
            if (original := original_of(models)) is not None:
                if original != checkpoint:
                    del lm  # one model at a time
                    lm = on_device(original)
                answers = scored_by_original(models, answers, lm, label)
        write_answers(folder, answers, {"seconds": stages})
        probes, seconds = counted(len(models.task.probes), "probe"), time.perf_counter() - start
        log.info("evaluate %s: %s in %.0f s", label, probes, seconds)


def _is_answered(folder: Path) -> bool:
    return folder.is_dir() and is_intact(folder / COMPLETE)


def read_answers(folder: Path) -> Measured:
    """What `write_answers` wrote; a file that its marker does not list is none of it."""
    sealed = read_sealed(folder / COMPLETE)
    assert isinstance(sealed, dict), sealed
    names = sorted(sealed["files"])
    found: dict[str, Answers | Scores] = {
        name.removesuffix(".jsonl"): read_records(folder / name) for name in names if name.endswith(".jsonl")
    }
    scores = {name.removesuffix(".json"): folder / name for name in names if name.endswith(".json")}
    return {**found, **{name: suite_of(json.loads(path.read_text())) for name, path in scores.items()}}


def seconds_of(folder: Path) -> dict[str, float]:
    """Stage -> wall-clock seconds of the evaluation whose answers are in the cache's `folder`."""
    sealed = read_sealed(folder / COMPLETE)
    return {} if isinstance(sealed, str) else dict(sealed.get("seconds", {}))


def write_answers(folder: Path, answers: Measured, about: Mapping[str, Any] = {}) -> None:
    """Write one file per probe, and suite.json where there is a suite; the folder appears at once, with checksums.

    Its marker has what is said `about` the answers.
    """
    with complete_folder(folder) as partial:
        for name, given in answers.items():
            if isinstance(given, Answers):
                write_records(partial / f"{name}.jsonl", given)
            else:
                write_json(partial / f"{name}.json", {task: _recorded(of) for task, of in given.items()})
        seal(partial / COMPLETE, about)


def _recorded(measured: Mapping[str, float]) -> Mapping[str, Any]:
    """What a record holds of one task of a suite: of each item, "1101" where it is right or wrong; else its numbers."""
    if not isinstance(measured, ScoredTask):
        return measured
    are_bits = {name: values.ndim == 1 and np.isin(values, (0, 1)).all() for name, values in measured.of_items.items()}
    return {
        name: "".join("1" if hit else "0" for hit in values) if are_bits[name] else values.tolist()
        for name, values in measured.of_items.items()
    }


def suite_of(recorded: Mapping[str, Mapping[str, Any]]) -> Scores:
    """The scores of a suite from their record; one of an earlier version has no items, but the scores themselves."""

    def read(values: Any) -> Any:
        found = [float(digit) for digit in values] if isinstance(values, str) else values
        return np.array(found, dtype=float) if isinstance(found, list) else math.nan if found is None else found

    tasks = {task: {name: read(values) for name, values in of.items()} for task, of in recorded.items()}
    with_items = {task: all(isinstance(values, np.ndarray) for values in of.values()) for task, of in tasks.items()}
    return {task: ScoredTask(of) if with_items[task] else of for task, of in tasks.items()}
