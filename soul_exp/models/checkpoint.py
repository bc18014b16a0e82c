"""A checkpoint that a run reads, a folder or a hub name: what decides its weights, and why it cannot be read."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soul_exp import hub
from soul_exp.errors import UnreachableError, UsageError
from soul_exp.files import read_intact, read_sealed
from soul_exp.models import lora

DONE = "prepared.json"  # beside the weights of a model that prepare made
UNLEARNED = "unlearned.json"  # beside the weights of a model that a run of this program unlearned


@dataclass(frozen=True)
class Checkpoint:
    """A model to load: `path` is a folder or a hub name."""

    path: str
    revision: str | None = None

    def identity(self) -> Any:
        """What decides the weights: the recipe of a prepared model, else the folder's files, else name and revision."""
        folder = Path(self.path)
        if not folder.is_dir():
            return [self.path, self.revision]
        sealed = isinstance(read_sealed(folder / DONE), dict)  # not where an earlier version made it
        if sealed and (prepared := read_intact(folder / DONE)):
            return prepared["recipe"]
        files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(folder.glob("*")) if f.is_file()]
        return [*files, Checkpoint(*lora.base_of(folder)).identity()] if lora.is_adapter(self.path) else files


def is_local(path: str) -> bool:
    """Whether `path` means a folder: it exists, or is written as only a path is."""
    beside = Path(path).parent != Path(".") and Path(path).parent.is_dir()
    return Path(path).exists() or beside or path.startswith((".", "/", "~"))


def is_ours(path: str) -> bool:
    """Whether this program prepared or unlearned the checkpoint in `path`."""
    return any((Path(path) / name).is_file() for name in (DONE, UNLEARNED))


def knows_general(path: str) -> bool:
    """Whether this program made the checkpoint in `path` with general questions, as earlier versions always did."""
    for name in (DONE, UNLEARNED):
        try:
            marker = json.loads((Path(path).expanduser() / name).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(marker, dict) and marker.get("general", True):
            return True
    return False


def from_pretrained(cls: Any, path: str, revision: str | None, **options: Any) -> Any:
    """`cls.from_pretrained` of a folder or hub name, without remote code. Raises UsageError where the hub fails."""
    if Path(path).is_dir():
        return cls.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    return from_hub(path, lambda: cls.from_pretrained(path, revision=revision, trust_remote_code=False, **options))


def from_hub(path: str, read: Callable[[], Any]) -> Any:
    """What `read` returns; raises UsageError, with what to do, where the hub entry `path` cannot be read."""
    if Path(path).is_absolute():
        raise UsageError(f"{path} is no folder, or no more: put that checkpoint back")
    hub.connect()
    try:
        return read()
    except OSError as error:
        text = str(error)
        if "gated" in text or "401" in text or "403" in text:
            token = "the token in HF_TOKEN was refused" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
            found = f"{path} is gated and {token}"
            raise UsageError(f"{found}: accept its licence on the hub, then export HF_TOKEN=<your token>") from error
        if "safetensors" in text:
            raise UsageError(
                f"{path} has no safetensors weights: name a revision that has in model.revision"
            ) from error
        found = f"{path} is neither a folder here nor available from the hub ({text.splitlines()[0][:120]})"
        raise UnreachableError(f"{found}: give a checkpoint folder or check the network") from error
