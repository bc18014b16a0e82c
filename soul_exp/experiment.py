"""The story of one run: check, prepare, tune where asked for, unlearn, evaluate, results."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from soul_exp import build, results
from soul_exp.artifacts import answer_cache, prepared_models
from soul_exp.checks import disk
from soul_exp.checks.check import Checked, check
from soul_exp.data import content_hash
from soul_exp.distributed import interrupts
from soul_exp.distributed.join import WorkerGroup
from soul_exp.distributed.processes import launch
from soul_exp.errors import UsageError
from soul_exp.files import explain_full_disk
from soul_exp.results import Results
from soul_exp.stages import prepare, tune, unlearn
from soul_exp.training import checkpoints

log = logging.getLogger(__name__)

# these do not change the numbers, or (the data, and so what a sequence starts from) are compared by content
NOT_COMPARED = (
    *("name", "stages", "overwrite", "cache", "save", "compute", "wandb", "choices", "resume", "start"),
    *("input_based", "utility_data"),
)


def need(config: Mapping[str, Any]) -> disk.Need | None:
    """What the run of `config` will write to disk, or None if that is not known before its model is read."""
    return disk.need(config, build.build_task(config))


def run(
    config: Mapping[str, Any],
    out: Path,
    workers: WorkerGroup | None = None,
    part_of_sweep: bool = False,
    begin: Callable[[], None] = lambda: None,
) -> Results | None:
    """Carry out the stages of `config` in `out`; returns the results, or None where the stages end before them.

    Every stage starts workers of its own; where `workers` exist, they unlearn. `begin` is called under
    the run's lock before anything in `out` changes; not where there is nothing to do, nor where the run is refused.
    """
    interrupts.safe_point()
    checked = check(config, out)
    interrupts.safe_point()
    tune.check_tune(config, checked)
    # a second start of the same run waits, and then finds it finished
    with FileLock(out / ".lock"), explain_full_disk(out, Path(config["cache"])):
        return _run(config, checked, out, workers, part_of_sweep, begin)


def _run(
    config: Mapping[str, Any],
    checked: Checked,
    out: Path,
    workers: WorkerGroup | None,
    part_of_sweep: bool,
    begin: Callable[[], None],
) -> Results | None:
    interrupts.safe_point()  # it may have waited for the lock
    previous = finished(config, checked, out)
    if previous is not None:
        log.info("finished before, skipped: %s", out)
        checkpoints.remove_all(out / unlearn.CHECKPOINTS)  # it may have been killed before it could do that
        return previous
    for note in checked.task.notes:
        log.info("%s", note)
    if not config["stages"]:
        log.info("checked, nothing to run (stages=[]): %s", out)
        return None
    if not part_of_sweep:  # else it was said for all jobs
        log.info(disk.run_sentence(checked.need, out, Path(config["cache"])))
    replaced = config["overwrite"] and (out / results.NAME).exists()
    if not replaced:  # else the checkpoint goes too
        _refuse_another_engine(config, checked, out)
    begin()
    _clear(config, out, replaced)
    compute, seconds = config["compute"], {}
    trials: list[dict[str, Any]] = []
    start = time.perf_counter()
    roles = _unanswered(config, checked)
    if roles:  # target and retrained model side by side, one process each
        launch(
            prepare.worker, config, roles, compute["device"],
            processes=len(roles), threads=compute["threads"], logs=out / "ranks" / "prepare", alone=True,
        )  # fmt: skip
    seconds["prepare"] = time.perf_counter() - start
    if tune.is_wanted(config):
        start = time.perf_counter()
        config, trials = tune.tuned(config, checked, fingerprint, out / "ranks" / "tune")
        seconds["tune"] = time.perf_counter() - start
        _refuse_another_engine(config, checked, out)
    if {"unlearn", "evaluate"} & set(config["stages"]):
        decided = fingerprint(config, checked)
        if any(folder.name != decided for folder in (out / unlearn.CHECKPOINTS).glob("*")):
            log.info("%s holds checkpoints of other settings, data or version: not used", out / unlearn.CHECKPOINTS)
        plan = (config, dict(checked.reasons), decided, seconds, str(out), trials)
        logs = out / "ranks" / "unlearn"
        if workers is not None:
            workers.run_on_all(unlearn.worker, *plan, compute=compute, logs=logs)
        else:
            launch(
                unlearn.worker, *plan, processes=compute["processes"], threads=compute["threads"], logs=logs,
                alone=compute["processes"] == 1 and not compute["deepspeed"],
            )  # fmt: skip
    return results.read(out)


def fingerprint(config: Mapping[str, Any], checked: Checked) -> str:
    """A hash of everything that decides a run's numbers."""
    return content_hash([_compared(config), prepared_models.hashes(config, checked.task)])


def _clear(config: Mapping[str, Any], out: Path, replaced: bool) -> None:
    """Remove what a run that does not go on would leave beside its own: old numbers never stand beside a new model.

    `replaced`: whether finished results are there, to be replaced.
    """
    for rest in out.glob(f".{results.NAME}.*"):  # of a run that was killed while it wrote
        rest.unlink()
    if replaced:
        (out / results.NAME).unlink()
    if replaced or config["resume"] == "restart":
        checkpoints.remove_all(out / unlearn.CHECKPOINTS)
    if config["overwrite"] or config["resume"] == "restart":
        shutil.rmtree(out / unlearn.RECORDS, ignore_errors=True)
        if "unlearn" in config["stages"]:  # else model.path may well be this folder's
            shutil.rmtree(out / unlearn.MODEL, ignore_errors=True)
            (out / unlearn.LOSSES).unlink(missing_ok=True)


def _refuse_another_engine(config: Mapping[str, Any], checked: Checked, out: Path) -> None:
    """Raises UsageError if another engine has left a checkpoint of this configuration, unless told what to do."""
    compute = config["compute"]
    engine = checkpoints.engine_of(config["choices"]["compute"], compute["processes"], compute["deepspeed"])
    found = checkpoints.newest_marked(out / unlearn.CHECKPOINTS / fingerprint(config, checked))
    if found and found.marker.engine != engine and config["resume"] == "exact":
        raise UsageError(checkpoints.engine_mismatch(out, found, engine))


def _unanswered(config: Mapping[str, Any], checked: Checked) -> list[str]:
    """The roles that still have to be made, or to answer the probes, before this run's stages can be done."""
    places = prepared_models.checkpoints(config, checked.task)
    if "prepare" not in config["stages"]:  # nothing is trained, but what exists may still have to answer
        places = {
            role: place
            for role, place in places.items()
            if role == "retrained" and (config["retrained"]["path"] or prepared_models.is_ready(Path(place.path)))
        }
    told = {"target": [None, prepared_models.instruction(config)]}  # what each is to be told before the questions
    return [
        role
        for role, place in places.items()
        if any(answer_cache.answers_of(config, checked.task, place, said) is None for said in told.get(role, [None]))
    ]


def finished(config: Mapping[str, Any], checked: Checked, out: Path) -> Results | None:
    """The results in `out` if they are this configuration's. Raises UsageError if they are another's."""
    previous = None if config["overwrite"] else results.read(out)
    if previous is None:
        return None
    tried = [(trial["lr"], trial["gamma"]) for trial in previous.trials]
    differing = _differences(_compared(previous.config, tried), _compared(config, tune.grid(config)))
    before, wanted = prepared_models.baseline(previous.config), prepared_models.baseline(config)
    differing += ["task.system_prompt"] if before and wanted and before != wanted else []
    then, now = previous.data_hashes, prepared_models.hashes(config, checked.task)
    if then.get(prepared_models.TRAINING) != now.pop(prepared_models.TRAINING):
        version = then.get(prepared_models.TRAINING, "3 or earlier")
        differing.insert(0, f"{prepared_models.TRAINING}: {version} before, {prepared_models.VERSION} now")
    differing += [f"data {name}" for name in now if then.get(name) != now[name]]
    if differing:
        raise UsageError(
            f"{out} holds finished results of another configuration ({', '.join(differing[:6])} differ): "
            f"type overwrite=true to replace them, or name=<another name>"
        )
    if wanted and "input_based" not in previous.metrics:  # its model stands; the metrics are taken anew, with that row
        return None
    return previous


def _compared(config: Mapping[str, Any], tried: Sequence[tuple[float, float]] = ()) -> dict[str, Any]:
    """What two runs must share to be the same; of tuned runs not the numbers chosen, but all that were `tried`."""
    if tried:
        rates, gammas = map(list, zip(*tried, strict=True))
        config = {**tune.at(config, rates, gammas), "tuned": None}
    kept = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    kept["task"] = {key: value for key, value in config["task"].items() if key != "system_prompt"}
    form = {key: value for key, value in config["model"]["template"].items() if key != "system"}
    kept["model"] = {**config["model"], "template": form}
    kept["unlearned"] = "unlearn" in config["stages"] or not config["stages"]  # or a checkpoint measured as it is
    kept["tune"] = {key: value for key, value in (config.get("tune") or {}).items() if key != "workers"}
    kept["best_keep"] = config["best_keep"] if config["save"] == "best" else None  # other weights are measured
    kept["train"] = {key: value for key, value in config["train"].items() if key != "gradient_checkpointing"}
    kept["evaluate"] = {key: value for key, value in config["evaluate"].items() if key != "batch_size"}
    kept["prepare"] = {key: value for key, value in config["prepare"].items() if key not in prepared_models.NO_NUMBER}
    return kept


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    """The dotted keys at which two configurations differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)]
    return [] if old == new else [f"{at}: {old} before, {new} now"]
