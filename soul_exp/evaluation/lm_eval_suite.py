"""General utility: the model in memory on tasks of lm-evaluation-harness, before and after unlearning.

Zero-shot, with lm-eval's own prompts for base models and no chat template: the likelihood of each choice in fp32, texts
cut from the left to model.max_length. The ranks divide the work and all get the same scores, sharded weights or not.
"""

import functools
import hashlib
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from soul_exp import hub
from soul_exp.distributed.ranks import is_first
from soul_exp.errors import UnreachableError, UsageError
from soul_exp.evaluation.probing import evaluating
from soul_exp.metrics.suite import ScoredTask, mean_accuracy
from soul_exp.models.language_model import LanguageModel
from soul_exp.tasks.embedded import general_suite

log = logging.getLogger(__name__)

VERSION = 1  # raise it when a change to this module, lm_eval_model or the embedded suite changes scores
NONE, PAPER, EMBEDDED = "none", "paper", "embedded"

# lm-eval's task -> (folder of its definition in lm_eval/tasks, dataset on the hub, configuration, split)
TASKS: dict[str, tuple[str, str, str | None, str]] = {
    "boolq": ("super_glue/boolq", "aps/super_glue", "boolq", "validation"),
    "rte": ("glue/rte", "nyu-mll/glue", "rte", "validation"),
    "hellaswag": ("hellaswag", "Rowan/hellaswag", None, "validation"),
    "winogrande": ("winogrande", "allenai/winogrande", "winogrande_xl", "validation"),
    "arc_easy": ("arc", "allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("arc", "allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": ("openbookqa", "allenai/openbookqa", "main", "test"),
    "piqa": ("piqa", "baber/piqa", None, "validation"),
    "truthfulqa_mc1": ("truthfulqa", "truthfulqa/truthful_qa", "multiple_choice", "validation"),
    "wikitext": ("wikitext", "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
}


def check(suite: str, data: str | None) -> None:
    """Raises UsageError if a dataset of `paper` is neither in the folder `data` nor, without one, on the hub."""
    instead = "type utility_suite=embedded or utility_suite=none"
    for _, dataset, config, split in TASKS.values() if suite == PAPER else ():
        if not data and (error := _unavailable(dataset, config, split)):
            found = f"utility_suite=paper: {dataset} cannot be reached ({error})"
            raise UnreachableError(
                f"{found}: connect to the network, give utility_data=<folder with copies>, or {instead}"
            )
        folder = Path(data or "") / dataset
        if data and (error := _unavailable(str(folder), config, split) if folder.is_dir() else "it is not a folder"):
            found = f"utility_data: {folder} is not a copy of that dataset of the hub ({error})"
            raise UsageError(f"{found}: put one there, or {instead}")


@functools.cache  # once for all jobs of a sweep
def _unavailable(dataset: str, config: str | None, split: str) -> str | None:
    """Why that split of a dataset is not available from the hub, its local cache or a folder; None if it is."""
    if not Path(dataset).is_dir():
        hub.connect()
    try:
        found = datasets.get_dataset_split_names(dataset, config)
    except (ConnectionError, OSError, ValueError) as error:
        return type(error).__name__
    return None if split in found else f"it has no split {split}"


def identity(suite: str, limit: int | None, data: str | None) -> dict[str, Any] | None:
    """Everything that decides the scores apart from the model; None without a suite."""
    if suite == NONE:
        return None
    key: dict[str, Any] = {"suite": suite, "limit": limit, "version": VERSION, "lm_eval": version("lm_eval")}
    if suite == EMBEDDED:
        questions = {name: [asdict(question) for question in rows] for name, rows in general_suite.questions().items()}
        key |= {"questions": questions, "texts": general_suite.texts()}
    elif data:
        key["files"] = _digests(data)
    return key


@functools.cache
def _digests(folder: str) -> dict[str, str]:
    folders = [Path(folder) / dataset for _, dataset, *_ in TASKS.values()]
    files = sorted({path for dataset in folders for path in dataset.rglob("*") if path.is_file()})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def scores(
    lm: LanguageModel, suite: str, *, limit: int | None, data: str | None, batch_size: int, label: str = "evaluate"
) -> dict[str, ScoredTask]:
    """task -> metric -> value: `acc` of questions, with its standard error and their number `n`; perplexities of text.

    `limit`: only the first so many items of each task; None: all. Every rank calls it and gets the same.
    """
    from lm_eval.evaluator import evaluate

    from soul_exp.evaluation.lm_eval_model import SharedModel, quiet

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as fresh, evaluating(lm), quiet():
        found: Any = evaluate(
            lm=SharedModel(lm, batch_size, label),
            task_dict=_loaded(suite, data, fresh),
            limit=limit,
            bootstrap_iters=0,  # the standard error of a proportion needs none
            log_samples=True,
        )
    tasks = TASKS if suite == PAPER else [*general_suite.TASKS, general_suite.TEXT]
    measured = {task: ScoredTask(_of_items(found["samples"][task])) for task in tasks}
    if is_first():
        seconds = time.perf_counter() - start
        log.info("%s: utility suite %s: mean accuracy %.3f in %.0f s", label, suite, mean_accuracy(measured), seconds)
    return measured


def _of_items(samples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """measure -> what lm-eval makes of each item of a task, in the order of the task: [N], or of texts [N, 2]."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return {name: np.array([sample[name] for sample in ordered], dtype=float) for name in ordered[0]["metrics"]}


def _loaded(suite: str, data: str | None, fresh: str) -> Any:
    """lm-eval's tasks of the suite, zero-shot; `fresh` is an empty folder for the cache of `data`."""
    import lm_eval.tasks

    if suite == EMBEDDED:
        return lm_eval.tasks.TaskManager(include_defaults=False).load(_embedded_tasks())
    folders = [str(Path(lm_eval.tasks.__file__).parent / folder) for folder, *_ in TASKS.values()]
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    entries = []  # zero-shot, so that no other split is needed
    for task, (_, dataset, _, split) in TASKS.items():
        # a fresh cache for a folder: the library's own finds files by the folder's name, and so old ones after an edit
        local = {"dataset_path": str(Path(data) / dataset), "dataset_kwargs": {"cache_dir": fresh}} if data else {}
        entries.append({"task": task, "num_fewshot": 0, "training_split": None, "fewshot_split": split, **local})
    return manager.load([{"group": "soul_exp_paper", "task": entries}])


def _embedded_tasks() -> list[dict[str, Any]]:
    """The embedded suite as definitions of lm-eval tasks."""
    tasks = []
    for name, questions in general_suite.questions().items():
        rows = [{**asdict(q), "context": q.contexts[0], "continuation": q.continuations[0]} for q in questions]
        fields = {"doc_to_text": "{{context}}", "doc_to_choice": "{{continuations}}", "doc_to_target": "gold"}
        if name == general_suite.PRONOUN:  # as in WinoGrande the contexts differ
            fields = {"doc_to_text": "gold", "doc_to_choice": "{{contexts}}", "doc_to_target": "{{continuation}}"}
        metrics = [{"metric": each, "aggregation": "mean", "higher_is_better": True} for each in ("acc", "acc_norm")]
        tasks.append(_task(name, rows, output_type="multiple_choice", metric_list=metrics, **fields))
    perplexities = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    rows = [{"text": text} for text in general_suite.texts()]
    text = {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": perplexities}
    return [*tasks, _task(general_suite.TEXT, rows, output_type="loglikelihood_rolling", **text)]


def _task(name: str, rows: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
    table = datasets.Dataset.from_list([dict(row) for row in rows])
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": table},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": VERSION},
        **fields,
    }
