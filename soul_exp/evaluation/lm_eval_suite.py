"""General utility: the tasks of lm-evaluation-harness put to the model in memory, before and after unlearning.

Zero-shot, with lm-eval's own base-style prompts and no chat template: the likelihood of each choice in fp32, texts cut
from the left to model.max_length. All ranks share the work in lockstep and get the same scores, divided weights or not.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import torch
from tqdm.auto import tqdm

from soul_exp import compat
from soul_exp.distributed import zero3
from soul_exp.distributed.ranks import in_batches, is_first
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import evaluating
from soul_exp.metrics.suite import mean_accuracy
from soul_exp.models.language_model import LanguageModel
from soul_exp.tasks.embedded import general_suite

log = logging.getLogger(__name__)

VERSION = 1  # raise it when a change to this module or the embedded suite changes scores
MAX_POSITIONS = 8192  # of a forward pass, which computes logits at all of them: 1 GB for 32,000 tokens in fp32
MAX_NLL = 700.0  # nats a word: exp of more is no float any more, and an unlearned model gets there
NONE, PAPER, EMBEDDED = "none", "paper", "embedded"

# lm-eval's task -> the folder of its definition in lm_eval/tasks; its dataset on the hub, that one's part and split
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
    for _, dataset, part, split in TASKS.values() if suite == PAPER else ():
        if not data and (error := _lacking(dataset, part, split)):
            raise UsageError(
                f"utility_suite=paper: {dataset} cannot be reached ({error}): connect to the network, give "
                f"utility_data=<folder with copies>, or type utility_suite=embedded or utility_suite=none"
            )
        place = Path(data or "") / dataset
        if data and (error := _lacking(str(place), part, split) if place.is_dir() else "it is no folder"):
            raise UsageError(
                f"utility_data: {place} is no copy of that dataset of the hub ({error}): put one there, or type "
                f"utility_suite=embedded or utility_suite=none"
            )


@functools.cache  # the jobs of a sweep ask once
def _lacking(dataset: str, part: str | None, split: str) -> str | None:
    """Why that split of a dataset is not to be had from the hub, its cache here or a folder; None if it is."""
    if not Path(dataset).is_dir() and not huggingface_hub.constants.HF_HUB_OFFLINE and not _hub_answers():
        return "no connection; HF_HUB_OFFLINE=1 uses what its cache here has"
    try:
        found = datasets.get_dataset_split_names(dataset, part)
    except (ConnectionError, OSError, ValueError) as error:
        return type(error).__name__
    return None if split in found else f"it has no split {split}"


@functools.cache
def _hub_answers() -> bool:
    """Whether there is a network: known in a second, where the library would try again for a minute."""
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def identity(suite: str, limit: int | None, data: str | None) -> dict[str, Any] | None:
    """All that decides what is asked, apart from the model; None where nothing is."""
    if suite == NONE:
        return None
    key: dict[str, Any] = {"suite": suite, "limit": limit, "version": VERSION, "lm_eval": version("lm_eval")}
    if suite == EMBEDDED:
        asked = {name: [asdict(question) for question in asked] for name, asked in general_suite.questions().items()}
        key |= {"questions": asked, "texts": general_suite.texts()}
    elif data:
        key["files"] = _digests(data)
    return key


@functools.cache
def _digests(folder: str) -> dict[str, str]:
    files = [Path(folder) / dataset for _, dataset, *_ in TASKS.values()]
    found = sorted({path for place in files for path in place.rglob("*") if path.is_file()})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def scores(
    lm: LanguageModel, suite: str, *, limit: int | None, data: str | None, batch_size: int, label: str = "evaluate"
) -> dict[str, dict[str, float]]:
    """task -> metric -> value: `acc` of questions, with its standard error and their number `n`; perplexities of text.

    `limit` asks the first so many items of each task; None asks all. Every rank calls it and gets the same.
    """
    from lm_eval.evaluator import evaluate

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as fresh, evaluating(lm), _quiet():
        found: Any = evaluate(
            lm=_harness(lm, batch_size, label),
            task_dict=_loaded(suite, data, fresh),
            limit=limit,
            bootstrap_iters=0,  # the standard error of a share is known without
            log_samples=False,
        )
    given = {
        task: _numbers(found["results"][task], found["n-samples"][task]["effective"])
        for task in (TASKS if suite == PAPER else [*general_suite.TASKS, general_suite.TEXT])
    }
    if is_first():
        seconds = time.perf_counter() - start
        log.info("%s: utility suite %s: mean accuracy %.3f in %.0f s", label, suite, mean_accuracy(given), seconds)
    return given


def _numbers(result: Mapping[str, Any], n: int) -> dict[str, float]:
    """lm-eval's "acc,none" as acc, and what we add."""
    numbers = {key.partition(",")[0]: value for key, value in result.items() if not key.startswith(("alias", "name"))}
    found = {key: float(value) for key, value in numbers.items() if isinstance(value, int | float)}
    found = {key: value for key, value in found.items() if not key.endswith("_stderr") and key != "sample_len"}
    if "acc" in found:
        found["acc_stderr"] = math.sqrt(found["acc"] * (1 - found["acc"]) / n)
    return {**found, "n": float(n)}


def _loaded(suite: str, data: str | None, fresh: str) -> Any:
    """lm-eval's tasks of the suite, with no example before a question."""
    import lm_eval.tasks

    if suite == EMBEDDED:
        return lm_eval.tasks.TaskManager(include_defaults=False).load(_embedded_tasks())
    home = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(
        include_path=[str(home / folder) for folder, *_ in TASKS.values()], include_defaults=False
    )
    entries = []  # without examples no other split is needed
    for task, (_, dataset, _, split) in TASKS.items():
        # a fresh cache for a folder: the library's own finds files by the folder's name, and so old ones after an edit
        local = {"dataset_path": str(Path(data) / dataset), "dataset_kwargs": {"cache_dir": fresh}} if data else {}
        entries.append({"task": task, "num_fewshot": 0, "training_split": None, "fewshot_split": split, **local})
    return manager.load([{"group": "soul_exp_paper", "task": entries}])


def _embedded_tasks() -> list[dict[str, Any]]:
    """The embedded suite in lm-eval's terms."""
    tasks = []
    for name, questions in general_suite.questions().items():
        rows = [{**asdict(q), "context": q.contexts[0], "continuation": q.continuations[0]} for q in questions]
        fields = {"doc_to_text": "{{context}}", "doc_to_choice": "{{continuations}}", "doc_to_target": "gold"}
        if name == general_suite.PRONOUN:  # as in WinoGrande the contexts differ
            fields = {"doc_to_text": "gold", "doc_to_choice": "{{contexts}}", "doc_to_target": "{{continuation}}"}
        metrics = [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ]
        tasks.append(_task(name, rows, output_type="multiple_choice", metric_list=metrics, **fields))
    perplexities = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    rows = [{"text": text} for text in general_suite.texts()]
    text = {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": perplexities}
    return [*tasks, _task(general_suite.TEXT, rows, output_type="loglikelihood_rolling", **text)]


def _task(name: str, rows: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
    made = datasets.Dataset.from_list([dict(row) for row in rows])
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": made},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": VERSION},
        **fields,
    }


def _harness(lm: LanguageModel, batch_size: int, label: str) -> Any:
    """lm-eval's wrapper of a model, whose forward passes the ranks share, as `in_batches` deals them out."""
    from lm_eval.models.huggingface import HFLM

    class Shared(compat.SharedLikelihoods, HFLM):
        def share(
            self, requests: Sequence[Any], compute: Callable[[Sequence[Any]], list[tuple[float, bool]]]
        ) -> list[tuple[float, bool]]:
            lengths = [min(len(context) + len(continuation), lm.max_length) for _, context, continuation in requests]
            found: dict[int, tuple[float, bool]] = {}
            widths = [1 << (length - 1).bit_length() for length in lengths]  # the next power of 2
            for width in sorted(set(widths), reverse=True):  # short texts need not go in a long one's small batches
                rows = [i for i, its in enumerate(widths) if its == width]

                def work(numbers: Sequence[int], rows: Sequence[int] = rows) -> list[tuple[float, bool]]:
                    return compute([requests[rows[i]] for i in numbers])

                done = in_batches(
                    [lengths[i] for i in rows],
                    work,
                    max(1, min(batch_size, MAX_POSITIONS // width)),
                    label=f"{label}: utility",
                    lockstep=zero3.is_sharded(lm.model),
                )
                found |= zip(rows, done, strict=True)
            return [found[i] for i in range(len(requests))]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            floors = [-MAX_NLL * len(request.args[0].split()) for request in requests]
            found = super().loglikelihood_rolling(requests, disable_tqdm)
            return [max(value, floor) for value, floor in zip(found, floors, strict=True)]  # nan stays nan

    return Shared(
        pretrained=lm.model,
        tokenizer=lm.tokenizer,
        backend="causal",
        max_length=lm.max_length,
        batch_size=2**30,  # hand over all texts at once
        logits_cache=False,  # a call is one forward pass, as lockstep needs
        softmax_dtype=torch.float32,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its bars and remarks, and without that of a tokenizer on long texts, which it cuts in windows."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    noisy: list[Any] = [lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface]
    bars = [module.tqdm for module in noisy]
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module in noisy:
        module.tqdm = lambda *args, **options: tqdm(*args, **{**options, "disable": True})
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module, bar in zip(noisy, bars, strict=True):
            module.tqdm = bar


def asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `config` that say what is asked: arguments of `identity`, and of `scores`."""
    return {"suite": config["utility_suite"], "limit": config["utility_limit"], "data": config["utility_data"]}
