"""Why a metric is not available: its probe is missing or does not record what it reads, or no model to compare is."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from soul_exp import binding
from soul_exp.artifacts import prepared_models
from soul_exp.artifacts.scores import RETRAINED, available_to
from soul_exp.build import Config
from soul_exp.errors import UsageError
from soul_exp.evaluation import lm_eval_suite
from soul_exp.evaluation.records import read_retrained
from soul_exp.metrics.answers import SUITE, Answers, NotRecordedError, UndefinedError
from soul_exp.models.checkpoint import is_ours
from soul_exp.run import Run
from soul_exp.tasks import tofu
from soul_exp.tasks.task import Probe, attacked_probes, is_attacked, rephrased_probes

TOFU_LOG_ITEMS = 300  # of each probe: the TOFU authors' code evaluates no more
MADE_UP = Answers(  # two examples
    nll=np.zeros(2),
    logp=[np.zeros(1)] * 2,
    right=[np.ones(1, dtype=bool)] * 2,
    paraphrase_nll=np.zeros(2),
    wrong_nll=np.zeros((2, 1)),
    rouge_l=np.ones(2),
    question=["question"] * 2,
    answer=["answer"] * 2,
    entities=[("answer",)] * 2,
    generation=["answer"] * 2,
    mean_logp=[np.zeros(1)] * 2,
    var_logp=[np.zeros(1)] * 2,
    gradnorm=np.zeros(2),
    gradnorm_mean=np.zeros(2),
    recall_ll=np.zeros(2),
    rephrased_nll=np.zeros(2),
    rephrased_generation=["answer"] * 2,
    similarity=np.ones((2, 2)),
    embedding=["embedding"] * 2,
    bare_nll=np.zeros(2),
    bare_wrong_nll=np.zeros((2, 1)),
)


def read_records(run: Run) -> Mapping[str, Answers] | None:
    """The retrained model's answers, where `retrained.records` gives them as a file or a folder of files, else None."""
    path = run.retrained_records
    if path is None:
        return None
    try:
        records = read_retrained(path)
    except FileNotFoundError as error:
        advice = "give records/MODEL/ of a run or a TOFU log"
        raise UsageError(f"retrained.records={path} does not exist: {advice}") from error
    except ValueError as error:
        raise UsageError(f"retrained.records: {error}") from error
    for name, given in records.items():
        if name in run.task.probes:
            _check_same_task(path, name, given, run.task.probes)
        by = run.task.embedding.identity() if run.task.embedding is not None else None
        if others := {*(given.embedding or ())} - {by}:
            raise UsageError(
                f"retrained.records={path}: accuracy on {name} is by {min(others)}, of this run it would be by {by}: "
                f"give the same task.embedding"
            )
    return records


def _check_same_task(path: Path, name: str, given: Answers, probes: Mapping[str, Probe]) -> None:
    """Raises UsageError unless the answers `given` in `path` are finite, and those to the task's probe `name`."""
    prompts, advice = [item.prompt for item in probes[name].items], "give the records of the same task"
    counts = {len(prompts)} if path.is_dir() else {len(prompts), min(len(prompts), TOFU_LOG_ITEMS)}
    if len(given) not in counts:
        of_percent = tofu.NUM_AUTHORS * tofu.ROWS_PER_AUTHOR // 100
        rows = {split: percent * of_percent for split, percent in tofu.PERCENT.items()}
        splits = [split for split, num in rows.items() if len(given) in (num, min(num, TOFU_LOG_ITEMS))]
        of = f" (as a log of {splits[0]} does)" if splits and name == "forget" and path.is_file() else ""
        raise UsageError(
            f"retrained.records={path} holds {len(given)} answers to {name}{of}, the task has {len(prompts)} "
            f"questions: {advice}"
        )
    if given.question is None and path.is_file() and "validation_forget" in probes:
        raise UsageError(
            f"retrained.records={path} holds no questions, and only they say which answers are of the validation part: "
            f"type task.validation_fraction=0"
        )
    for number, (question, prompt) in enumerate(zip(given.question or (), prompts, strict=False), start=1):
        if prompt not in question:
            raise UsageError(
                f"retrained.records={path}: answer {number} of {name} answers {question[:60]!r}, the task has "
                f"{prompt[:60]!r}: {advice}"
            )
    if found := given.not_finite():
        raise UsageError(
            f"retrained.records={path}: {found[1]} of answer {found[0] + 1} of {name} is null or not finite, expected "
            f"numbers: take the records of a model that was evaluated completely"
        )


def reasons(config: Config, run: Run) -> dict[str, str]:
    """metric -> why it is not available, for those that are not."""
    task, missing, records = run.task, dict(run.task.missing), read_records(run)
    num_holdout, unseen = config["task"].get("num_holdout_authors", 0), ("holdout", "validation_holdout")
    if run.published is not None:
        missing |= dict.fromkeys(unseen, "the published target was trained on every author, so none is unseen")
    elif run.measures_only and not is_ours(run.model.checkpoint.path) and num_holdout is None:
        why = "whether model.path saw the holdout is unknown: set task.num_holdout_authors if it did not"
        missing |= dict.fromkeys(unseen, why)
    prepares = "prepare" in run.stages or not run.stages
    has_retrained = prepares and "retrained" in prepared_models.checkpoints(run)
    if records is None and not (has_retrained or prepared_models.exists(run, "retrained")):
        prepared = "" if "prepare" in run.stages else "add prepare to stages, or "
        missing["retrained"] = (
            "no retrained model, as model.path is the target as it is: give retrained.path or retrained.records, or "
            "have both trained here with task.trained_before=false"
            if run.target_is_given
            else f"no retrained model: {prepared}give retrained.path or retrained.records"
        )
        missing["retrained_seeds"] = missing["retrained"]
    if run.suite.suite == lm_eval_suite.NONE:
        missing[SUITE] = "utility_suite=none measures no general utility: type utility_suite=embedded or paper"
    found = {}
    for name, metric in run.metrics.items():
        names = binding.names(metric)
        for wanted in names:
            if wanted in missing:
                found[name] = missing[wanted]
            elif wanted not in (*task.probes, *RETRAINED, SUITE):
                raise UsageError(
                    f"the metric {name} needs the probe {wanted!r}, but task={run.choices.task} offers "
                    f"{', '.join(task.probes)}: remove task.metrics.{name}"
                )
        given = bool(task.prefix), task.embedding is not None
        unrecorded = missing_field(metric, task.probes, *given) if name not in found else None
        if unrecorded:
            probe, field = unrecorded
            why = f"the probe {probe} records no {field}"
            if field == "recall_ll" and not task.prefix:
                why = f"task={run.choices.task} has no never-trained rows that ReCaLL could put before others"
            found[name] = missing.get(f"{probe}.{field}", why)
        if records is not None and name not in found:
            absent = [wanted for wanted in names if wanted not in (*records, *RETRAINED)]
            if absent:  # no model has a metric that compares with them, the others have one that does not
                key = name if set(RETRAINED) & set(names) else f"retrained.{name}"
                found[key] = f"retrained.records holds no answers to {absent[0]}"
                continue
            try:
                value = binding.call(metric, available_to(records, [records]))
            except ValueError as error:
                of_theirs_alone = isinstance(error, NotRecordedError) and not set(RETRAINED) & set(names)
                if of_theirs_alone or isinstance(error, UndefinedError):
                    found[f"retrained.{name}"] = f"retrained.records: {error}"
                    continue
                raise UsageError(f"retrained.records: metric {name} cannot be computed from them: {error}") from error
            if not math.isfinite(value):
                found[f"retrained.{name}"] = f"from retrained.records its value is {value}"
    return found


def missing_field(
    metric: Callable[..., float], probes: Mapping[str, Probe], has_prefix: bool = False, has_embedding: bool = False
) -> tuple[str, str] | None:
    """The first probe that `metric` reads but cannot, and the field that this probe does not record; None: it can."""
    attacked, asked_again = attacked_probes(probes), rephrased_probes(probes)
    for name in binding.names(metric):
        if name not in probes:
            continue
        probe = probes[name]
        recorded = {"paraphrase_nll": probe.paraphrases is not None, "wrong_nll": probe.wrong is not None}
        recorded |= {"entities": probe.entities is not None}
        recorded |= dict.fromkeys(("rouge_l", "generation"), probe.generate)
        recorded |= dict.fromkeys(("gradnorm", "gradnorm_mean"), name in attacked)
        recorded["recall_ll"] = has_prefix and is_attacked(name)
        recorded["rephrased_nll"] = again = name in asked_again
        recorded["rephrased_generation"] = again and probe.generate
        recorded |= dict.fromkeys(
            ("similarity", "embedding"), again and probe.generate and has_embedding and bool(probe.choices)
        )
        recorded |= dict.fromkeys(
            ("bare_nll", "bare_wrong_nll"), probe.wrong is not None and (again or probe.paraphrases is None)
        )
        without: Any = {field: None for field, is_recorded in recorded.items() if not is_recorded}
        given = {**dict.fromkeys(probes, MADE_UP), name: replace(MADE_UP, **without)}
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                binding.call(metric, available_to(given, [given]))
        except NotRecordedError as error:
            if error.field in without:
                return name, error.field
        except (ValueError, ArithmeticError, LookupError):  # made-up numbers are not what it is for
            continue
    return None
