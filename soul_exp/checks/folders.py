"""Whether a run's folder and the cache can be used: nothing stands in their way, and files can be written and read."""

import os
import shutil
import tempfile
from pathlib import Path

from soul_exp import results
from soul_exp.errors import UsageError
from soul_exp.files import existing
from soul_exp.stages import NAMES
from soul_exp.stages.stage import ATTACKS, CHECKPOINTS, LOSSES, MODEL, RECORDS
from soul_exp.stages.trajectory import NAME as TRAJECTORY

FREE_BYTES = 200 * 2**20  # for records, logs and tokenizers, and all of a tiny run, with room to spare


def check_entries(out: Path) -> None:
    """Raises UsageError if a file of a run's folder is a folder, or a folder a file."""
    ranks, typed = out / "ranks", out / results.TYPED
    folders = (out / MODEL, out / RECORDS, out / ATTACKS, out / CHECKPOINTS, ranks, typed)
    for path in (*folders, *(ranks / stage for stage in NAMES)):
        if os.path.lexists(path) and not path.is_dir():
            raise UsageError(f"{path} is a file, where a run has a folder: remove it")
    names = (".lock", results.NAME, results.LOG, results.ERROR, LOSSES, TRAJECTORY)
    for path in (*(out / name for name in names), *typed.glob("*.yaml"), *ranks.glob("*/*.log")):
        if path.is_dir():
            raise UsageError(f"{path} is a folder, where a run writes a file: remove it")


def check_readable(cache: Path) -> None:
    """Raises UsageError unless what stands in the places of the cache and its folders are folders that can be read."""
    for folder in (cache, *(cache / name for name in ("models", "answers", "trials", "scorers", "attacks"))):
        try:
            is_file = os.path.lexists(folder) and not folder.is_dir()
            readable = not folder.is_dir() or os.access(folder, os.R_OK | os.X_OK)
        except PermissionError:  # of a folder above it
            is_file, readable = False, False
        if is_file:
            raise UsageError(f"{folder} is a file, not a folder that runs share: remove it, or type cache=<a folder>")
        if not readable:
            raise UsageError(
                f"{folder} cannot be read by this user: let its owner type chmod go+rx, or type cache=<another folder>"
            )


def check_writable(folder: Path, option: str) -> None:
    """Raises UsageError unless a file can be written to `folder`, or to where it will be made: the check makes none."""
    try:
        here = folder if os.path.lexists(folder) else existing(folder)
        with tempfile.TemporaryFile(dir=here) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        raise UsageError(f"{option} {folder} cannot be written ({error.strerror}): choose another folder") from error
    free = shutil.disk_usage(here).free
    if free < FREE_BYTES:
        raise UsageError(
            f"{option} {folder} has {free / 2**20:.0f} MiB of disk left, expected {FREE_BYTES / 2**20:.0f}: free some"
        )
