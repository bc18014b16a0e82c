"""The figures of attacks: what fine-tuning brings back step by step, and what each attack came to."""

import re
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from soul_exp.report.drawing import (
    COLUMN,
    PAGE,
    REFERENCES,
    Drawn,
    NoDataError,
    grid,
    hide,
    sample,
    say,
    styled,
    wrapped,
)
from soul_exp.report.frames import Frames
from soul_exp.report.labels import label_of, number
from soul_exp.report.methods import curves, numbers
from soul_exp.report.study import TITLES, Study, band, errorbar, reach, study

MEASURE = "extraction_strength"  # of the points of an attack
RELEARNING = ("relearn", "relearn_related", "finetune")
# by which of the numbers of all attacks models are compared: what came back
BROUGHT_BACK = re.compile("_excess$|_recovery(_[a-z0-9]+)?$|^retention_extraction_strength$|^uds$|^sample_leak_64_")
UNINFORMATIVE: dict[str, Any] = {"facecolor": "0.9", "linewidth": 0}
ATTACKED = "stages=[prepare,unlearn,evaluate,attack]"
FAR = 2.5  # a compared model whose value is so many times the largest of the methods is a number, not a line
TALLEST = 8.0  # inches, for panels in three columns
LABEL = 26  # characters on a line of a bar's label


@styled
def relearning(frames: Frames, table: int = 1) -> Drawn:
    """What fine-tuning brings back, step by step: each method, the retrained model (the control), and the original."""
    found = study(frames, table)
    points = found.of(frames.attacks[frames.attacks["attack"].isin(RELEARNING)])
    if MEASURE not in points or numbers(points[MEASURE]).isna().all():
        raise NoDataError(f"no run was attacked by fine-tuning: type 'attack=[relearn]' '{ATTACKED}'")
    rates = sorted(points["branch"].unique(), key=float)
    attacks = [attack for attack in RELEARNING if (points["attack"] == attack).any()]
    width = COLUMN if len(rates) == 1 else PAGE
    figure, axes = grid(len(attacks), len(rates), 1.55, width=width, sharey=True)
    drawn: set[str] = set()
    n: list[int] = []
    entries: dict[str, Any] = {}
    for row, attack in zip(axes, attacks, strict=True):
        for axis, rate in zip(row, rates, strict=True):
            some = points[(points["attack"] == attack) & (points["branch"] == rate)]
            axis.set_title(f"{attack}, lr {float(rate):g}", loc="left")
            if some.empty:
                say(axis, f"{attack} was not tried at this rate")
                continue
            lines = curves(some[some["model"] == "unlearned"], "point", MEASURE)
            for method, line in lines.groupby("method", sort=False):
                band(axis, found.looks[str(method)].line, line)
                drawn.add(str(method))
                n += line["n"].tolist()
            for model, look in REFERENCES.items():
                line = curves(some[some["model"] == model].assign(method=model), "point", MEASURE).sort_values("x")
                if len(line):
                    style = {"color": "black", "linestyle": look["linestyle"], "linewidth": 1.3, "zorder": 4}
                    axis.plot(line["x"], line["mean"], **style)
                    entries[TITLES[model]] = sample(**style)
            if _shade(axis, some):
                entries["nothing to recover"] = Patch(**UNINFORMATIVE)
            axis.set_ylim(-0.02, 1.02)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        row[0].set_ylabel("forgotten answers:\nextraction strength")
    for axis in axes[-1]:
        axis.set_xlabel("steps of fine-tuning")
    notes = (found.marks(crossed=False), found.without(drawn, "not attacked, or all diverged"))
    return found.with_lines(figure, entries, n, drawn, *notes)


def _shade(axis: Axes, points: pd.DataFrame) -> bool:
    """Shade the points of an attack at which nothing can be recovered; returns whether there are any."""
    lost = set(numbers(points[~points["informative"].astype(bool)]["point"]))
    tried = np.array(sorted(set(numbers(points["point"]).dropna())))
    edges = [tried[0], *(tried[1:] + tried[:-1]) / 2, tried[-1]]
    for i, point in enumerate(tried):
        if point in lost:
            axis.axvspan(edges[i], edges[i + 1], zorder=0, **UNINFORMATIVE)
    return bool(lost)


@styled
def robustness(frames: Frames, table: int = 1) -> Drawn:
    """What each attack brought back, with intervals, by method; the retrained model is the control."""
    found = study(frames, table)
    of_attacks = frames.metrics.index[frames.metrics["attack"].notna()]
    summaries = {name: found.summary(name) for name in of_attacks if BROUGHT_BACK.search(name)}
    summaries = {name: summary for name, summary in summaries.items() if len(summary)}
    if not summaries:
        raise NoDataError(
            f"no run was attacked, or no attack has a number: type 'attack=[relearn,quantise]' '{ATTACKED}'"
        )
    zero = [name for name, each in summaries.items() if not each[["mean", "low", "high"]].fillna(0.0).to_numpy().any()]
    names = [name for name in summaries if name not in zero] or zero[:1]
    others = [label_of(name) for name in zero if name not in names]
    order = [name for name in found.methods.names if name in set(found.runs["method"])]
    option = found.methods.option
    labels = [wrapped(name, LABEL) for name in order]
    lines = max(label.count("\n") + 1 for label in labels)
    height = 1.6 if option else 0.6 + max(3, len(order)) * max(0.135, 0.105 * lines)
    columns = min(len(names), 3 if -(-len(names) // 3) * height < TALLEST else 4)
    width = COLUMN if columns == 1 else PAGE
    figure, axes = grid(-(-len(names) // columns), columns, height, width=width, sharey=not option)
    entries: dict[str, Any] = {}
    n: list[int] = []
    for axis, name in zip(axes.flat, names, strict=False):
        summary = summaries[name]
        n += summary["n"].astype(int).tolist()
        largest, beyond = np.nanmax(np.abs(summary[["mean", "low", "high"]].to_numpy(dtype=float))), []
        for model, look in REFERENCES.items():
            if not (value := found.reference(model, name)):
                continue
            if abs(value["mean"]) > FAR * largest:
                beyond.append(f"{TITLES[model].partition(' ')[0]}: {number(value['mean'])}")
                continue
            style = {"color": "black", "linestyle": look["linestyle"], "linewidth": 0.9, "zorder": 4, "clip_on": False}
            (axis.axhline if option else axis.axvline)(value["mean"], **style)
            entries[TITLES[model]] = sample(**style)
        axis.set_title(", ".join(beyond), loc="right", fontsize=6)
        if option:
            _against_option(axis, found, summary)
            axis.set(ylabel=found.label(name), xlabel=option.removeprefix("config."))
        else:
            _bars(axis, found, order, summary)
            axis.set_yticks(range(len(order)), labels)
            axis.set_xlabel(found.label(name, 96 // columns))
            axis.xaxis.set_major_locator(MaxNLocator(4 if columns < 4 else 3))
    hide(axes, len(names))
    unusual = [method for method in order if found.exceptions(method)]
    bars = {} if option else found.entries(unusual, lambda look: Patch(**look.bar))
    intervals = found.intervals_note((name, summaries[name]) for name in names)
    notes = (found.marks(crossed=False), f"0 for all methods: {', '.join(others)}" * bool(others))
    return found.done(figure, {**bars, **entries}, found.seeds_note(n), intervals, *notes)


def _bars(axis: Axes, found: Study, order: list[str], summary: pd.DataFrame) -> None:
    """A bar for each method with its interval; a word where there is none, and a 0 where it would not be seen."""
    small: dict[str, Any] = {"fontsize": 6, "color": "0.3", "va": "center"}
    for place, method in enumerate(order):
        if method not in summary.index:
            runs = found.runs[found.runs["method"] == method]
            why = "diverged" if runs["status"].eq("diverged").all() else "no value"
            axis.text(0.02, place, why, transform=axis.get_yaxis_transform(), **small)
            continue
        of = summary.loc[method]
        axis.barh(place, of["mean"], 0.72, **found.looks[method].bar)
        if (halves := reach(dict(of))) and np.any(halves):
            axis.errorbar(of["mean"], place, xerr=halves, color="black", elinewidth=0.8, linestyle="none")
        elif of["mean"] == 0:
            axis.annotate("0", (0, place), xytext=(3, 0), textcoords="offset points", **small)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_ylim(len(order) - 0.4, -0.6)
    axis.grid(False, axis="y")


def _against_option(axis: Axes, found: Study, summary: pd.DataFrame) -> None:
    """The means with their intervals over the option that tells methods apart."""
    values = found.methods.numbers
    if min(values.values()) > 0:
        axis.set_xscale("log")
    line = summary.assign(x=[values[method] for method in summary.index]).sort_values("x")
    axis.plot(line["x"], line["mean"], color="0.5", zorder=2)
    for method, of in line.iterrows():
        look = found.looks[str(method)]
        errorbar(axis, {"mean": of["x"], "low": np.nan, "high": np.nan}, dict(of), ecolor=look.color, **look.mark)
