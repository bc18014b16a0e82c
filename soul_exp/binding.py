"""Calls by parameter name: positional parameters get values of the run, keyword-only ones constants of the YAML."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def names(function: Callable[..., Any]) -> tuple[str, ...]:
    """What `function` needs from the run: its positional parameters; a partial's `answers="forget"` renames one."""
    return tuple(_bound(function)[1].values())


def call(function: Callable[..., Any], available: Mapping[str, Any]) -> Any:
    """The result of `function` with the values that it names, taken from `available`."""
    inner, sources, constants = _bound(function)
    return inner(**{parameter: available[source] for parameter, source in sources.items()}, **constants)


def _bound(function: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, str], dict[str, Any]]:
    """The plain function; positional parameter -> name of its value; keyword-only parameter -> constant."""
    inner, given = (function.func, function.keywords) if isinstance(function, functools.partial) else (function, {})
    sources = {name: given.get(name, name) for name in _positional(inner)}
    return inner, sources, {name: value for name, value in given.items() if name not in sources}


@functools.lru_cache(maxsize=256)  # an interval calls a metric thousands of times
def _positional(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD))
