"""Types and ranges that the value of an option may have; a parameter states its own as `Annotated[int, COUNT]`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

WORDS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}  # YAML 1.1's
WORDS |= {"y": "true", "t": "true", "n": "false", "f": "false"}
MEANT = {**WORDS, "1": "true", "0": "false", "none": "false"}


MOST = 2**31 - 1  # of a count: what libraries store in 32 bits


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`; `above` excludes `low` itself, `whole` requires an integer, `null` allows null."""

    low: float
    high: float = math.inf
    whole: bool = False
    above: bool = False
    null: bool = False

    def expected(self) -> str:
        """A description of the values, for messages and help."""
        kind = "a whole number" if self.whole else "a number"
        low = f"above {self.low:g}" if self.above else f"of {self.low:g} or more"
        upto = f", at most {self.high!s}" if self.high not in (math.inf, MOST) else ""
        return f"{kind} {low}{upto}{', or null' if self.null else ''}"

    def fits(self, value: Any) -> bool:
        if value is None:
            return self.null
        if isinstance(value, bool) or not isinstance(value, int | float) or (self.whole and not isinstance(value, int)):
            return False
        return math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low)

    def mismatch(self, key: str, value: Any) -> str | None:
        """An error message about `key=value`, or None if the option may have this value."""
        return None if self.fits(value) else f"{key}={as_typed(value)}: expected {self.expected()}"


@dataclass(frozen=True)
class Text:
    """Any text; `null` allows null, `filled` no blank one."""

    null: bool = False
    filled: bool = False

    def expected(self) -> str:
        return f"a text{' that is not empty' if self.filled else ''}{', or null' if self.null else ''}"

    def mismatch(self, key: str, value: Any) -> str | None:
        fits = (isinstance(value, str) and bool(value.strip() or not self.filled)) or (self.null and value is None)
        return None if fits else f"{key}={as_typed(value)}: expected {self.expected()}"


@dataclass(frozen=True)
class Below:
    """The path of a folder below another one: names with / between them, none of which leads back up."""

    def expected(self) -> str:
        return "a text of folder names with / between them, none of them . or .."

    def mismatch(self, key: str, value: Any) -> str | None:
        fits = isinstance(value, str) and value.isprintable() and not {"", ".", ".."} & set(value.split("/"))
        return None if fits else f"{key}={value!r}: expected {self.expected()}"


@dataclass(frozen=True)
class Flag:
    """True or false; a text is an error, since any text would count as true."""

    def expected(self) -> str:
        return "true or false"

    def mismatch(self, key: str, value: Any) -> str | None:
        if isinstance(value, bool):
            return None
        found = f"the text {value!r}" if isinstance(value, str) else as_typed(value)
        meant = MEANT.get(str(value).lower())
        typed = f"{key}={meant}" if meant else f"{key}=true or {key}=false"
        return f"{key}={as_typed(value)}: found {found}, expected {self.expected()}: type {typed}"


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    def expected(self) -> str:
        *others, last = self.words
        return f"{', '.join(others)} or {last}" if others else last

    def mismatch(self, key: str, value: Any) -> str | None:
        fits = isinstance(value, str) and value in self.words
        return None if fits else f"{key}={as_typed(value)} is unknown: choose {self.expected()}"


@dataclass(frozen=True)
class Typed:
    """Any value of the type that a signature states: an object is a `_target_`, or the name of what the run gives."""

    type: Any

    def expected(self) -> str:
        return ", or ".join(dict.fromkeys(_kinds(self.type)))

    def mismatch(self, key: str, value: Any) -> str | None:
        if fits(value, self.type):
            return None
        as_list = f": type {key}=[{as_typed(value)}]" if fits([value], self.type) else ""
        return f"{key}={as_typed(value)}: expected {self.expected()}{as_list}"


NAMED = "the name of a value of the run"
PLAIN = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def _kinds(kind: Any) -> list[str]:
    """What `fits` accepts, in words."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        return [each.expected() for each in inner[1:]]
    if origin in (Union, UnionType):
        return [text for each in inner for text in _kinds(each)]
    if origin is Literal:
        return [str(word) for word in inner]
    if _is(origin, Sequence):
        items = dict.fromkeys(text for each in inner if each is not ... for text in _kinds(each))
        size = f" of {len(inner)}" if _is(origin, tuple) and ... not in inner else ""
        return [f"a list{size}" + (f", each {' or '.join(items)}" if items else "")]
    if _is(origin, Mapping):
        return ["options in braces, {name: value}"]
    return [PLAIN.get(origin, "a _target_ with its options" if origin is Callable else NAMED)]


def fits(value: Any, kind: Any) -> bool:
    """Whether a parameter of the type `kind` may get the plain `value`."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        return all(each.mismatch("", value) is None for each in inner[1:])
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if origin in PLAIN:
        return type(value) is origin
    if _is(origin, Sequence):
        kinds = [each for each in inner if each is not ...]
        if not isinstance(value, list):
            return False
        if not _is(origin, tuple) or ... in inner:
            kinds = kinds[:1] * len(value)
        return not inner or (len(kinds) == len(value) and all(map(fits, value, kinds)))
    if _is(origin, Mapping):
        of = inner[1] if inner else Any
        return isinstance(value, Mapping) and all(fits(item, of) for item in value.values())
    if origin in (Any, object) or not isinstance(origin, type):
        return True
    # an object, which a configuration cannot hold: what makes it or, of an answer to a probe, what it is called
    return "_target_" in value if isinstance(value, Mapping) else origin is not Callable and isinstance(value, str)


def _is(origin: Any, base: type) -> bool:
    return isinstance(origin, type) and issubclass(origin, base) and not issubclass(origin, str)


def as_typed(value: Any) -> str:
    """`value` as it is typed on one line, at most 80 characters of it."""
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{name}: {as_typed(inner)}" for name, inner in value.items()) + "}"
    elif isinstance(value, list):
        text = "[" + ",".join(map(as_typed, value)) + "]"
    else:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = " ".join(text.split()) or repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


Values = Number | Text | Below | Flag | Choice | Typed  # that an option may have
COUNT, SHARE, POSITIVE = Number(1, MOST, whole=True), Number(0, 1), Number(0, above=True)
NOT_NEGATIVE, HALF, HALF_OR_NULL = Number(0), Number(0, 0.5), Number(0, 0.5, null=True)
SOME, SEED = Number(1, MOST, whole=True, null=True), Number(0, 2**32 - 1, whole=True)
ANY_COUNT, INDEX = Number(0, whole=True), Number(0, whole=True, null=True)
TEXT, TEXT_OR_NULL, BELOW, FLAG = Text(), Text(null=True), Below(), Flag()
FILLED, FILLED_OR_NULL = Text(filled=True), Text(null=True, filled=True)
