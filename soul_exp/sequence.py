"""Requests to forget that come one after the other: each is a run of its own, which starts from what the last one left.

The run's folder holds request-1/, request-2/, ..., each with all that a run has; its own results are the last one's.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from soul_exp import experiment, results
from soul_exp.build import Config, build
from soul_exp.checks import disk
from soul_exp.checks.check import Checked, check, check_hub
from soul_exp.distributed import interrupts
from soul_exp.distributed.join import WorkerGroup
from soul_exp.errors import UsageError
from soul_exp.evaluation import lm_eval_suite
from soul_exp.files import is_intact, locked
from soul_exp.models.checkpoint import UNLEARNED
from soul_exp.results import Results
from soul_exp.stages.stage import MODEL
from soul_exp.tasks.custom import EARLIER, sources_of

log = logging.getLogger(__name__)


def run(
    config: Config, out: Path, group: WorkerGroup | None = None, begin: Callable[[str], None] = log.info
) -> Results | None:
    """Carry out `config` in `out`: one run, or one for each of task.requests; returns the (last) results, if any.

    `begin` is called as by `experiment.run`.
    """
    if config["task"].get("requests") is None:
        return experiment.run(_alone(config), out, group, begin)
    steps = steps_of(config, out)
    _check_sequence(config, group)
    checked = [check(step, folder_of(out, number)) for number, step in enumerate(steps, start=1)]
    works = bool(checked[0].run.stages)
    if works:
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock") if works else nullcontext():  # a second start waits, and then finds it finished
        interrupts.safe_point()
        previous = _finished(steps, checked, out)
        if previous is not None and works and not _unattacked(steps, out):
            log.info("finished before, skipped: %s", out)
            return previous
        first, needed = checked[0].run, disk.together([each.need for each in checked])
        disk.check_run(needed, out, first.cache)
        if works:
            begin(disk.run_sentence(needed, out, first.cache))
            (out / results.NAME).unlink(missing_ok=True)  # of overwrite=true, or of a run that is attacked now
        return _run_requests(steps, out)


def need(config: Config) -> disk.Need | None:
    """What `run` will write to disk, or None if that is not known before its model is read.

    Raises UnreachableError if the hub does not answer for its data or models, and they are not cached here.
    """
    steps = steps_of(config, Path()) if config["task"].get("requests") is not None else [dict(config)]
    runs = [build(step) for step in steps]
    lm_eval_suite.check(runs[0].suite.suite, runs[0].suite.data)
    check_hub(runs[0])
    return disk.together([disk.need(run) for run in runs])


def steps_of(config: Config, out: Path) -> list[dict[str, Any]]:
    """The configuration of each request's run: which one it is, and from the second on where it starts."""
    steps = []
    for number in range(1, len(sources_of(config["task"]["forget"], config["task"]["requests"])) + 1):
        step = {**config, "task": {**config["task"], "request": number}}
        if number > 1:
            step["start"] = str(folder_of(out, number - 1) / MODEL)
        steps.append(step)
    return steps


def _run_requests(steps: list[dict[str, Any]], out: Path) -> Results | None:
    """Carry out one request after the other, until one diverges; the results of the last are the sequence's."""
    for number, step in enumerate(steps, start=1):
        log.info("--- request %d of %d: %s", number, len(steps), step["task"]["requests"][number - 1])
        folder, start = folder_of(out, number), step.get("start")
        begins = "unlearn" in step["stages"] and not (folder / results.NAME).exists()
        if start and begins and not is_intact(Path(start) / UNLEARNED):
            raise UsageError(
                f"{start} is gone or damaged, from which request {number} starts: put it back, or type overwrite=true"
            )
        last = experiment.run(step, folder, begin=lambda sentence: None)
        if last is not None and last.status == "diverged":
            break
    if last is None:
        return None
    note = f"the last of {len(steps)} requests; the results of each are in request-1/ to request-{number}/"
    if last.status == "diverged" and number < len(steps):
        note = f"request {number} of {len(steps)} diverged, so that the later ones were not begun"
    last = replace(last, notes=[*last.notes, note])
    results.write(out, last)
    return last


def _unattacked(steps: list[dict[str, Any]], out: Path) -> bool:
    """Whether an attack on the model of any request is still to be carried out."""
    found = ((step, folder_of(out, number)) for number, step in enumerate(steps, start=1))
    done = ((step, folder, results.read(folder)) for step, folder in found)
    return any(experiment.unattacked(each, step, folder) for step, folder, each in done if each is not None)


def _finished(steps: list[dict[str, Any]], checked: list[Checked], out: Path) -> Results | None:
    """The results in `out` if they are this sequence's. Raises UsageError if they are another's."""
    previous = None if checked[0].run.overwrite else results.read(out)
    if previous is None:
        return None
    number = previous.config["task"].get("request")
    at = number - 1 if isinstance(number, int) and 1 <= number <= len(steps) else -1  # it may have ended early
    return experiment.finished(steps[at], checked[at].run, out)


def _check_sequence(config: Config, group: WorkerGroup | None) -> None:
    """Raises UsageError for what one run can have, but not several in sequence."""
    stages = config["stages"]
    if group is not None:
        raise UsageError(
            f"task.requests needs fresh processes for each request, but {group.launcher} has started these "
            f"{group.size}: type it without {group.launcher}, compute.processes={group.size} starts them"
        )
    if stages not in ([], ["prepare"]) and not {"unlearn", "evaluate"} <= set(stages):
        raise UsageError(
            f"stages={stages} with task.requests: each request starts from the model that the one before left: leave "
            f"stages out, or measure a checkpoint with task.forget in place of task.requests"
        )
    if config["save"] == "none":
        raise UsageError("save=none with task.requests: each request starts from the model before: choose save=final")
    if config["adapter"] and not config["adapter"]["merge"]:
        raise UsageError("an adapter with task.requests: each starts from complete weights: type adapter.merge=true")
    for key in ("path", "records"):
        if config["retrained"][key] and len(config["task"]["requests"]) > 1:
            raise UsageError(f"retrained.{key} is one model, but each request is compared with its own: leave it out")


def _alone(config: Config) -> dict[str, Any]:
    """`config` without the metrics of earlier requests, where there are none."""
    if "requests" not in config["task"]:
        return dict(config)
    metrics = config["task"]["metrics"]
    kept = {name: entry for name, entry in metrics.items() if not name.startswith(f"{EARLIER}_")}
    return {**config, "task": {**config["task"], "metrics": kept}}


def folder_of(out: Path, number: int) -> Path:
    """Where the run of request `number`, from 1, is in the folder of the sequence."""
    return out / f"{results.REQUEST}{number}"
