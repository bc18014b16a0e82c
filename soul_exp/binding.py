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
    positional = [
        name
        for name, parameter in inspect.signature(inner).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    sources = {name: given.get(name, name) for name in positional}
    return inner, sources, {name: value for name, value in given.items() if name not in sources}
