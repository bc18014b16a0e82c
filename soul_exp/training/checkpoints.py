"""Which checkpoints are whole, which engine wrote them, and which are removed; every rank is told the same.

A checkpoint counts once its COMPLETE marker is there: written last, in one step, with the size and the checksum of
every other file. `checkpoint-N` is written by transformers; nothing here depends on what is in it.
"""

from __future__ import annotations

import functools
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soul_exp.distributed.ranks import agreed, is_first, shared, wait
from soul_exp.files import file_names, mismatch, read_sealed, size_and_checksum, write_sealed

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE"
KEPT = 2  # a damaged one is passed over for the one before it
REMOVED = ".removed-"  # a checkpoint gets this before its name before it is deleted: half of one never counts


@dataclass(frozen=True)
class Engine:
    """What a checkpoint's optimizer state was divided by: it can be read back by the same only."""

    compute: str
    processes: int
    stage: int | None = None  # of ZeRO; None: no DeepSpeed

    def __str__(self) -> str:
        stage = "" if self.stage is None or str(self.stage) in self.compute else f" at ZeRO stage {self.stage}"
        return f"compute={self.compute}{stage} with {self.processes} process{'es' if self.processes > 1 else ''}"


@dataclass(frozen=True)
class Marker:
    """What COMPLETE says of its checkpoint."""

    seconds: float  # of training until then, over all starts of the run
    engine: Engine
    diverged: str | None  # why the training stopped there, if it did
    notes: Sequence[str]  # what a reader of the results has to know of the way until there
    files: Mapping[str, Sequence[int]]  # path in the checkpoint -> bytes, CRC-32


@dataclass(frozen=True)
class Whole:
    """A checkpoint that was found to be whole."""

    path: Path
    marker: Marker

    @property
    def step(self) -> int:
        return _step(self.path)


def engine_of(compute: str, processes: int, deepspeed: Mapping[str, Any] | None) -> Engine:
    """The engine of a configuration: its choice of compute, and the ZeRO stage of the `deepspeed` dict."""
    return Engine(compute, processes, deepspeed.get("zero_optimization", {}).get("stage", 0) if deepspeed else None)


def refusal(place: Path, found: Whole, engine: Engine) -> str:
    """What to tell a user who has started `engine` where another one left a checkpoint."""
    return (
        f"{place} holds {found.path.name} of {found.marker.engine}, this is {engine}: type the same compute, or "
        f"resume=weights to continue from its weights (momentum and curvature start anew, so the numbers will differ a "
        f"little), or resume=restart to begin anew"
    )


def continued(found: Whole) -> str:
    """What a reader of the results has to know of a training that went on with another engine."""
    return (
        f"continued from the weights of {found.path.name} of {found.marker.engine}: momentum and curvature started "
        f"anew there"
    )


def mark(checkpoint: Path, seconds: float, engine: Engine, diverged: str | None, notes: Sequence[str]) -> None:
    """Every rank calls it when it has written its share: COMPLETE appears, and of the older ones KEPT - 1 stay."""
    wait()  # every rank has written its share
    names = agreed(lambda: file_names(checkpoint))
    files = shared(names, lambda name: size_and_checksum(checkpoint / name))
    if is_first():
        write_sealed(checkpoint / COMPLETE, asdict(Marker(seconds, engine, diverged, list(notes), files)))
        for older in _numbered(checkpoint.parent)[KEPT:]:
            remove(older)


def last_complete(folder: Path) -> Whole | None:
    """Every rank calls it: the newest whole checkpoint in `folder`; those that are not are named and removed."""
    numbered = agreed(lambda: _numbered(folder))
    damaged, found = [], None
    for checkpoint in numbered:
        marker = agreed(functools.partial(read_marker, checkpoint))
        reason = marker if isinstance(marker, str) else _damage(checkpoint, marker)
        if reason is None:
            found = Whole(checkpoint, marker)
            break
        damaged.append((checkpoint, reason))
    if is_first():
        for checkpoint, reason in damaged:
            instead = found.path.name if found else "the start"
            log.warning("%s is damaged (%s): passed over for %s", checkpoint.name, reason, instead)
            remove(checkpoint)
        for checkpoint in numbered[len(damaged) + 1 :]:  # not needed now: looked at, but not read
            marker = read_marker(checkpoint)
            if isinstance(marker, str) or any(
                mismatch(checkpoint, name, marker.files, read=False) for name in marker.files
            ):
                remove(checkpoint)
        for rest in folder.glob(f"{REMOVED}*"):
            shutil.rmtree(rest)
    wait()
    return found


def newest(folder: Path) -> Whole | None:
    """The newest checkpoint in `folder` that has a marker, unread: one process may ask what engine wrote it."""
    for checkpoint in _numbered(folder):
        marker = read_marker(checkpoint)
        if isinstance(marker, Marker):
            return Whole(checkpoint, marker)
    return None


def read_marker(checkpoint: Path) -> Marker | str:
    """The marker of `checkpoint`, or why it has none."""
    found = read_sealed(checkpoint / COMPLETE)
    try:
        return found if isinstance(found, str) else Marker(**{**found, "engine": Engine(**found["engine"])})
    except (TypeError, KeyError):
        return f"{COMPLETE}: not a marker"


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; from the first moment on it does not look like one."""
    aside = checkpoint.with_name(f"{REMOVED}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def remove_all(folder: Path) -> None:
    """Delete the checkpoints of a finished training."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_unmarked(folder: Path) -> None:
    """Delete what was being written anywhere below `folder` when something went wrong."""
    for checkpoint in folder.rglob("checkpoint-*"):
        if not (checkpoint / COMPLETE).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)


def _damage(checkpoint: Path, marker: Marker) -> str | None:
    """What differs from what `marker` says, the files being read by all ranks together; None if nothing does."""
    misfits = shared(sorted(marker.files), lambda name: mismatch(checkpoint, name, marker.files))
    return next((misfits[name] for name in sorted(misfits) if misfits[name]), None)


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


# --- ranks ----------------------------------------------------------------------------------------------------------
