"""Types and ranges that the value of an option may have; a parameter states its own as `Annotated[int, COUNT]`."""

import math
from dataclasses import dataclass
from typing import Any

WORDS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}  # YAML 1.1's
WORDS |= {"y": "true", "t": "true", "n": "false", "f": "false"}
MEANT = {**WORDS, "1": "true", "0": "false", "none": "false"}


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
        upto = f", at most {self.high:g}" if self.high < math.inf else ""
        return f"{kind} {low}{upto}{', or null' if self.null else ''}"

    def fits(self, value: Any) -> bool:
        if value is None:
            return self.null
        if isinstance(value, bool) or not isinstance(value, int | float) or (self.whole and not isinstance(value, int)):
            return False
        return math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low)

    def mismatch(self, key: str, value: Any) -> str | None:
        """An error message about `key=value`, or None if the option may have this value."""
        return None if self.fits(value) else f"{key}={value}: expected {self.expected()}"


@dataclass(frozen=True)
class Text:
    """Any text; `null` allows null."""

    null: bool = False

    def expected(self) -> str:
        return f"a text{', or null' if self.null else ''}"

    def mismatch(self, key: str, value: Any) -> str | None:
        fits = isinstance(value, str) or (self.null and value is None)
        return None if fits else f"{key}={value}: expected {self.expected()}"


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
        found = f"the text {value!r}" if isinstance(value, str) else "null" if value is None else f"{value}"
        meant = MEANT.get(str(value).lower())
        typed = f"{key}={meant}" if meant else f"{key}=true or {key}=false"
        return f"{key}={'null' if value is None else value}: found {found}, expected {self.expected()}: type {typed}"


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    def expected(self) -> str:
        return f"{', '.join(self.words[:-1])} or {self.words[-1]}"

    def mismatch(self, key: str, value: Any) -> str | None:
        return None if value in self.words else f"{key}={value} is unknown: choose {self.expected()}"


Values = Number | Text | Below | Flag | Choice  # that an option may have
COUNT, SHARE, POSITIVE = Number(1, whole=True), Number(0, 1), Number(0, above=True)
NOT_NEGATIVE, HALF, HALF_OR_NULL = Number(0), Number(0, 0.5), Number(0, 0.5, null=True)
SOME, SEED = Number(1, whole=True, null=True), Number(0, 2**32 - 1, whole=True)
ANY_COUNT, INDEX = Number(0, whole=True), Number(0, whole=True, null=True)
TEXT, TEXT_OR_NULL, BELOW, FLAG = Text(), Text(null=True), Below(), Flag()
