"""A checkpoint that a run reads, a folder or a hub name, and what decides its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def is_ours(path: str) -> bool:
    """Whether this program prepared or unlearned the checkpoint in `path`."""
    return any((Path(path) / name).is_file() for name in (DONE, UNLEARNED))


def knows_general(path: str) -> bool:
    """Whether this program made the checkpoint in `path` with general questions in its training.

    Earlier versions, which did not record it, always trained on them.
    """
    markers = [_content(Path(path).expanduser() / name) for name in (DONE, UNLEARNED)]
    return any(isinstance(marker, dict) and marker.get("general", True) for marker in markers)


def _content(marker: Path) -> Any:
    """The JSON in `marker`, its checksum unchecked; None without one."""
    try:
        return json.loads(marker.read_bytes())
    except (OSError, ValueError):
        return None
