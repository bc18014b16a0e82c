"""The errors that a user of the command line is meant to read as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.errors import InstantiationException


class UsageError(ValueError):
    """Bad input, in one sentence: what was found, what was expected, what to type."""


class WorkerError(RuntimeError):
    """A worker process failed; the message holds its rank and its own traceback."""


def built(make: Callable[[], Any], group: str) -> Any:
    """What `make` returns; raises UsageError with one sentence, after `group`, for what Hydra or a constructor says."""
    try:
        return make()
    except InstantiationException as error:  # Hydra wraps whatever the function itself said
        cause = error.__cause__
        if isinstance(cause, UsageError):
            raise cause from None
        said = str(cause or "").strip() or type(cause).__name__ if cause is not None else str(error).splitlines()[0]
        raise UsageError(f"{group}: {' '.join(said.split())[:300]}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{group}: {error}") from error
