"""What a table says, as data: columns, rows of cells with intervals, notes. Markdown, LaTeX and CSV write it out."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from soul_exp.metrics.scale import Direction
from soul_exp.report.labels import ARROWS, number, with_interval

GROUPS = ("efficacy", "utility", "robustness", "other", "cost")  # of columns, in the order of their tables
CHOSEN_GROUP = "chosen by trials"  # of columns that say what trials chose for a row
Mark = Literal["", "best", "tied"]
TINY = sys.float_info.min  # a p-value of 0 counts as this
TIED = "≈"  # after a value that is the best one but for noise


@dataclass(frozen=True)
class Column:
    """One column. `key` is the metric's name in results.json, or the option's, or "n" and the like."""

    key: str
    label: str  # as a person reads it, with its unit
    # one of GROUPS, or CHOSEN_GROUP; "": it says which row this is, how many runs it has, or how they ended
    group: str = ""
    direction: Direction | None = None
    is_p_value: bool = False  # whether its values are compared as logarithms

    @property
    def title(self) -> str:
        """The label with the arrow of its direction."""
        return f"{self.label} {ARROWS[self.direction]}".rstrip()


@dataclass(frozen=True)
class Cell:
    """One cell: a text, or a number with the ends of its 95 % interval (None: it has none)."""

    text: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0  # runs that have a value
    is_partial: bool = False  # whether other runs of the row have none
    p: float | None = None  # of a test that the value is 0
    mark: Mark = ""

    @property
    def written(self) -> str:
        """The cell without its mark: 0.833 [0.764, 0.902], its p, and n where some runs have no value."""
        if self.text is not None:
            return self.text
        ends = None if self.low is None or self.high is None else (self.low, self.high)
        text = with_interval(self.value, ends)
        text += "" if self.p is None else f" (p {number(self.p)})"
        return f"{text} (n={self.n})" if self.is_partial and self.n else text


@dataclass(frozen=True)
class Row:
    """One row: the cells in the order of the columns."""

    cells: tuple[Cell, ...]
    is_sound: bool = True  # whether it may be the best: it neither diverged nor collapsed
    is_reference: bool = False  # whether it is a model that the others are compared with


@dataclass(frozen=True)
class Table:
    """One table; all rows have a cell for each column."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    about: str = ""  # what its numbers are, above it

    def marked(self, targets: Sequence[float | None]) -> "Table":
        """The table with its best cells marked, in columns with a direction in which sound rows differ.

        Only where each run of each sound row has a value: a null may be the best one, as where half of what was
        forgotten never came back. `targets` are the retrained model's values, column by column. Best is the highest,
        lowest or nearest mean; `tied` with it is what is no further away than the root of the sum of both squared
        half-widths of their intervals, the larger half of each: there a 95 % interval of the difference of two
        independent means holds 0 (Zou and Donner 2008).
        """
        marks = [self._marks(index, target) for index, target in enumerate(targets)]
        rows = []
        for place, row in enumerate(self.rows):
            cells = (replace(cell, mark=of[place]) for cell, of in zip(row.cells, marks, strict=True))
            rows.append(replace(row, cells=tuple(cells)))
        return replace(self, rows=tuple(rows))

    def _marks(self, index: int, target: float | None) -> list[Mark]:
        column = self.columns[index]
        losses: dict[int, tuple[float, float]] = {}  # row -> how far from the best possible, and half-width
        rivals = [place for place, row in enumerate(self.rows) if row.is_sound and not row.is_reference]
        for place in rivals:
            cell = self.rows[place].cells[index]
            cell = _logarithms(cell) if column.is_p_value else cell
            if (loss := loss_of(cell.value, column.direction, target)) is not None and not cell.is_partial:
                losses[place] = (loss, half_width(cell))
        if len(losses) < len(rivals) or len({loss for loss, _ in losses.values()}) < 2:
            return [""] * len(self.rows)
        least, noise = min(losses.values())

        def mark(place: int) -> Mark:
            if place not in losses:
                return ""
            loss, half = losses[place]
            return "best" if loss == least else "tied" if loss - least <= math.hypot(half, noise) else ""

        return [mark(place) for place in range(len(self.rows))]


@dataclass(frozen=True)
class Comparison:
    """The tables of runs that can be compared, with what they share and what a reader needs to know."""

    title: str
    about: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def loss_of(value: float | None, direction: Direction | None, target: float | None) -> float | None:
    """How far `value` is from what is best, up to a constant: smaller is better. None: that cannot be said."""
    if value is None or direction is None:
        return None
    if direction == "nearest":
        return None if target is None else abs(value - target)
    return -value if direction == "higher" else value


def _logarithms(cell: Cell) -> Cell:
    """The cell with the log10 of its numbers, those of 0 as of the least positive one."""
    logs = (None if number is None else math.log10(max(number, TINY)) for number in (cell.value, cell.low, cell.high))
    value, low, high = logs
    return replace(cell, value=value, low=low, high=high)


def half_width(cell: Cell) -> float:
    """The larger half of the cell's interval; 0 without one."""
    if cell.value is None or cell.low is None or cell.high is None:
        return 0.0
    return max(cell.high - cell.value, cell.value - cell.low)
