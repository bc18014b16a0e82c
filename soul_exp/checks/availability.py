"""Why a metric is not available: its probe is missing or does not record what it reads, or no model to compare is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from soul_exp import binding
from soul_exp.artifacts import prepared_models
from soul_exp.build import Config
from soul_exp.checks import dry_run
from soul_exp.errors import UsageError
from soul_exp.evaluation import lm_eval_suite
from soul_exp.evaluation.records import read_retrained
from soul_exp.metrics.answers import SUITE, Answers
from soul_exp.models.checkpoint import is_ours
from soul_exp.run import Run


def read_records(run: Run) -> Mapping[str, Answers] | None:
    """The retrained model's answers, where `retrained.records` gives them as a file or a folder of files, else None."""
    path = run.retrained_records
    if not path:
        return None
    try:
        records = read_retrained(path)
    except FileNotFoundError as error:
        raise UsageError(f"retrained.records={path} does not exist: give records/ of a run or a TOFU log") from error
    except ValueError as error:
        raise UsageError(f"retrained.records: {error}") from error
    for name, given in records.items():
        if name not in run.task.probes:
            continue
        prompts = [item.prompt for item in run.task.probes[name].items]
        if path.is_dir() and len(given) != len(prompts):
            raise UsageError(
                f"retrained.records={path} holds {len(given)} answers to {name}, the task has {len(prompts)} "
                f"questions: give the records of the same task"
            )
        for number, (question, prompt) in enumerate(zip(given.question or (), prompts, strict=False), start=1):
            if prompt not in question:
                raise UsageError(
                    f"retrained.records={path}: answer {number} of {name} answers {question[:60]!r}, the task asks "
                    f"{prompt[:60]!r}: give the records of the same task"
                )
    return records


def reasons(config: Config, run: Run, records: Mapping[str, Answers] | None) -> dict[str, str]:
    """metric -> why it is not available, for those that are not. `records`: the retrained model's answers, if given."""
    task, missing = run.task, dict(run.task.missing)
    if run.published is not None:
        missing["holdout"] = "the published target was trained on every author, so none is unseen"
    elif _is_unknown_checkpoint(run) and config["task"].get("num_holdout_authors", 0) is None:
        missing["holdout"] = "whether model.path saw the holdout is unknown: set task.num_holdout_authors if it did not"
    if records is None and not _has_retrained(run):
        missing["retrained"] = _no_retrained(run)
    if run.suite.suite == lm_eval_suite.NONE:
        missing[SUITE] = "utility_suite=none measures no general utility: type utility_suite=embedded or paper"
    found = {}
    for name, metric in run.metrics.items():
        names = binding.names(metric)
        for wanted in names:
            if wanted in missing:
                found[name] = missing[wanted]
            elif wanted not in (*task.probes, "retrained", SUITE):
                raise UsageError(
                    f"the metric {name} needs the probe {wanted!r}, but task={run.choices.task} offers "
                    f"{', '.join(task.probes)}: remove task.metrics.{name}"
                )
        unrecorded = dry_run.missing_field(metric, task.probes) if name not in found else None
        if unrecorded:
            found[name] = missing.get(".".join(unrecorded), f"the probe {unrecorded[0]} records no {unrecorded[1]}")
        if records is not None and name not in found:
            absent = [wanted for wanted in names if wanted not in records and wanted != "retrained"]
            if absent:  # no model has a metric that compares with them, the others have one that does not
                key = name if "retrained" in names else f"retrained.{name}"
                found[key] = f"retrained.records holds no answers to {absent[0]}"
            else:
                _try(metric, records, name)
    return found


def _no_retrained(run: Run) -> str:
    if run.target_is_given:
        return (
            "no retrained model, as model.path is the target as it is: give retrained.path or retrained.records, or "
            "have both trained here with task.trained_before=false"
        )
    prepared = "" if "prepare" in run.stages else "add prepare to stages, or "
    return f"no retrained model: {prepared}give retrained.path or retrained.records"


def _try(metric: Callable[..., float], records: Mapping[str, Answers], name: str) -> None:
    """Compute `metric` of the given answers now, so that answers that it cannot read stop the run before it starts."""
    try:
        binding.call(metric, {**records, "retrained": records})
    except ValueError as error:
        raise UsageError(f"retrained.records: the metric {name} cannot be computed from them: {error}") from error


def _has_retrained(run: Run) -> bool:
    """Whether this run will have the retrained model's answers: from a checkpoint, made by prepare, or made before."""
    places = prepared_models.checkpoints(run)
    if "retrained" not in places:
        return False
    made = run.retrained or "prepare" in run.stages or not run.stages
    return bool(made) or prepared_models.is_ready(Path(places["retrained"].path))


def _is_unknown_checkpoint(run: Run) -> bool:
    return run.measures_only and not (run.model.path and is_ours(run.model.path))
