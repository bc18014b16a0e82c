"""Comparisons as LaTeX: tables by booktabs, for \\input in a paper."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from soul_exp.report.table import TIED, Cell, Column, Comparison, Table

PREAMBLE = r"\usepackage{booktabs,adjustbox,rotating}"
NEEDS = f"% needs {PREAMBLE}"
TEXT_WIDTH = 85  # characters of a table that fit beside each other at 10 pt
MOST_COLUMNS = 11  # of a table across the page: about 8 pt
TITLE_WIDTH = 12  # of a line of a title above narrow columns
LINE_END = r" \\ "
SPACE = "[2pt]"  # between rows of two lines
SPECIAL = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedblright{}",  # \textquotedbl needs the encoding T1
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "[": "{[}",  # after \\ it would begin a length
    "]": "{]}",
    "-": "{-}",  # two of them would be a dash
    "\n": " ",
    "\t": " ",
    "\xa0": r"\nobreakspace{}",
    "—": "---",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "½": r"$\frac{1}{2}$",
    "²": "$^2$",
    "Δ": r"$\Delta$",
    "α": r"$\alpha$",
    "ρ": r"$\rho$",
    "τ": r"$\tau$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\rightarrow$",
    TIED: r"$\approx$",
    "é": r"\'e",
}


def latex(found: Iterable[Comparison]) -> str:
    """The comparisons as floats with a caption each, the first of a comparison with what all rows share; notes below.

    Best values are bold, what is within noise of them has TIED after it; the names of groups stand above their columns.
    ASCII only, every text escaped.
    """
    return "\n".join([NEEDS, *(line for each in found for line in _comparison(each))]) + "\n"


def escaped(text: str) -> str:
    """`text` as LaTeX prints it, in ASCII; a character that LaTeX's fonts may lack as its code point."""
    return "".join(
        SPECIAL.get(char) or (char if " " <= char <= "~" else f"{{[}}U+{ord(char):04X}{{]}}") for char in text
    )


def _comparison(found: Comparison) -> Iterator[str]:
    for place, table in enumerate(found.tables):
        title = f"{table.title}. " if table.title else ""
        shared = f"{found.title}. {found.about}" if place == 0 else f"{found.title}."
        caption = " ".join(filter(None, (f"{title}{shared}", table.about)))
        yield from ("", *(_float(table, caption) if table.columns else [escaped(table.about)]))
    if found.notes:
        notes = (rf"  \item {escaped(note)}" for note in found.notes)
        yield from ("", r"{\footnotesize\begin{itemize}", *notes, r"\end{itemize}}")


def _float(table: Table, caption: str) -> list[str]:
    """The lines of a table. One that is too wide has intervals below numbers and, of many columns, is turned."""
    columns = [
        [column.title, *(row.cells[place].written for row in table.rows)] for place, column in enumerate(table.columns)
    ]
    stacked = sum(2 + max(map(len, column)) for column in columns) > TEXT_WIDTH
    kind = "sidewaystable" if stacked and len(columns) > MOST_COLUMNS else "table"
    lines: list[str] = []
    for place, row in enumerate(table.rows):
        is_first_method = place and row.is_reference < table.rows[place - 1].is_reference
        lines += [r"\midrule"] if is_first_method else []
        lines.append(f"{' & '.join(_cell(cell, stacked) for cell in row.cells)} \\\\{SPACE * stacked}")
    return [
        rf"\begin{{{kind}}}[htbp]",
        r"\centering",
        rf"\caption{{{escaped(caption)}}}",
        r"\begin{adjustbox}{max width=\textwidth, max totalheight=0.8\textheight}",
        rf"\begin{{tabular}}{{{''.join('r' if column.group else 'l' for column in table.columns)}}}",
        r"\toprule",
        *_groups(table.columns),
        f"{' & '.join(_title(column, stacked) for column in table.columns)} \\\\",
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{adjustbox}",
        rf"\end{{{kind}}}",
    ]


def _groups(columns: Sequence[Column]) -> list[str]:
    """The names of the groups above their columns, where there are several."""
    if len({column.group for column in columns if column.group}) < 2:
        return []
    cells, rules, start = [], [], 1
    for group, same in groupby(columns, key=lambda column: column.group):
        width = len([*same])
        cells.append(rf"\multicolumn{{{width}}}{{c}}{{{escaped(group)}}}")
        rules += [rf"\cmidrule(lr){{{start}-{start + width - 1}}}"] if group else []
        start += width
    return [f"{' & '.join(cells)} \\\\", " ".join(rules)]


def _title(column: Column, stacked: bool) -> str:
    if not stacked:
        return escaped(column.title)
    whole = re.sub(r" (\W)$", "\xa0\\1", column.title)  # its arrow stands beside the last word
    lines = textwrap.wrap(whole, TITLE_WIDTH, break_long_words=False)
    return _stack("r" if column.group else "l", *map(escaped, lines))


def _cell(cell: Cell, stacked: bool) -> str:
    written = cell.written if cell.text is not None else cell.written.replace("-", "−")
    number, interval, rest = written.partition(" [") if stacked and cell.text is None else (written, "", "")
    text = escaped(number)
    text = rf"\textbf{{{text}}}" if cell.mark == "best" else f"{text} {escaped(TIED)}" if cell.mark == "tied" else text
    return _stack("r", text, rf"\scriptsize {escaped(f'[{rest}')}") if interval else text


def _stack(side: str, *lines: str) -> str:
    """Lines below each other, aligned to the left (l) or right (r); a single one as it is."""
    return rf"\shortstack[{side}]{{{LINE_END.join(lines)}}}" if len(lines) > 1 else "".join(lines)
