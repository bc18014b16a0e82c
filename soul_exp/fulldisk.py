"""A disk that is full, told in one sentence."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from soul_exp.errors import UsageError

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
