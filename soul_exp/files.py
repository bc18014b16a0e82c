"""Files that are there complete or not at all, with checksums; and what a full disk did."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from soul_exp.errors import UsageError

log = logging.getLogger(__name__)


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write `path`, text as UTF-8, in one step: it is absent, old or whole, never half, also after a power cut."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # os.replace needs one file system
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; results are to be shared
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


CHUNK = 2**24  # bytes read at a time


def mismatch(folder: Path, name: str, files: Mapping[str, Sequence[int]], read: bool = True) -> str | None:
    path, (size, checksum) = folder / name, files[name]
    if not path.is_file():
        return f"{name}: missing"
    if path.stat().st_size != size:
        return f"{name}: {path.stat().st_size} bytes, expected {size}"
    if read and size_and_checksum(path)[1] != checksum:
        return f"{name}: checksum differs"
    return None


def file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def size_and_checksum(path: Path) -> tuple[int, int]:
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
    files = {name: size_and_checksum(marker.parent / name) for name in file_names(marker.parent)}
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
    misfits = [files] if isinstance(files, str) else (mismatch(marker.parent, name, files) for name in sorted(files))
    found = next(filter(None, misfits), None)
    if found:
        log.warning("%s is damaged (%s): it is not used", marker.parent, found)
    return found


def _checksum(said: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


NEARLY = 2**24  # bytes; torch's writer does not say why it failed: with less than this left, the disk is why


TORCH = ("PytorchStreamWriter failed", "unexpected pos", "file write failed")


@contextlib.contextmanager
def full_disk_told(*folders: Path, cleared: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turns an error that a full disk caused into a UsageError that names the folder and what is free.

    `cleared` is called first: what it deletes makes room for the error's own report.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = {folder: shutil.disk_usage(folder).free for folder in folders}
        least = min(free, key=lambda folder: free[folder])
        if not _is_full(error, free[least]):
            raise
        cleared()
        raise UsageError(
            f"the disk of {least} is full ({free[least] / 2**20:.1f} MiB free): make room, then type the same command, "
            f"which resumes from the last complete checkpoint"
        ) from error


def _is_full(error: BaseException, free: int) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return True
    # a worker that could not even write down its error has failed with nothing after the line that says so
    return free < NEARLY and (any(said in text for said in TORCH) or text.endswith("\n"))
