"""How long each stage of an evaluation takes, in the process that asks for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_RUNNING: ContextVar[dict[str, float] | None] = ContextVar("running", default=None)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """In the block, stage -> wall-clock seconds of each `stage`, in the order in which they first end."""
    found: dict[str, float] = {}
    token = _RUNNING.set(found)
    try:
        yield found
    finally:
        _RUNNING.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """The block, or the function that it decorates, is the stage `name` of an evaluation that is `timed`, if one is."""
    start = time.perf_counter()
    yield
    if (running := _RUNNING.get()) is not None:
        running[name] = running.get(name, 0.0) + time.perf_counter() - start
