"""The errors whose messages a user of the command line reads as they are, and words for such messages."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import InstantiationException


class UsageError(ValueError):
    """Bad input: what was found, what was expected, what to type."""


class UnreachableError(UsageError):
    """A hub that cannot be reached: no other job of a sweep will reach it either."""


class WorkerError(RuntimeError):
    """A worker process failed; the message holds its rank and its own traceback."""


def short(value: object) -> str:
    """`value` as an error message shows it: its repr, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def counted(number: int, noun: str) -> str:
    """`number` and the `noun` in the form that fits: 1 job, 2 jobs."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """The first line of the message of `error`, and the next where it ends in a colon, at most 160 characters of it.

    Of an empty message the name of the class of `error`.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    cause = [re.sub(r"^\w+Error: ", "", line) for line in lines[1:2]] if lines[0].endswith(":") else []
    return " ".join([lines[0], *cause])[:160]


@contextmanager
def explained(errors: type[Exception] | tuple[type[Exception], ...], found: str, advice: str) -> Iterator[None]:
    """Turns one of `errors` in the block into a UsageError: what was `found`, its first line, and the `advice`."""
    try:
        yield
    except UsageError:
        raise
    except errors as error:
        raise UsageError(f"{found} ({first_line(error)}): {advice}") from error


def built(make: Callable[[], Any], group: str) -> Any:
    """What `make` returns; an error of Hydra or of a constructor becomes a UsageError that begins with `group`."""
    try:
        return make()
    except InstantiationException as error:  # Hydra wraps the function's own error
        cause = error.__cause__
        if isinstance(cause, UsageError):
            raise cause from None
        reason = str(cause or "").strip() or type(cause).__name__ if cause is not None else str(error).splitlines()[0]
        raise UsageError(f"{group}: {' '.join(reason.split())[:300]}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{group}: {error}") from error
