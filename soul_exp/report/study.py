"""What the figures of a folder share: its methods, their looks, what legends and captions say of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from soul_exp.errors import UsageError
from soul_exp.metrics.dialects import OURS
from soul_exp.report.drawing import REFERENCES, Drawn, Look, finish, looks, sample
from soul_exp.report.frames import Frames
from soul_exp.report.labels import dialect_note, finite, label_of, spans
from soul_exp.report.methods import Methods, methods, numbers
from soul_exp.report.notes import commit_of, facts_of, of_repeats
from soul_exp.results import Results

DIRECTIONS: Mapping[Any, str] = {"higher": " (↑ better)", "lower": " (↓ better)", "nearest": " (→ retrained)"}
ONE_LINE = 34  # characters of an axis' label
TITLES = {"original": "original", "input_based": "input-based", "retrained": "retrained (control)"}
CROSS: Mapping[str, Any] = {"linestyle": "none", "marker": "x", "color": "black", "markersize": 5.5, "zorder": 4}
MOST = 4  # methods named in a note


@dataclass(frozen=True)
class Study:
    """The runs of one table, or of all tables, and how their methods are drawn: in all figures of a folder alike."""

    frames: Frames
    methods: Methods  # of the folder
    looks: Mapping[str, Look]
    runs: pd.DataFrame  # of the table

    def of(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of `frame` of these runs, with the method, tuning study, status and collapse of each."""
        about = self.runs[["run", "method", "study", "status", "collapsed"]]
        return frame.rename(columns={"collapsed": "collapsed_here"}).merge(about, on="run")

    def label(self, name: str, length: int = ONE_LINE) -> str:
        """The name of a metric on an axis: with its unit and which value is better, below if longer than `length`."""
        known = self.frames.metrics
        label, better = known.loc[name, ["label", "better"]] if name in known.index else (label_of(name), None)
        text = f"{label}{DIRECTIONS.get(better, '')}"
        return (text if len(text) <= length else text.replace(" (", "\n(", 1)).replace("log10", "log$_{10}$")

    def summary(self, name: str, runs: pd.DataFrame | None = None) -> pd.DataFrame:
        """What the runs of one table say together of a metric, by method, as `Methods.summary`."""
        return self.methods.summary(self.runs if runs is None else runs, name)

    def reference(self, model: str, name: str, runs: pd.DataFrame | None = None) -> dict[str, float] | None:
        """The metric of a compared model in the table of these runs, as `Methods.reference`."""
        table = (self.runs if runs is None else runs)["table"].iloc[0]
        return self.methods.reference(int(table), model, name)

    @property
    def repeat(self) -> str:
        """What n counts: seeds, or runs where a method has several tuning studies."""
        return "run" if self.runs.groupby("method")["study"].nunique().max() > 1 else "seed"

    def bands(self, n: Iterable[float]) -> str:
        """A note on the bands around means over `n` runs; "" where each is of one."""
        return f"bands: lowest to highest {self.repeat}" * (max(n, default=1) > 1)

    def seeds_note(self, n: Iterable[float]) -> str:
        """What a legend says of the number of seeds behind each mark."""
        known = sorted({int(each) for each in n})
        if not known or known == [1]:
            return "one seed each" * bool(known)
        return f"means over n = {known[0]}{f' to {known[-1]}' * (len(known) > 1)} {self.repeat}s"

    def intervals_note(self, shown: Iterable[tuple[str, pd.DataFrame]]) -> str:
        """What the bars of the metrics `shown`, each with a summary, are over: seeds, units, or both."""
        rows = pd.concat([summary.assign(metric=name) for name, summary in shown])
        means = rows[rows["n"] > 1]
        has_units = means["has_units"].eq(True)
        both, alone = ([*dict.fromkeys(means["metric"][which])] for which in (has_units, ~has_units))
        labels = []
        for name in alone:
            label = "time" if name.startswith("seconds.") else label_of(name)
            labels.append(f"{label} (of some methods)" if name in both else label)
        single = bool(rows["n"].eq(1).any())
        over = f"{'of means ' * single}over {'tuning studies' if self.repeat == 'run' else 'seeds'} (t)"
        of = f": {', '.join(labels)}" * bool(both)
        notes = [f"{f'of one {self.repeat} ' * bool(len(means))}over independent units, where there is one"] * single
        notes += [f"{over} and independent units"] * bool(both)
        notes += [f"{over} alone{of}"] * bool(alone)
        return f"bars: 95 % interval {'; '.join(notes)}" * bool(notes)

    def entries(self, drawn: Iterable[str], sample_of: Callable[[Look], Artist]) -> dict[str, Artist]:
        """The legend's entries for the methods drawn: their names, and how many of their seeds are no usual ones."""
        shown = set(drawn)
        return {
            f"{method}{self.exceptions(method)}": sample_of(self.looks[method])
            for method in self.methods.names
            if method in shown
        }

    def exceptions(self, method: str) -> str:
        """How many of a method's runs diverged or collapsed, in parentheses; "" without any."""
        rows = self.runs[self.runs["method"] == method]
        counts = {"diverged": rows["status"].eq("diverged").sum(), "collapsed": rows["collapsed"].eq(True).sum()}
        found = [what if len(rows) == 1 else f"{n} of {len(rows)} {what}" for what, n in counts.items() if n]
        return f" ({', '.join(found)})" if found else ""

    def without(self, drawn: Iterable[str], what: str) -> str:
        """A note on the methods of these runs that are not drawn; "" where all are."""
        lacking = [name for name in self.methods.names if name in set(self.runs["method"]) - set(drawn)]
        if not lacking:
            return ""
        if len(lacking) > MOST:
            return f"{len(lacking)} methods have {what}"
        return f"{what}: {'; '.join(f'{name}{self.exceptions(name)}' for name in lacking)}"

    def marks(self, *, hollow: bool = False, crossed: bool = True) -> str:
        """A note on how runs that diverged and, if `hollow`, collapsed are drawn; "" where there are none."""
        lost, fallen = self.runs["status"].eq("diverged").any(), self.runs["collapsed"].eq(True).any()
        notes = ["hollow: a run collapsed"] * bool(hollow and fallen)
        return "; ".join(
            notes + ["×: diverged, in no mean" if crossed else "diverged runs are in no mean"] * bool(lost)
        )

    def with_marks(
        self, figure: Drawn, entries: Mapping[str, Artist], n: Iterable[tuple[str, int]],
        shown: Iterable[tuple[str, pd.DataFrame]], *notes: str,
    ) -> Drawn:  # fmt: skip
        """`figure` of marks, each of a method and of `n` runs (0: diverged), with bars of the metrics `shown`, done."""
        marks = self.entries(dict(n), lambda look: sample(linestyle="none", **look.mark))
        said = (self.seeds_note(of for _, of in n if of), self.intervals_note(shown), self.marks(hollow=True))
        return self.done(figure, {**marks, **entries}, *said, *notes)

    def with_lines(
        self, figure: Drawn, entries: Mapping[str, Artist], n: Iterable[int], drawn: Iterable[str], *notes: str
    ) -> Drawn:
        """`figure` of lines of the methods `drawn`, whose points are means over `n` runs, done."""
        lines = self.entries(drawn, lambda look: sample(**look.line))
        return self.done(figure, {**lines, **entries}, self.seeds_note(n), self.bands(n), *notes)

    def done(self, figure: Drawn, entries: Mapping[str, Artist], *notes: str) -> Drawn:
        """`figure` with its legend, below these notes, and its caption."""
        runs = self._results()
        differ = [what for what, fact in facts_of(runs).items() if len({*map(fact, runs.values())}) > 1]
        said = "; ".join(note for note in (*notes, f"runs differ in {', '.join(differ)}" * bool(differ)) if note)
        figure.caption = " ".join([f"{said[:1].upper()}{said[1:]}.", *self._provenance()])
        return finish(figure, entries, [said])

    def _results(self) -> dict[str, Results]:
        """The results of the runs, as the tables of the frames hold them."""
        every = {name: run for table in self.methods.tables.values() for name, run in table.runs.items()}
        return {name: every[name] for name in self.runs["run"]}

    def _provenance(self) -> list[str]:
        """The sentences of a caption on data, seeds, tuning, precision, dialect and code of the runs."""
        rows = self.runs
        titles = [self.methods.titles[table] for table in dict.fromkeys(rows["table"])]
        sentences = [f"{title}." for title in titles] if all(titles) else [f"{rows['caption'].iloc[0]}."]
        if self.methods.tunings:
            sentences += [_tuning(place, *each) for place, each in enumerate(self.methods.tunings, 1)]
        elif tuned := [value for value in dict.fromkeys(rows["tuned"]) if isinstance(value, str)]:
            sentences.append(f"Tuned on: {'; '.join(tuned)}.")
        if untuned := list(dict.fromkeys(rows["method"][rows["tuned"].isna() & rows["loss"].notna()])):
            sentences.append(f"Untuned: {'; '.join(untuned)}.")
        values = {
            "Seeds": sorted(set(rows["seeds.seed"].dropna())) if "seeds.seed" in rows else [],
            "Steps": sorted(set(rows["num_steps"].dropna())),
            "Precision": list(dict.fromkeys(rows["precision"])) if "precision" in rows else [],
            "Commit": [commit_of(value) for value in dict.fromkeys(rows["commit"]) if isinstance(value, str)],
        }
        sentences += [f"{what}: {', '.join(map(str, given))}." for what, given in values.items() if given]
        dialects = dict.fromkeys(run.dialect for run in self._results().values())
        tables = [self.methods.tables[int(table)] for table in dict.fromkeys(rows["table"])]
        repeats = [note for table in tables for note in of_repeats(table.repeats, table.runs)]
        plain = ("".join(part for part, _ in spans(note)) for note in repeats)
        sentences += [f"{note[:1].upper()}{note[1:]}." for note in plain]
        return sentences + [dialect_note(name) for name in dialects if name != OURS]


def _tuning(number: int, on: str, tried: Iterable[tuple[float, float]]) -> str:
    """The sentence of a caption on what `tuning 1` in the names of methods is."""
    options = zip(("learning rate", "gamma"), zip(*tried, strict=True), strict=False)
    grid = "; ".join(f"{name} {', '.join(f'{each:g}' for each in sorted({*of}))}" for name, of in options)
    return f"Tuning {number}: {on}{f' ({grid})' * bool(grid)}."


def study(frames: Frames, table: int | None = None) -> Study:
    """The study of one table, by its number in `frames.runs`, or of all. UsageError if there is no such table."""
    found = methods(frames)
    runs = found.runs if table is None else found.runs[found.runs["table"] == table]
    if runs.empty:
        raise UsageError(f"there is no table {table}: found tables 1 to {found.runs['table'].max()}")
    return Study(frames, found, looks(found.names, found.groups, are_ordered=found.option is not None), runs)


def errorbar(axis: Axes, x: Mapping[str, Any], y: Mapping[str, Any], **look: Any) -> None:
    """A mark at the means with the intervals of both, where they have one."""
    axis.errorbar(x["mean"], y["mean"], xerr=reach(x), yerr=reach(y), linestyle="none", elinewidth=0.6, **look)


def reach(of: Mapping[str, Any]) -> list[list[float]] | None:
    """How far an interval reaches below and above its mean, [2][1]; None without one.

    0 on the side of the end that a mean lies beyond, as no interval of ours does, but one in an edited file.
    """
    ends = [[of["mean"] - of["low"]], [of["high"] - of["mean"]]]
    return [[max(half, 0.0) for half in side] for side in ends] if np.isfinite(ends).all() else None


def scatter(axis: Axes, found: Study, runs: pd.DataFrame, x: str, y: str) -> tuple[dict[str, int], set[str]]:
    """Draw the mean of each method with intervals, hollow where a run collapsed, and each diverged run crossed out.

    Returns the number of runs of each method drawn, 0 of one that only diverged; and the methods with an `x` of 0 or
    less, for which a log axis has no place.
    """
    across, up = found.summary(x, runs), found.summary(y, runs)
    is_log = axis.get_xscale() == "log"
    n: dict[str, int] = {}
    left_out: set[str] = set()
    for method in across.index.intersection(up.index):
        if is_log and across.loc[method, "mean"] <= 0:
            left_out.add(method)
            continue
        look = dict(found.looks[method].mark)
        if runs[runs["method"] == method]["collapsed"].eq(True).any():
            look |= {"fillstyle": "none", "markeredgecolor": look["color"], "markeredgewidth": 1.0}
        errorbar(axis, dict(across.loc[method]), dict(up.loc[method]), ecolor=look["color"], zorder=3, **look)
        n[method] = int(min(across.loc[method, "n"], up.loc[method, "n"]))
    for _, run in runs[runs["status"] == "diverged"].iterrows():
        at, value = finite(run.get(x)), finite(run.get(y))
        if at is None or value is None:
            continue
        if is_log and at <= 0:
            left_out.add(run["method"])
            continue
        axis.plot(at, value, linestyle="none", zorder=3, **found.looks[run["method"]].mark)
        axis.plot(at, value, **CROSS)
        n.setdefault(run["method"], 0)
    return n, left_out


def band(axis: Axes, look: Mapping[str, Any], line: pd.DataFrame) -> None:
    """The mean over seeds as a line, and from the lowest to the highest seed as a band."""
    line = line.sort_values("x")
    axis.plot(line["x"], line["mean"], **look)
    if (line["n"] > 1).any():
        axis.fill_between(line["x"], line["low"], line["high"], color=look["color"], alpha=0.15, linewidth=0)


def lost_lines(axis: Axes, found: Study, rows: pd.DataFrame, x: str, y: str) -> set[str]:
    """Each diverged run of `rows` as a thin line that ends in a cross; returns their methods."""
    drawn = set()
    for (method, _), run in rows[rows["status"] == "diverged"].groupby(["method", "run"], sort=False):
        known = pd.DataFrame({"x": numbers(run[x]), "y": numbers(run[y])}).dropna().sort_values("x")
        if len(known):
            axis.plot(known["x"], known["y"], color=found.looks[str(method)].color, linewidth=0.6)
            axis.plot(known["x"].iloc[-1:], known["y"].iloc[-1:], **CROSS)
            drawn.add(str(method))
    return drawn


def reference_lines(axes: Iterable[Axes], found: Study, name: str, *, vertical: bool = False) -> dict[str, Artist]:
    """A line across `axes` at the value of each model that is compared with, and the legend's entries."""
    entries: dict[str, Artist] = {}
    for model, look in REFERENCES.items():
        if value := found.reference(model, name):
            style = {"color": "black", "linestyle": look["linestyle"], "linewidth": 0.9}
            for axis in axes:
                (axis.axvline if vertical else axis.axhline)(value["mean"], **style)
            entries[TITLES[model]] = sample(**style)
    return entries


def values_of(runs: pd.DataFrame, name: str, models: Iterable[str] = ()) -> list[float]:
    """All values of a metric, of single runs and of compared models."""
    columns = [name, *(f"{model}.{name}" for model in models)]
    return [value for column in columns if column in runs for value in numbers(runs[column]).dropna()]


def ends_of(found: Study, runs: pd.DataFrame, name: str, models: Iterable[str] = ()) -> list[float]:
    """The ends of the intervals that are drawn of a metric."""
    known = [end for model in models for end in (found.reference(model, name, runs) or {}).values()]
    return [*known, *found.summary(name, runs)[["low", "high"]].to_numpy(dtype=float).flat]
