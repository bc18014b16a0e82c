"""Comparisons as Markdown."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from soul_exp.report.comparison import comparisons
from soul_exp.report.labels import quoted, spans
from soul_exp.report.table import TIED, Cell, Comparison, Table

# what may begin or end markup: an underscore unless letters or digits stand on both sides; a backslash before a mark
MARKUP = re.compile(r"[*`~$]|(?<![^\W_])_|_(?![^\W_])|\\(?=[!-/:-@[-`{-~]|$)|(?<=\])\(")
HTML = re.compile(r"[<&]|\]\(")


def table(folder: Path | str, metrics: Sequence[str] | None = None) -> str:
    """The runs below `folder` as Markdown; errors and `metrics` as of `comparisons`."""
    return markdown(comparisons(folder, metrics))


def markdown(found: Iterable[Comparison]) -> str:
    """The comparisons, each under its heading: what all rows share, its tables, and its notes."""
    return "\n\n".join("\n".join(_comparison(each)) for each in found) + "\n"


def _comparison(found: Comparison) -> list[str]:
    above = [f"### {_escaped(found.title)}", "", _escaped(found.about), ""] if found.title else []
    tables = [line for each in found.tables for line in (*_table(each), "")]
    return [*above, *tables, *(f"- {_note(note)}" for note in found.notes)]


def _table(table: Table) -> list[str]:
    title = [f"#### {_escaped(table.title)}", ""] if table.title else []
    about = [_note(table.about)] if table.about else []
    head = [_cell(Cell(column.title)) for column in table.columns]
    lines = _lines([head, *([*map(_cell, row.cells)] for row in table.rows)])
    return [*title, *about, *([""] if about and lines else []), *lines]


def _cell(cell: Cell) -> str:
    text = _escaped(cell.written).replace("|", "\\|")
    return f"**{text}**" if cell.mark == "best" else f"{text} {TIED}" if cell.mark == "tied" else text


def _lines(rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table whose first row is the header; all cells of a column are equally wide."""
    if not rows[0]:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [f"| {' | '.join(f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True))} |" for row in rows]


def _note(note: str) -> str:
    """A note, or the text above a table, whose names are code; as text those that some take for HTML even there."""
    return "".join(
        quoted(part) if is_name and not HTML.search(part) else _escaped(quoted(part) if is_name else part)
        for part, is_name in spans(note)
    )


def _escaped(text: str) -> str:
    """`text` of whoever wrote it, such that Markdown shows it as it is: without emphasis, code, HTML, links, images."""
    return MARKUP.sub(r"\\\g<0>", text).replace("&", "&amp;").replace("<", "&lt;")
