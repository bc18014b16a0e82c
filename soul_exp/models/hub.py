"""What is read with `from_pretrained`, from a folder or the Hugging Face hub, and the error messages of the hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soul_exp.errors import UsageError


def from_pretrained(cls: Any, path: str, revision: str | None, **options: Any) -> Any:
    """`cls.from_pretrained` of a folder or hub name, without remote code. Raises UsageError where the hub fails."""
    if Path(path).is_dir():
        return cls.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    return from_hub(path, lambda: cls.from_pretrained(path, revision=revision, trust_remote_code=False, **options))


def from_hub(path: str, read: Callable[[], Any]) -> Any:
    """What `read` returns; raises UsageError, with what to do, where the hub entry `path` cannot be read."""
    try:
        return read()
    except OSError as error:
        text = str(error)
        if "gated" in text or "401" in text or "403" in text:
            token = "the token in HF_TOKEN was refused" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
            raise UsageError(
                f"{path} is gated and {token}: accept its licence on the hub, then export HF_TOKEN=<your token>"
            ) from error
        if "safetensors" in text:
            raise UsageError(
                f"{path} has no safetensors weights: name a revision that has, with model.revision="
            ) from error
        raise UsageError(
            f"{path} is neither a folder here nor available from the hub ({text.splitlines()[0][:120]}): "
            f"give a checkpoint folder or check the network"
        ) from error
