"""The story of one run: check, prepare, tune where asked for, unlearn, evaluate, results."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from soul_exp import prepare, results, tune, unlearn
from soul_exp.check import Checked, check
from soul_exp.errors import UsageError
from soul_exp.launch import launch
from soul_exp.results import Results
from soul_exp.tasks.task import content_hash

log = logging.getLogger(__name__)

# these do not change the numbers, or (the data) are compared by content
NOT_COMPARED = ("name", "stages", "overwrite", "cache", "save", "compute", "wandb", "choices")


def run(config: Mapping[str, Any], out: Path) -> Results | None:
    """Carry out the stages of `config` in `out`; returns the results, or None where the stages end before them."""
    checked = check(config, out)
    tune.check_tune(config, checked)
    with FileLock(out / ".lock"):  # a second start of the same run waits, and then finds it finished
        return _run(config, checked, out)


def _run(config: Mapping[str, Any], checked: Checked, out: Path) -> Results | None:
    previous = _finished(config, checked, out)
    if previous is not None:
        log.info("finished before, skipped: %s", out)
        return previous
    if not config["stages"]:
        log.info("checked, nothing to run (stages=[]): %s", out)
        return None
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
    if {"unlearn", "evaluate"} & set(config["stages"]):
        launch(
            unlearn.worker, config, dict(checked.reasons), fingerprint(config, checked), seconds, str(out), trials,
            processes=compute["processes"], threads=compute["threads"], logs=out / "ranks" / "unlearn",
            alone=compute["processes"] == 1 and not compute["deepspeed"],
        )  # fmt: skip
    return results.read(out)


def fingerprint(config: Mapping[str, Any], checked: Checked) -> str:
    """A hash of everything that decides a run's numbers."""
    return content_hash([_compared(config), prepare.hashes(config, checked.task)])


def _unanswered(config: Mapping[str, Any], checked: Checked) -> list[str]:
    """The roles that still have to be made, or to answer the probes, before this run's stages can be done."""
    places = prepare.checkpoints(config, checked.task)
    if "prepare" not in config["stages"]:  # nothing is trained, but what exists may still have to answer
        places = {
            role: place
            for role, place in places.items()
            if role == "retrained" and (config["retrained"]["path"] or prepare.is_ready(Path(place.path)))
        }
    return [role for role, place in places.items() if prepare.answers_of(config, checked.task, place) is None]


def _finished(config: Mapping[str, Any], checked: Checked, out: Path) -> Results | None:
    """The results in `out` if they are this configuration's. Raises UsageError if they are another's."""
    previous = None if config["overwrite"] else results.read(out)
    if previous is None:
        return None
    tried = [(trial["lr"], trial["gamma"]) for trial in previous.trials]
    differing = _differences(_compared(previous.config, tried), _compared(config, tune.grid(config)))
    now = prepare.hashes(config, checked.task)
    differing += [f"data {name}" for name in now if previous.data_hashes.get(name) != now[name]]
    if differing:
        raise UsageError(
            f"{out} holds finished results of another configuration ({', '.join(differing[:6])} differ): "
            f"type overwrite=true to replace them, or name=<another name>"
        )
    return previous


def _compared(config: Mapping[str, Any], tried: Sequence[tuple[float, float]] = ()) -> dict[str, Any]:
    """What two runs must share to be the same; of tuned runs not the numbers chosen, but all that were `tried`."""
    if tried:
        rates, gammas = map(list, zip(*tried, strict=True))
        config = {**tune.at(config, rates, gammas), "tuned": None}
    kept = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    kept["unlearned"] = "unlearn" in config["stages"] or not config["stages"]  # or a checkpoint measured as it is
    kept["tune"] = {key: value for key, value in (config.get("tune") or {}).items() if key != "workers"}
    kept["train"] = {key: value for key, value in config["train"].items() if key != "gradient_checkpointing"}
    kept["evaluate"] = {key: value for key, value in config["evaluate"].items() if key != "batch_size"}
    return kept


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    """The dotted keys at which two configurations differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)]
    return [] if old == new else [f"{at}: {old} before, {new} now"]
