"""Ranges of numbers that options may have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`; `above` excludes `low` itself, `null` allows none."""

    low: float
    high: float = math.inf
    whole: bool = False
    above: bool = False
    null: bool = False

    def expected(self) -> str:
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


COUNT, SHARE, POSITIVE = Number(1, whole=True), Number(0, 1), Number(0, above=True)
SOME, SEED = Number(1, whole=True, null=True), Number(0, 2**32 - 1, whole=True)
