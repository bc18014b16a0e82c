"""How figures look: one style, the widths of a paper, marks that differ in grey too, the legend beside the data."""

import functools
import io
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from soul_exp.report.labels import on_one_line

STYLE = Path(__file__).with_name("soul_exp.mplstyle")
COLUMN, PAGE = 3.3, 6.8  # inches: the widths of one column and of a page of a paper
SMALL = 6  # methods that a figure of one column has room for
FORMATS = ("pdf", "png")
# Petroff's ten colours (arXiv 2107.02270), chosen so that colour-blind readers can distinguish them
HUES = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")
FILLS = ("full", "bottom", "left", "top", "right")  # of further methods; a hollow mark is a collapsed model
DASHES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (4, 1.2, 1, 1.2)), (0, (1.2, 1)), (0, (4, 1, 1, 1, 1, 1)))
HATCHES = ("", "////", "\\\\\\\\", "xxxx", "....", "----", "||||", "++++", "oooo", "////....", "\\\\\\\\....")
ORDERED = "cividis"  # for options that are numbers: ordered in colour, in grey, and for colour-blind readers
REFERENCES: Mapping[str, Mapping[str, Any]] = {  # compared model -> its mark and its line
    "original": {"marker": "s", "linestyle": ":"},
    "input_based": {"marker": "D", "linestyle": "-."},
    "retrained": {"marker": "*", "linestyle": "--"},
}
LINE, MARGIN, HANDLE = 0.125, 0.22, 0.46  # inches: a line of the legend, its margins, and its sample of a mark
LONGEST = 44  # characters of a method's name on one line
P = ParamSpec("P")


class NoDataError(Exception):
    """The runs do not have what a figure shows; the message says what is missing and what to type."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn, everywhere alike."""

    color: Any
    marker: str
    fill: str  # of the marker
    dash: Any
    hatch: str

    @property
    def mark(self) -> dict[str, Any]:
        edge = {"markeredgecolor": "black", "markeredgewidth": 0.4}
        return {"color": self.color, "marker": self.marker, "fillstyle": self.fill, **edge}

    @property
    def line(self) -> dict[str, Any]:
        return {**self.mark, "linestyle": self.dash}

    @property
    def bar(self) -> dict[str, Any]:
        return {"facecolor": self.color, "hatch": self.hatch, "edgecolor": "black"}


def looks(methods: Sequence[str], groups: Mapping[str, str], *, are_ordered: bool) -> dict[str, Look]:
    """A look for each of `methods`; those of one group, as of one optimizer, share the colour.

    Ten groups have colours of their own, which then repeat; 60 methods have marks of their own, and eleven hatches. Of
    one colour, several methods differ in dash and hatch, too. With `are_ordered`, colours go from dark to light.
    """
    of = [groups.get(method, method) for method in methods]
    kinds = list(dict.fromkeys(of))
    places = [kinds.index(kind) for kind in of]
    hues: Sequence[Any] = HUES
    if are_ordered:
        hues = [tuple(hue) for hue in matplotlib.colormaps[ORDERED](np.linspace(0, 0.85, len(kinds)))]
    return {
        method: Look(
            hues[places[i] % len(hues)],
            MARKERS[i % len(MARKERS)],
            FILLS[i // len(MARKERS) % len(FILLS)],
            DASHES[(places[i] + places[i] // len(HUES) + of[:i].count(of[i])) % len(DASHES)],
            HATCHES[i % len(HATCHES)],
        )
        for i, method in enumerate(methods)
    }


class Drawn(Figure):
    """A figure of a paper, with its caption; a notebook shows it as PNG."""

    caption: str = ""

    def _repr_png_(self) -> bytes:
        return image(self, "png")


@contextmanager
def style() -> Iterator[None]:
    """In the block, matplotlib has its defaults and our style, whatever its user has set."""
    with matplotlib.style.context(["default", str(STYLE)], after_reset=True):
        yield


def styled(draw: Callable[P, Drawn]) -> Callable[P, Drawn]:
    """`draw` in our style."""

    @functools.wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> Drawn:
        with style():
            return draw(*args, **kwargs)

    return in_style


def image(figure: Figure, kind: str) -> bytes:
    """The figure as a file of this kind, "pdf" or "png": the same figure gives the same bytes."""
    caption = getattr(figure, "caption", "")
    metadata = {"CreationDate": None, "Subject": caption} if kind == "pdf" else {"Description": caption}
    file = io.BytesIO()
    with style():
        figure.savefig(file, format=kind, metadata=metadata)
    return file.getvalue()


def grid(rows: int, columns: int, height: float, *, width: float = PAGE, **sharing: Any) -> tuple[Drawn, np.ndarray]:
    """A figure `width` inches wide and its panels [rows, columns], each row `height` inches high."""
    figure = Drawn(figsize=(width, rows * height))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **sharing)
    return figure, axes


def finish(figure: Drawn, entries: Mapping[str, Artist], notes: Iterable[str]) -> Drawn:
    """`figure` with a legend below its panels, for which it grows; `notes` stand above the entries, a line each."""
    width = figure.get_figwidth()
    labels = [wrapped(label, LONGEST) for label in entries]
    columns = next(number for number in range(len(labels), -1, -1) if number < 2 or _fits(labels, number, width))
    lines = [line for note in notes if note for line in fitted(note, width - MARGIN)]
    rows = -(-len(labels) // max(columns, 1))
    per_row = [labels[start::rows] for start in range(rows)]
    num_lines = sum(max(label.count("\n") + 1 for label in row) for row in per_row) + len(lines)
    figure.set_figheight(figure.get_figheight() + num_lines * LINE + MARGIN)
    title = "\n".join(lines)
    figure.legend(
        list(entries.values()),
        labels,
        loc="outside lower center",
        ncols=max(columns, 1),
        title=title or None,
        alignment="left",
    )
    return figure


def _fits(labels: Sequence[str], columns: int, width: float) -> bool:
    """Whether a legend in so many columns, which it fills one after the other, is at most `width` inches wide."""
    rows = -(-len(labels) // columns)
    parts = [labels[start : start + rows] for start in range(0, len(labels), rows)]
    widest = [max(_width(line) for label in part for line in label.split("\n")) + HANDLE for part in parts]
    return len(parts) == columns and sum(widest) + MARGIN <= width


def fitted(text: str, width: float) -> list[str]:
    """`text` in lines at most `width` inches wide."""
    characters = max(10, int(len(text) * width / max(_width(text), 1e-9)))
    while True:
        lines = textwrap.wrap(text, characters, break_on_hyphens=False)
        if characters <= 10 or all(_width(line) <= width for line in lines):
            return lines
        characters -= 2


@functools.cache
def _width(text: str) -> float:
    """The width of `text` in the legend, in inches."""
    size = matplotlib.rcParams["legend.fontsize"]
    plain = text.replace("\\$", "S")
    return float(TextPath((0, 0), plain or " ", prop=FontProperties(size=size)).get_extents().x1) / 72


def wrapped(text: str, length: int) -> str:
    """`text`, which anyone may have typed, in lines of at most `length` characters, with no formulas.

    Lines end at a space; in a word that is longer than a line, after an underscore; else anywhere.
    """
    words = [each if len(each) <= length else each.replace("_", "_ ") for each in on_one_line(text).split(" ")]
    lines = [""]
    for word in words:
        for number, part in enumerate(word.split(" ")):
            joint = " " if lines[-1] and not number else ""
            if lines[-1] and len(lines[-1] + joint + part) > length:
                lines.append("")
                joint = ""
            lines[-1] += joint + part
            while len(lines[-1]) > length:
                lines[-1:] = [lines[-1][:length], lines[-1][length:]]
    return "\n".join(lines).replace("$", "\\$")


def limit(axis: Axes, which: str, values: Iterable[float], ends: Iterable[float] = ()) -> None:
    """The range of an axis: `values`, and the `ends` of their intervals up to half of what these are apart.

    The frame cuts the rest: an interval of two seeds may be a hundred times as wide, and would hide the values.
    """
    is_log = getattr(axis, f"get_{which}scale")() == "log"

    def placed(numbers: Iterable[float]) -> list[float]:
        known = [each for each in numbers if np.isfinite(each) and (each > 0 or not is_log)]
        return [float(np.log10(each)) if is_log else each for each in known]

    known = placed(values)
    if not known:
        return
    span = max(known) - min(known) or 0.1 * abs(max(known)) or 1.0
    known += [min(max(each, min(known) - span / 2), max(known) + span / 2) for each in placed(ends)]
    low, high = min(known), max(known)
    margin = 0.06 * (high - low) or 0.5 * span
    edges = (low - margin, high + margin)
    getattr(axis, f"set_{which}lim")(*((10.0**edge for edge in edges) if is_log else edges))
    scale = getattr(axis, f"{which}axis")
    if is_log:
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_locator(NullLocator())
    else:
        scale.set_major_locator(MaxNLocator(5))


def hide(axes: np.ndarray, used: int) -> None:
    """Hide the panels after the first `used` ones."""
    for axis in list(axes.flat)[used:]:
        axis.set_axis_off()


def say(axis: Axes, why: str) -> None:
    """Write into an axis without data why it has none."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.text(0.5, 0.5, wrapped(why, 30), ha="center", va="center", transform=axis.transAxes, color="0.3")


def sample(**looks: Any) -> Line2D:
    """A line or a mark for a legend."""
    return Line2D([], [], **looks)
