"""The figures of all trials: heat maps over what was tuned and varied, and what the rule chose from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from soul_exp.report.drawing import (
    COLUMN,
    LINE,
    ORDERED,
    PAGE,
    SMALL,
    Drawn,
    NoDataError,
    grid,
    sample,
    styled,
    wrapped,
)
from soul_exp.report.frames import Frames
from soul_exp.report.labels import NULL, finite, label_of
from soul_exp.report.methods import numbers
from soul_exp.report.study import CROSS, Study, study

QUALITY, KEPT = "validation_log10_forget_quality", "validation_retain_probability"
NOT_TRIED: dict[str, Any] = {"facecolor": "0.92", "edgecolor": "0.6", "hatch": "....", "linewidth": 0}
RING: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "black", "fillstyle": "none", "markersize": 8}
KEEPS = [0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999]
CLOSENESS = (lambda p: -np.log10(1 - np.clip(p, None, 0.9999)), lambda v: 1 - 10**-v)  # 0.9 to 0.99 as 0.99 to 0.999
TITLE = 32  # characters on a line of a panel's title
LUMINANCE = (0.2126, 0.7152, 0.0722)  # of red, green and blue
MARKS = {"diverged": "×", "collapsed": "†"}
MARKERS = {"diverged": "x", "collapsed": "+"}


@styled
def sensitivity(frames: Frames, table: int = 1) -> Drawn:
    """Every trial's validation forget quality over learning rate and gamma, or learning rate and a varied option."""
    found = study(frames, table)
    tried = _trials(found)
    across, by = ("option", "gamma") if found.methods.option else ("gamma", "method")
    order = sorted(tried[by].unique(), key=found.methods.names.index if by == "method" else float)
    titles = [wrapped(each, TITLE) if by == "method" else f"gamma {each:g}" for each in order]
    columns, title_lines = min(3, len(order)), max(title.count("\n") + 1 for title in titles)
    height = 0.53 + LINE * title_lines + 0.3 * tried.groupby(by)[across].nunique().max()
    figure, axes = grid(-(-len(order) // columns), columns, height)
    known = numbers(tried[QUALITY]).dropna()
    colours = ScalarMappable(Normalize(known.min(), max(known.max(), known.min() + 1e-9)), ORDERED)
    is_complete = True
    for place, axis in enumerate(axes.flat):
        if place >= len(order):
            axis.set_axis_off()
            continue
        some = tried[tried[by] == order[place]]
        is_complete &= some["lr"].nunique() * some[across].nunique() == len(some[["lr", across]].drop_duplicates())
        axis.set_title(titles[place], loc="left")
        _heat(axis, some, across, colours)
        if place % columns == 0:
            axis.set_ylabel((found.methods.option or "").removeprefix("config.") or "gamma")
        if place + columns >= len(order):
            axis.set_xlabel("learning rate")
    label = found.label(QUALITY).replace("\n", " ")
    figure.colorbar(colours, ax=axes, label=label, aspect=30, fraction=0.03, pad=0.01)
    entries: dict[str, Any] = {"chosen": Patch(facecolor="none", edgecolor="black", linewidth=1.8)}
    for what, mark in MARKS.items():
        if _is_lost(tried, what).any():
            entries[what] = sample(linestyle="none", marker=f"${mark}$", color="black")
    if not is_complete:
        entries["not tried"] = Patch(**NOT_TRIED)
    note = f"each cell: {label_of(QUALITY)}, and below it {label_of(KEPT)}" * (KEPT in tried)
    return found.done(figure, entries, note)


@styled
def trials(frames: Frames, table: int = 1) -> Drawn:
    """Every trial as the rule sees it: validation forget quality against retain probability, and its limit."""
    found = study(frames, table)
    tried = _trials(found)
    known = tried[numbers(tried[QUALITY]).notna() & numbers(tried.get(KEPT)).notna()] if KEPT in tried else tried[:0]
    if known.empty:
        raise NoDataError(f"no trial has a value of {label_of(KEPT)}")
    figure, axes = grid(1, 1, 2.5, width=COLUMN if len(found.methods.names) < SMALL else PAGE)
    axis, entries = axes[0, 0], {}
    axis.set_xscale("function", functions=CLOSENESS)
    axis.xaxis.set_major_locator(FixedLocator(KEEPS))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for method, some in known.groupby("method", sort=False):
        axis.plot(some[KEPT], some[QUALITY], linestyle="none", alpha=0.85, **found.looks[str(method)].mark)
    for what, marked, look in (
        ("chosen", known["chosen"].astype(bool), RING),
        *((what, _is_lost(known, what), {**CROSS, "marker": mark, "markersize": 4}) for what, mark in MARKERS.items()),
    ):
        if marked.any():
            axis.plot(known[marked][KEPT], known[marked][QUALITY], **look)
            entries[what] = sample(**look)
    keep = found.runs["tuned"].str.extract(r"keep=([0-9.e-]+)")[0].astype(float)
    limits = keep * numbers(found.runs[f"original.{KEPT}"]) if f"original.{KEPT}" in found.runs else keep[:0]
    for limit in limits.dropna().round(3).unique():
        line = axis.axvline(limit, color="black", linestyle="--", linewidth=0.9)
        entries[f"least that the rule accepts: {limit:.3f}"] = line
    axis.set(xlabel=found.label(KEPT).replace("\n", " "), ylabel=found.label(QUALITY))
    marks = found.entries(known["method"], lambda look: sample(linestyle="none", **look.mark))
    lost = len(tried) - len(known)
    note = f"{len(tried)} trials{f', {lost} without numbers' * bool(lost)}; the axis is stretched towards 1"
    return found.done(figure, {**marks, **entries}, note)


def _trials(found: Study) -> pd.DataFrame:
    """Each trial of these runs once (seeds share them), with its method, and the method's option where it is a number.

    Raises NoDataError if there are none with a number.
    """
    tried = found.frames.trials
    if len(tried):
        tried = tried.merge(found.runs[["run", "method"]], on="run")
    if tried.empty or QUALITY not in tried or numbers(tried[QUALITY]).isna().all():
        raise NoDataError("no run was tuned, so none has trials: type experiment=ablation_rho budget=smoke -m")
    if found.methods.option:
        tried = tried.assign(option=tried["method"].map(found.methods.numbers))
    return tried[~tried[[key for key in tried if key not in ("run", "seconds")]].astype(str).duplicated()]


def _heat(axis: Axes, trials: pd.DataFrame, across: str, colours: ScalarMappable) -> None:
    """A cell for each trial over learning rate and `across`; where several trials share a cell, their mean."""
    xs, ys = (sorted(trials[key].dropna().unique()) for key in ("lr", across))
    x_edges, y_edges = _scaled(axis, "x", xs), _scaled(axis, "y", ys)
    axis.grid(False)
    axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, **NOT_TRIED))
    for (lr, other), same in trials.groupby(["lr", across]):
        i, j = xs.index(lr), ys.index(other)
        quality, kept = (finite(float(numbers(same[key]).mean())) if key in same else None for key in (QUALITY, KEPT))
        red, green, blue, _ = (1, 1, 1, 1) if quality is None else colours.to_rgba(np.array(quality))
        size = (x_edges[i + 1] - x_edges[i], y_edges[j + 1] - y_edges[j])
        cell = Rectangle((x_edges[i], y_edges[j]), *size, facecolor=(red, green, blue), edgecolor="white", zorder=2)
        if same["chosen"].any():
            cell.set(edgecolor="black", linewidth=1.8, zorder=3)
        axis.add_patch(cell)
        lines = [] if quality is None else [f"{quality:z.1f}".replace("-", "−")]
        lines += [] if kept is None or quality is None else [f"{kept:.2f}"]
        marks = "".join(mark for what, mark in MARKS.items() if _is_lost(same, what).any())
        text = "\n".join(lines) + marks or NULL
        middle = (_middle(axis.get_xscale(), x_edges, i), _middle(axis.get_yscale(), y_edges, j))
        ink = "white" if float(np.dot((red, green, blue), LUMINANCE)) < 0.45 else "black"
        axis.text(*middle, text, ha="center", va="center", fontsize=5.5, zorder=4, color=ink)


def _is_lost(trials: pd.DataFrame, what: str) -> pd.Series:
    """Whether each trial has a reason why it diverged or collapsed."""
    reasons = trials[what] if what in trials else pd.Series(None, index=trials.index)
    return reasons.map(lambda why: isinstance(why, str)).astype(bool)


def _middle(scale: str, edges: Sequence[float], i: int) -> float:
    return float(np.sqrt(edges[i] * edges[i + 1])) if scale == "log" else (edges[i] + edges[i + 1]) / 2


def _scaled(axis: Axes, which: str, values: Sequence[float]) -> list[float]:
    """The edges of the cells around `values` (increasing) on an axis, log if all are positive, with a tick at each."""
    is_log = min(values) > 0
    places = np.log10(values) if is_log else np.asarray(values, dtype=float)
    gaps = np.diff(places) if len(values) > 1 else np.ones(1)
    edges = [places[0] - gaps[0] / 2, *(places[1:] + places[:-1]) / 2, places[-1] + gaps[-1] / 2]
    edges = [float(10**edge) if is_log else float(edge) for edge in edges]
    if is_log:
        getattr(axis, f"set_{which}scale")("log")
    getattr(axis, f"set_{which}lim")(edges[0], edges[-1])
    scale = getattr(axis, f"{which}axis")
    scale.set_major_locator(FixedLocator(list(values)))
    scale.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    scale.set_minor_locator(NullLocator())
    scale.set_minor_formatter(NullFormatter())
    return edges


def _short(value: float) -> str:
    """`value` in few characters: 3e-4 for 0.0003."""
    start, e, power = f"{value:e}".partition("e")
    return f"{float(start):g}{e}{int(power)}" if 0 < value < 0.01 or value >= 1e5 else f"{value:g}"
