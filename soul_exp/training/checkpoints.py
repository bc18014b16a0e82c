"""Which checkpoints are complete, which engine wrote them, and which are removed; every rank gets the same answer.

A checkpoint counts once its COMPLETE marker is there: written last, in one step, with the size and the checksum of
every other file. `checkpoint-N` is written by transformers; nothing here depends on its content.
"""

import functools
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soul_exp.distributed.ranks import barrier, broadcast, divide_work, is_first
from soul_exp.files import file_names, mismatch, read_sealed, size_and_checksum, write_sealed, written_by_others

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE"
NUM_KEPT = 2  # where the newest is damaged, the one before it is used
REMOVED = ".removed-"  # a checkpoint is renamed to this and its name before it is deleted: half of one never counts


@dataclass(frozen=True)
class Engine:
    """How ranks share a model: the optimizer state of a checkpoint can be read by the engine that wrote it only."""

    compute: str
    processes: int
    stage: int | None = None  # of ZeRO; None: no DeepSpeed

    def __str__(self) -> str:
        stage = "" if self.stage is None or str(self.stage) in self.compute else f" at ZeRO stage {self.stage}"
        return f"compute={self.compute}{stage} with {self.processes} process{'es' if self.processes > 1 else ''}"


@dataclass(frozen=True)
class CompleteCheckpoint:
    """A checkpoint that has its marker, whose content these are."""

    path: Path
    seconds: float  # of training until then, over all starts of the run
    engine: Engine
    diverged: str | None  # why the training stopped there, if it did
    notes: Sequence[str]  # on the training until there, for the reader of the results
    files: Mapping[str, Sequence[int]]  # path in the checkpoint -> bytes, CRC-32

    @property
    def step(self) -> int:
        return _step(self.path)


def engine_of(compute: str, processes: int, deepspeed: Mapping[str, Any] | None) -> Engine:
    """The engine of a configuration: its choice of compute, and the ZeRO stage of the `deepspeed` dict."""
    return Engine(compute, processes, deepspeed.get("zero_optimization", {}).get("stage", 0) if deepspeed else None)


def obstacle(folder: Path, found: CompleteCheckpoint, engine: Engine) -> str | None:
    """Why a run with `engine` in `folder` cannot read all of the checkpoint `found`, as a message; None if it can."""
    advice = (
        "resume=weights to continue from its weights (momentum starts at 0 and curvature with a new pass, so the "
        "numbers will differ a little), or resume=restart to start again"
    )
    if found.engine != engine:
        return (
            f"{folder} holds {found.path.name} of {found.engine}, this is {engine}: type the same compute, or {advice}"
        )
    if engine.stage is not None and (path := written_by_others(found.path)):
        return (
            f"another user could have written {path}, and DeepSpeed reads pickled files, which can run any code: "
            f"type {advice}. If it is yours, make it so with chown and chmod o-w"
        )
    return None


def mark_complete(checkpoint: Path, seconds: float, engine: Engine, diverged: str | None, notes: Sequence[str]) -> None:
    """Write COMPLETE, and remove older checkpoints until NUM_KEPT are left; every rank calls it."""
    barrier()  # every rank has written its share
    names = broadcast(lambda: file_names(checkpoint))
    files = divide_work(names, lambda name: size_and_checksum(checkpoint / name))
    if is_first():
        content = {"seconds": seconds, "engine": asdict(engine), "diverged": diverged, "notes": list(notes)}
        write_sealed(checkpoint / COMPLETE, {**content, "files": files})
        for older in _numbered(checkpoint.parent)[NUM_KEPT:]:
            remove(older)


def last_complete(folder: Path) -> CompleteCheckpoint | None:
    """The newest complete checkpoint in `folder`; damaged ones are logged and removed. Every rank calls it."""
    numbered = broadcast(lambda: _numbered(folder))
    damaged, found = [], None
    for checkpoint in numbered:
        read = broadcast(functools.partial(read_marker, checkpoint))
        reason = read if isinstance(read, str) else _damage(read)
        if isinstance(read, CompleteCheckpoint) and reason is None:
            found = read
            break
        damaged.append((checkpoint, reason))
    if is_first():
        for checkpoint, reason in damaged:
            instead = found.path.name if found else "the start"
            log.warning("%s is damaged (%s): %s is used instead", checkpoint.name, reason, instead)
            remove(checkpoint)
        for checkpoint in numbered[len(damaged) + 1 :]:  # not needed now: sizes are compared, contents are not read
            read = read_marker(checkpoint)
            if isinstance(read, str) or any(mismatch(checkpoint, name, read.files, read=False) for name in read.files):
                remove(checkpoint)
        for rest in folder.glob(f"{REMOVED}*"):
            shutil.rmtree(rest)
    barrier()
    return found


def newest_marked(folder: Path) -> CompleteCheckpoint | None:
    """The newest checkpoint in `folder` that has a marker; its other files are not read. One process may call it."""
    return next((read for read in map(read_marker, _numbered(folder)) if isinstance(read, CompleteCheckpoint)), None)


def read_marker(checkpoint: Path) -> CompleteCheckpoint | str:
    """`checkpoint` with the content of its marker, or the reason why it has none."""
    found = read_sealed(checkpoint / COMPLETE)
    try:
        if isinstance(found, str):
            return found
        return CompleteCheckpoint(checkpoint, **{**found, "engine": Engine(**found["engine"])})
    except (TypeError, KeyError):
        return f"{COMPLETE}: not a marker"


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a kill leaves nothing that looks like one."""
    aside = checkpoint.with_name(f"{REMOVED}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def remove_all(folder: Path) -> None:
    """Delete the checkpoints of a finished training."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_unmarked(folder: Path) -> None:
    """Delete every checkpoint below `folder` that has no marker: an error stopped its writing."""
    for checkpoint in folder.rglob("checkpoint-*"):
        if not (checkpoint / COMPLETE).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)


def _damage(found: CompleteCheckpoint) -> str | None:
    """The first difference from the marker, None if there is none; all ranks call it and share the reading of files."""
    mismatches = divide_work(sorted(found.files), lambda name: mismatch(found.path, name, found.files))
    return next((mismatches[name] for name in sorted(mismatches) if mismatches[name]), None)


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, complete or not, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
