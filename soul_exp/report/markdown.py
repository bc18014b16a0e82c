"""Comparisons as Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from soul_exp.report.comparison import comparisons
from soul_exp.report.table import TIED, Cell, Comparison, Table


def table(folder: Path | str, metrics: Sequence[str] | None = None) -> str:
    """The runs below `folder` as Markdown; errors and `metrics` as of `comparisons`."""
    return markdown(comparisons(folder, metrics))


def markdown(found: Iterable[Comparison]) -> str:
    """The comparisons, each under its heading: what all rows share, its tables, and its notes."""
    return "\n\n".join("\n".join(_comparison(each)) for each in found) + "\n"


def _comparison(found: Comparison) -> list[str]:
    above = [f"### {_escaped(found.title)}", "", _escaped(found.about), ""] if found.title else []
    tables = [line for each in found.tables for line in (*_table(each), "")]
    return [*above, *tables, *(f"- {_escaped(note)}" for note in found.notes)]


def _table(table: Table) -> list[str]:
    title = [f"#### {_escaped(table.title)}", ""] if table.title else []
    about = [_escaped(table.about)] if table.about else []
    lines = _lines([[column.title for column in table.columns], *([*map(_cell, row.cells)] for row in table.rows)])
    return [*title, *about, *([""] if about and lines else []), *lines]


def _cell(cell: Cell) -> str:
    if cell.mark == "best":
        return f"**{cell.written}**"
    return f"{cell.written} {TIED}" if cell.mark == "tied" else cell.written


def _lines(rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table whose first row is the header; all cells of a column are equally wide."""
    if not rows[0]:
        return []
    rows = [[_escaped(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [f"| {' | '.join(f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True))} |" for row in rows]


def _escaped(text: str) -> str:
    """`text` without HTML, links and images of whoever wrote it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(")
