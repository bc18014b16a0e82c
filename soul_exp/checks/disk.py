"""What weights and optimizer states a run or a sweep will write: compared with what is free before work starts."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from soul_exp.artifacts import prepared_models
from soul_exp.checks.optimizer import num_weights
from soul_exp.errors import UsageError, counted
from soul_exp.files import existing
from soul_exp.run import Run

BYTES = {"float32": 4, "bfloat16": 2}  # of a weight
STATES = 2 * 4  # bytes a weight: Adam's and Sophia's two moments in fp32, the most that an elementwise optimizer keeps
MASTER = 4  # bytes a weight: the fp32 weights that ZeRO keeps of its own
CHECKPOINTS = 2  # the older one goes when the newer one is complete
GIB = 2**30


@dataclass(frozen=True)
class Need:
    """What one run writes, in bytes; `prepared` names the folders in the cache that are still to be made."""

    model: int  # stays
    checkpoints: int  # goes when the run is finished
    prepared: Mapping[Path, int]


def need(run: Run) -> Need | None:
    """What `run` will write, or None if its model's size is unknown."""
    counted = num_weights(run)
    if counted is None:
        return None
    size = BYTES[run.model.dtype]
    model, written = counted.all * size, counted.trained * size  # of an adapter only its own weights are written
    states = counted.trained * (STATES + (MASTER if run.compute.deepspeed else 0))
    kept = model if run.adapter and run.adapter.merge else written
    best = 2 * written if run.save == "best" else 0  # the former best goes when the new one is complete
    made = prepared_models.recipes(run).values() if "prepare" in run.stages else ()
    folders = [prepared_models.folder_of(run.cache, made_by) for made_by in made]
    fresh = model if run.model.path else counted.all * BYTES["float32"]  # from scratch it is made in fp32
    return Need(
        model=kept if run.unlearns and run.save != "none" else 0,
        checkpoints=CHECKPOINTS * (written + states) + best if run.unlearns and run.schedule.save_steps else 0,
        prepared={folder: fresh for folder in folders if not prepared_models.is_ready(folder)},
    )


def together(needs: Sequence[Need | None], at_once: int = 1) -> Need | None:
    """What runs, of which `at_once` are side by side, need in all; None if it is unknown of one."""
    known = [need for need in needs if need is not None]
    if len(known) < len(needs):
        return None
    return Need(
        model=sum(need.model for need in known),
        checkpoints=sum(sorted(need.checkpoints for need in known)[-at_once:]),
        prepared={folder: size for need in known for folder, size in need.prepared.items()},
    )


def check_run(needed: Need | None, out: Path, cache: Path) -> None:
    """Raises UsageError if the run in `out` does not fit; what it has written there before counts as its own."""
    if needed is not None:
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        here = max(0, needed.model + needed.checkpoints - written)
        _check([(out, here), (cache, sum(needed.prepared.values()))], "this run", "save=none keeps no model")


def run_sentence(needed: Need | None, out: Path, cache: Path) -> str:
    if needed is None:
        return f"disk: what this run will need is unknown before the model is read, {_free(out)} are free"
    parts = f"{amount(needed.model)} of model, {amount(needed.checkpoints)} of checkpoints while it runs"
    prepared = sum(needed.prepared.values())
    elsewhere = f", {amount(prepared)} of prepared models in {cache}" if prepared else ""
    here = amount(needed.model + needed.checkpoints)
    return f"disk: about {here} in {out} ({parts}){elsewhere}; {_free(out)} are free"


def check_sweep(needs: Sequence[Need | None], folder: Path, cache: Path, at_once: int) -> str:
    """One line on what a sweep will need, `at_once` of its jobs side by side. Raises UsageError if it does not fit."""
    jobs, known = len(needs), [need for need in needs if need is not None]
    total = together(known, at_once)
    if not known or total is None:
        return (
            f"{counted(jobs, 'job')}: what they will need is unknown before a model is read, {_free(folder)} are free"
        )
    here, in_cache = total.model + total.checkpoints, sum(total.prepared.values())
    models = sum(need.model > 0 for need in known)
    parts = [f"{counted(models, 'model')}, {amount(total.model)}"] if models else []
    parts += [f"checkpoints while a job runs, {amount(total.checkpoints)}"] if total.checkpoints else []
    elsewhere = (
        f" and {amount(in_cache)} in {cache} ({counted(len(total.prepared), 'prepared model')})" if in_cache else ""
    )
    what = f"{counted(jobs, 'job')} will need about {amount(here)} in {folder} ({'; '.join(parts) or 'records only'})"
    more = f"; of {jobs - len(known)} more it is unknown" if len(known) < jobs else ""
    _check([(folder, here), (cache, in_cache)], counted(jobs, "job"), "save=none keeps no models")
    return f"{what}{elsewhere}{more}; {_free(folder)} are free"


def _check(wanted: Sequence[tuple[Path, int]], who: str, advice: str) -> None:
    """Raises UsageError if what is wanted of one file system, by all folders on it, is more than it has."""
    by_device: dict[int, list[tuple[Path, int]]] = {}
    for folder, size in wanted:
        by_device.setdefault(os.stat(existing(folder)).st_dev, []).append((folder, size))
    for here in by_device.values():
        total = sum(size for _, size in here)
        free = shutil.disk_usage(existing(here[0][0])).free
        if total > free:
            folders = " and ".join(str(folder) for folder, size in here if size)
            raise UsageError(
                f"{who} will need about {amount(total)} in {folders}, {amount(free)} are free: free some, "
                f"or type {advice}"
            )


def _free(folder: Path) -> str:
    return amount(shutil.disk_usage(existing(folder)).free)


def amount(size: float) -> str:
    """Two digits of it: 1.3 GiB, 48 MiB."""
    size, unit = (size / GIB, "GiB") if size >= GIB else (size / 2**20, "MiB")
    return f"{size:.1f} {unit}" if size < 10 else f"{size:.0f} {unit}"
