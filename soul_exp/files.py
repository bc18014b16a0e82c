"""Files and folders that appear complete or not at all; their checksums; the error message of a full disk."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

from soul_exp.errors import UsageError

log = logging.getLogger(__name__)

SILENT = 2.0  # seconds of waiting for another process, without a line on the log
CHUNK = 2**24  # bytes read at a time
NEARLY_FULL = 2**24  # bytes free; torch's writer gives no reason for its failure: with less free space, it is the disk
FULL = ("No space left on device", "Disk quota exceeded")
TORCH_MESSAGES = ("PytorchStreamWriter failed", "unexpected pos", "file write failed")


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write `path`, text as UTF-8, in one step: it is absent, old or complete, also after a power cut."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # os.replace needs one file system
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes the file private, but results should be readable
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


@contextlib.contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """An empty folder, which takes the place of `folder` in one step at the end of the block, unless that fails.

    Whoever can read the folder above it can read it too: users may share a cache.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for rest in folder.parent.glob(f".{folder.name}.partial*"):  # of a process that was killed
        shutil.rmtree(rest, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        yield partial
        readers = stat.S_IMODE(folder.parent.stat().st_mode) & 0o055
        for path in (partial, *partial.rglob("*")):
            path.chmod(stat.S_IMODE(path.stat().st_mode) | (readers if path.is_dir() else readers & 0o044))
        with contextlib.suppress(UsageError):  # another user has made it meanwhile
            remove(folder)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one on each line; none without the file. Raises UsageError for another line."""
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else (), 1):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{file}, line {number}: found {line[:80]!r}, expected JSON") from error
        if not isinstance(found, dict):
            raise UsageError(f"{file}, line {number}: found {type(found).__name__}, expected a JSON object")
        yield found


def remove(path: Path) -> None:
    """Delete `path`, a file or a folder, if it is there. Raises UsageError if it cannot be deleted."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            log.warning("%s is not a folder: it is removed", path)
            path.unlink(missing_ok=True)
    except OSError as error:
        found = f"{path} is damaged or cannot be read, and this user cannot remove it ({error.strerror})"
        raise UsageError(f"{found}: let its owner remove it, or type cache=<another folder>") from error


def existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def missing(folder: Path) -> list[Path]:
    """`folder` and those above it that do not exist, the innermost first."""
    folder = folder.absolute()
    return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove the folders, one after the other, up to the first that holds anything or cannot be removed."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def shared_folder(folder: Path) -> Path:
    """`folder`, made, if it is not there, with the permissions of the one above it: users may share a cache."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            folder.mkdir()
            folder.chmod(stat.S_IMODE(folder.parent.stat().st_mode))
    return folder


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """In the block, no other process holds the lock file `path`, which any user may hold.

    Waits for it, with one line on the log if that takes longer; raises Timeout after `timeout` seconds unless negative.
    Of a file that another user keeps from this one, each user has a copy: what they do at once they do twice. Raises
    UsageError if there can be no lock.
    """
    try:
        try:
            lock = _acquired(path, timeout)
        except PermissionError:
            lock = _acquired(path.with_name(f"{path.name}.{os.getuid()}"), timeout)
    except Timeout:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be locked ({error.strerror}): remove it, or choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def _acquired(path: Path, timeout: float) -> BaseFileLock:
    lock = FileLock(path, mode=0o666)
    try:
        lock.acquire(timeout=SILENT if timeout < 0 else timeout)
    except Timeout:
        if timeout >= 0:
            raise
        log.info("waiting for another process, which holds %s", path)
        lock.acquire()
    return lock


def mismatch(folder: Path, name: str, files: Mapping[str, Sequence[int]], read: bool = True) -> str | None:
    """How the file `name` in `folder` differs from its (bytes, CRC-32) in `files`; without `read`, in size; or None."""
    path, (size, checksum) = folder / name, files[name]
    try:
        if not path.is_file():
            return f"{name}: missing"
        if path.stat().st_size != size:
            return f"{name}: {path.stat().st_size} bytes, expected {size}"
        if read and size_and_checksum(path)[1] != checksum:
            return f"{name}: checksum differs"
    except PermissionError as error:
        return f"{name}: {error.strerror}"
    return None


def written_by_others(folder: Path) -> Path | None:
    """The first path, `folder` or one below it, that another user could have written or linked; None if there is none.

    Its owner is compared with that of a file which this process writes beside it: a file server may map owners.
    """
    with tempfile.TemporaryFile(dir=folder.parent) as probe:
        own = os.fstat(probe.fileno()).st_uid
    for path in (folder, *sorted(folder.rglob("*"))):
        state = path.lstat()
        if state.st_uid != own or stat.S_ISLNK(state.st_mode) or state.st_mode & stat.S_IWOTH:
            return path
    return None


def file_names(folder: Path) -> list[str]:
    """The paths, relative to `folder`, of all files below it, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def size_and_checksum(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of the file `path`."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum


def hashes(folder: Path, *patterns: str) -> dict[str, str]:
    """File below `folder` whose name fits a pattern -> its SHA-256, 64 hex digits; in the order of their paths."""
    found = sorted(path for pattern in patterns for path in folder.rglob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in found}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON, with its checksum, in one step."""
    write_atomically(path, json.dumps({**content, "checksum": _checksum(content)}, indent=1))


def read_sealed(path: Path) -> dict[str, Any] | str:
    """What `write_sealed` wrote to `path`, or the reason why it cannot be read."""
    try:
        if not path.is_file():
            return f"no {path.name} marker: it was not written completely"
        content = json.loads(path.read_bytes())
        return f"{path.name}: checksum differs" if content.pop("checksum") != _checksum(content) else dict(content)
    except PermissionError as error:
        return f"{path.name}: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{path.name}: not a marker"


def seal(marker: Path, content: Mapping[str, Any]) -> None:
    """Write `marker` into a folder that is otherwise complete: `content`, and size and checksum of every other file."""
    files = {name: size_and_checksum(marker.parent / name) for name in file_names(marker.parent)}
    write_sealed(marker, {**content, "files": files})


def is_intact(marker: Path) -> bool:
    """Whether the folder of `marker` holds what `seal` found in it; a process reads it once and warns once."""
    files = sorted(path for path in marker.parent.rglob("*") if path.is_file())
    return _damage(marker, tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)) is None


def read_intact(marker: Path) -> dict[str, Any] | None:
    content = read_sealed(marker) if is_intact(marker) else None
    return content if isinstance(content, dict) else None


@functools.cache
def _damage(marker: Path, state: Any) -> str | None:
    """The first difference from `marker`, None if there is none; `state` changes with the files."""
    content = read_sealed(marker)
    files = content if isinstance(content, str) else content["files"]
    mismatches = [files] if isinstance(files, str) else (mismatch(marker.parent, name, files) for name in sorted(files))
    found = next(filter(None, mismatches), None)
    if found:
        log.warning("%s is damaged (%s): it is not used", marker.parent, found)
    return found


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@contextlib.contextmanager
def explain_full_disk(*folders: Path, clear: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turns the error of a full disk, after `clear` has made some space, into a UsageError that names the folder.

    So too where the first folder, in which the block works, is gone.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not folders[0].is_dir():
            found = f"{folders[0]} was removed or moved while this command worked in it"
            raise UsageError(f"{found}: type the same command again") from error
        free = {folder: shutil.disk_usage(existing(folder)).free for folder in folders}
        least = min(free, key=lambda folder: free[folder])
        text, code = str(error), getattr(error, "errno", None)
        is_full = code in (errno.ENOSPC, errno.EDQUOT) or any(words in text for words in FULL)
        # a worker that could not write its error to a file has failed with nothing after the line that names it
        is_silent = text.endswith("\n") or any(message in text for message in TORCH_MESSAGES)
        if not is_full and not (is_silent and free[least] < NEARLY_FULL):
            raise
        clear()
        raise UsageError(
            f"the disk of {least} is full ({free[least] / 2**20:.1f} MiB free): delete files, then type the same "
            f"command, which resumes from the last complete checkpoint"
        ) from error
