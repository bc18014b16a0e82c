"""Which checkpoints are whole, which engine wrote them, and which are removed; every rank is told the same.

A checkpoint counts once its COMPLETE marker is there: written last, in one step, with the size and the checksum of
every other file. `checkpoint-N` is written by transformers; nothing here depends on what is in it.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from soul_exp.files import write_whole

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE"
KEPT = 2  # a damaged one is passed over for the one before it
REMOVED = ".removed-"  # a checkpoint gets this before its name before it is deleted: half of one never counts
CHUNK = 2**24  # bytes read at a time


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
    _wait()  # every rank has written its share
    names = agreed(lambda: _names(checkpoint))
    files = _shared(names, lambda name: _size_and_sum(checkpoint / name))
    if _is_first():
        write_sealed(checkpoint / COMPLETE, asdict(Marker(seconds, engine, diverged, list(notes), files)))
        for older in _numbered(checkpoint.parent)[KEPT:]:
            remove(older)


def last_complete(folder: Path) -> Whole | None:
    """Every rank calls it: the newest whole checkpoint in `folder`; those that are not are named and removed."""
    numbered = agreed(lambda: _numbered(folder))
    damaged, found = [], None
    for checkpoint in numbered:
        marker = agreed(functools.partial(read_marker, checkpoint))
        reason = marker if isinstance(marker, str) else _fault(checkpoint, marker)
        if reason is None:
            found = Whole(checkpoint, marker)
            break
        damaged.append((checkpoint, reason))
    if _is_first():
        for checkpoint, reason in damaged:
            instead = found.path.name if found else "the start"
            log.warning("%s is damaged (%s): passed over for %s", checkpoint.name, reason, instead)
            remove(checkpoint)
        for checkpoint in numbered[len(damaged) + 1 :]:  # not needed now: looked at, but not read
            marker = read_marker(checkpoint)
            if isinstance(marker, str) or any(
                _misfit(checkpoint, name, marker.files, read=False) for name in marker.files
            ):
                remove(checkpoint)
        for rest in folder.glob(f"{REMOVED}*"):
            shutil.rmtree(rest)
    _wait()
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


def _fault(checkpoint: Path, marker: Marker) -> str | None:
    """What differs from what `marker` says, the files being read by all ranks together; None if nothing does."""
    misfits = _shared(sorted(marker.files), lambda name: _misfit(checkpoint, name, marker.files))
    return next((misfits[name] for name in sorted(misfits) if misfits[name]), None)


def _misfit(folder: Path, name: str, files: Mapping[str, Sequence[int]], read: bool = True) -> str | None:
    path, (size, checksum) = folder / name, files[name]
    if not path.is_file():
        return f"{name}: missing"
    if path.stat().st_size != size:
        return f"{name}: {path.stat().st_size} bytes, expected {size}"
    if read and _size_and_sum(path)[1] != checksum:
        return f"{name}: checksum differs"
    return None


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _size_and_sum(path: Path) -> tuple[int, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON, with its checksum, in one step."""
    write_whole(path, json.dumps({**content, "checksum": _checksum(content)}, indent=1))


def read_sealed(path: Path) -> dict[str, Any] | str:
    """What `write_sealed` wrote to `path`, or why that is not known."""
    if not path.is_file():
        return f"no {path.name} marker: it was not written to its end"
    try:
        content = json.loads(path.read_bytes())
        return f"{path.name}: checksum differs" if content.pop("checksum") != _checksum(content) else dict(content)
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{path.name}: not a marker"


def seal(marker: Path, content: Mapping[str, Any]) -> None:
    """Write `marker` into a finished folder: `content`, and size and checksum of every other file there."""
    files = {name: _size_and_sum(marker.parent / name) for name in _names(marker.parent)}
    write_sealed(marker, {**content, "files": files})


def is_sound(marker: Path) -> bool:
    """Whether the folder of `marker` holds what `seal` found in it; a process reads it once and warns once."""
    files = sorted(path for path in marker.parent.rglob("*") if path.is_file())
    return _damage(marker, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)) is None


def read_sound(marker: Path) -> dict[str, Any] | None:
    """The content of `marker`, if its folder is sound."""
    content = read_sealed(marker) if is_sound(marker) else None
    return content if isinstance(content, dict) else None


@functools.cache
def _damage(marker: Path, state: Any) -> str | None:
    """What differs from what `marker` says; `state` changes with the files."""
    content = read_sealed(marker)
    files = content if isinstance(content, str) else content["files"]
    misfits = [files] if isinstance(files, str) else (_misfit(marker.parent, name, files) for name in sorted(files))
    found = next(filter(None, misfits), None)
    if found:
        log.warning("%s is damaged (%s): it is not used", marker.parent, found)
    return found


def _checksum(said: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


# --- ranks ----------------------------------------------------------------------------------------------------------


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def agreed(decide: Callable[[], Any]) -> Any:
    """What rank 0 decides."""
    said = [decide() if _is_first() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    return said[0]


def _shared(names: Sequence[str], work: Callable[[str], Any]) -> dict[str, Any]:
    """name -> `work(name)`, each done by one rank and known to all: no rank reads every file."""
    if not dist.is_initialized():
        return {name: work(name) for name in names}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {name: work(name) for name in names[dist.get_rank() :: dist.get_world_size()]})
    return {name: value for part in parts for name, value in part.items()}
