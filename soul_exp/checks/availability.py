"""Why a metric cannot be had: its probe is not asked, does not record what it reads, or there is nobody to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from soul_exp import binding
from soul_exp.artifacts import prepared_models
from soul_exp.checks import dry_run
from soul_exp.errors import UsageError
from soul_exp.evaluation import lm_eval_suite
from soul_exp.evaluation.records import read_retrained
from soul_exp.metrics.answers import SUITE, Answers
from soul_exp.tasks.task import Task


def read_records(config: Mapping[str, Any], task: Task) -> Mapping[str, Answers] | None:
    """The retrained model's answers, where `retrained.records` gives them as a file or a folder of files, else None."""
    path = config["retrained"]["records"]
    if not path:
        return None
    try:
        records = read_retrained(Path(path))
    except FileNotFoundError as error:
        raise UsageError(f"retrained.records={path} does not exist: give records/ of a run or a TOFU log") from error
    except ValueError as error:
        raise UsageError(f"retrained.records: {error}") from error
    for name, given in records.items():
        if name not in task.probes:
            continue
        asked = [item.prompt for item in task.probes[name].items]
        if Path(path).is_dir() and len(given) != len(asked):
            raise UsageError(
                f"retrained.records={path} holds {len(given)} answers to {name}, the task asks {len(asked)} questions: "
                f"give the records of the same task"
            )
        for number, (question, prompt) in enumerate(zip(given.question or (), asked, strict=False), start=1):
            if prompt not in question:
                raise UsageError(
                    f"retrained.records={path}: answer {number} of {name} is to {question[:60]!r}, the task asks "
                    f"{prompt[:60]!r}: give the records of the same task"
                )
    return records


def of(
    config: Mapping[str, Any],
    task: Task,
    metrics: Mapping[str, Callable[..., float]],
    records: Mapping[str, Answers] | None,
) -> dict[str, str]:
    """metric -> why it cannot be had, for those of `metrics` that cannot. `records`: the retrained model's answers."""
    missing = dict(task.missing)
    if prepared_models.published_target(config) is not None:
        missing["holdout"] = "the published target was trained on every author, so none is unseen"
    elif _is_unknown_checkpoint(config) and config["task"].get("num_holdout_authors", 0) is None:
        missing["holdout"] = "whether model.path saw the holdout is unknown: set task.num_holdout_authors if it did not"
    if records is None and not _has_retrained(config, task):
        missing["retrained"] = _no_retrained(config, task)
    if config["utility_suite"] == lm_eval_suite.NONE:
        missing[SUITE] = "utility_suite=none asks nothing of general utility: type utility_suite=embedded or paper"
    found = {}
    for name, metric in metrics.items():
        names = binding.names(metric)
        for wanted in names:
            if wanted in missing:
                found[name] = missing[wanted]
            elif wanted not in (*task.probes, "retrained", SUITE):
                raise UsageError(
                    f"the metric {name} asks for the probe {wanted!r}, but task={config['choices']['task']} offers "
                    f"{', '.join(task.probes)}: remove task.metrics.{name}"
                )
        lack = dry_run.lacking(metric, task.probes) if name not in found else None
        if lack:
            found[name] = missing.get(".".join(lack), f"the probe {lack[0]} records no {lack[1]}")
        if records is not None and name not in found:
            absent = [wanted for wanted in names if wanted not in records and wanted != "retrained"]
            if absent:  # no model has a metric that compares with them, the others have one that does not
                key = name if "retrained" in names else f"retrained.{name}"
                found[key] = f"retrained.records holds no answers to {absent[0]}"
            else:
                _try(metric, records, name)
    return found


def _no_retrained(config: Mapping[str, Any], task: Task) -> str:
    if prepared_models.is_given(config, task):
        return (
            "no retrained model, as model.path is the target as it is: give retrained.path or retrained.records, or "
            "have both trained here with task.trained_before=false"
        )
    prepared = "" if "prepare" in config["stages"] else "add prepare to stages, or "
    return f"no retrained model: {prepared}give retrained.path or retrained.records"


def _try(metric: Callable[..., float], records: Mapping[str, Answers], name: str) -> None:
    """Compute `metric` of the given answers now, so that answers that it cannot read stop the run before it starts."""
    try:
        binding.call(metric, {**records, "retrained": records})
    except ValueError as error:
        raise UsageError(f"retrained.records: the metric {name} cannot be computed from them: {error}") from error


def _has_retrained(config: Mapping[str, Any], task: Task) -> bool:
    """Whether this run will have the retrained model's answers: from a checkpoint, made by prepare, or made before."""
    places = prepared_models.checkpoints(config, task)
    if "retrained" not in places:
        return False
    return bool(
        config["retrained"]["path"]
        or "prepare" in config["stages"]
        or not config["stages"]
        or prepared_models.is_ready(Path(places["retrained"].path))
    )


def _is_unknown_checkpoint(config: Mapping[str, Any]) -> bool:
    path = config["model"]["path"]
    ours = path and any((Path(path) / name).is_file() for name in (prepared_models.DONE, prepared_models.UNLEARNED))
    return config["stages"] == ["evaluate"] and not ours
