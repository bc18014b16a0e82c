"""The figures of a folder of runs: each is a function of its data frames alone, and of the number of a table.

Each raises NoDataError, with what is missing and what to type, where the table has nothing to draw.
"""

from collections.abc import Callable
from typing import Any

import pandas as pd

from soul_exp.report.attack_figures import relearning, robustness
from soul_exp.report.drawing import (
    COLUMN,
    PAGE,
    REFERENCES,
    SMALL,
    Drawn,
    NoDataError,
    grid,
    hide,
    limit,
    sample,
    say,
    styled,
)
from soul_exp.report.frames import Frames
from soul_exp.report.labels import label_of
from soul_exp.report.methods import curves, letter, numbers
from soul_exp.report.study import (
    CROSS,
    TITLES,
    band,
    ends_of,
    errorbar,
    lost_lines,
    reference_lines,
    scatter,
    study,
    values_of,
)
from soul_exp.report.trial_figures import sensitivity, trials

QUALITY, UTILITY, RETAINED = "log10_forget_quality", "utility", "retain_probability"
SECONDS = "seconds.unlearn"
WATCHED = ("validation_log10_forget_quality", "validation_retain_probability", "validation_utility")
DIAGNOSTICS = {"win_rate": "share not clipped", "effective_update": "share changed"}


def utility_of(runs: pd.DataFrame) -> str:
    """The metric of what was to be kept: the utility, or the retain probability where no run has one."""
    return next((name for name in (UTILITY, RETAINED) if values_of(runs, name)), UTILITY)


@styled
def plane(frames: Frames) -> Drawn:
    """Forget quality against utility: a panel for each table, with the original and the retrained model."""
    found = study(frames)
    tables = [runs for _, runs in found.runs.groupby("table")]
    if not any(values_of(runs, QUALITY) and values_of(runs, utility_of(runs)) for runs in tables):
        lacks = [label_of(name) for name in (QUALITY, UTILITY) if not values_of(found.runs, name)]
        raise NoDataError(f"no run has {' and '.join(lacks) or 'both numbers'}: `reasons` in results.json says why")
    columns = min(len(tables), 2)
    is_small = columns == 1 and len(found.methods.names) < SMALL
    figure, axes = grid(-(-len(tables) // columns), columns, 2.5, width=COLUMN if is_small else PAGE)
    n: list[tuple[str, int]] = []  # method and number of seeds of each mark
    shown: list[tuple[str, pd.DataFrame]] = []  # metrics and what intervals of them are drawn
    entries: dict[str, Any] = {}
    for i, (axis, runs) in enumerate(zip(axes.flat, tables, strict=False)):
        axis.set_title(letter(i) * (len(tables) > 1), loc="left")
        utility = utility_of(runs)
        if not (values_of(runs, QUALITY) and values_of(runs, utility)):
            say(axis, f"no run has both {label_of(QUALITY)} and {label_of(utility)}")
            continue
        for model, look in REFERENCES.items():
            x, y = (found.reference(model, name, runs) for name in (utility, QUALITY))
            if x and y:
                mark = {"marker": look["marker"], "color": "black", "fillstyle": "none", "markersize": 6}
                errorbar(axis, x, y, zorder=2, **mark)
                entries[TITLES[model]] = sample(linestyle="none", **mark)
        n += scatter(axis, found, runs, utility, QUALITY)[0].items()
        shown += [(name, found.summary(name, runs)) for name in (utility, QUALITY)]
        for which, name in (("x", utility), ("y", QUALITY)):
            limit(axis, which, values_of(runs, name, REFERENCES), ends_of(found, runs, name, REFERENCES))
        axis.set(xlabel=found.label(utility), ylabel=found.label(QUALITY))
    hide(axes, len(tables))
    return found.with_marks(figure, entries, n, shown, found.without(dict(n), "no such numbers"))


@styled
def trajectories(frames: Frames, table: int = 1) -> Drawn:
    """What the validation part says during training, against steps and seconds of training."""
    found = study(frames, table)
    steps = found.of(frames.steps[frames.steps["of"] == "validation"])
    names = [name for name in WATCHED if name in steps and numbers(steps[name]).notna().any()]
    if not names:
        lacks = "has a trajectory" if steps.empty else f"has a trajectory of {' or '.join(WATCHED)}"
        raise NoDataError(f"no run {lacks}: type evaluate.every=10")
    figure, axes = grid(len(names), 2, 1.6, sharex="col")
    drawn: set[str] = set()
    entries: dict[str, Any] = {}
    n: list[int] = []
    for pair, name in zip(axes, names, strict=True):
        entries |= reference_lines(pair, found, name)
        for method, rows in steps[steps["status"] != "diverged"].groupby("method", sort=False):
            line = curves(rows, "step", name)
            seconds = rows.groupby("step")["seconds"].mean()
            for axis, x in zip(pair, (line["x"], line["x"].map(seconds)), strict=True):
                band(axis, found.looks[str(method)].line, line.assign(x=x))
            drawn.add(str(method))
            n += line["n"].tolist()
            if "collapsed_here" in rows and len(fallen := rows[rows["collapsed_here"].notna()]):
                collapsed = {**CROSS, "marker": "o", "fillstyle": "none", "markersize": 7, "markeredgewidth": 0.9}
                for axis, x in zip(pair, ("step", "seconds"), strict=True):
                    axis.plot(numbers(fallen[x]), numbers(fallen[name]), **collapsed)
                entries["collapsed at this step"] = sample(**collapsed)
        for axis, x in zip(pair, ("step", "seconds"), strict=True):
            drawn |= lost_lines(axis, found, steps, x, name)
        pair[0].set_ylabel(found.label(name).replace("validation ", "validation\n", 1))
    for axis, words in zip(axes[-1], ("steps", "training time (s), without evaluations"), strict=True):
        axis.set_xlabel(words)
    return found.with_lines(figure, entries, n, drawn, found.marks(), found.without(drawn, "no trajectory"))


@styled
def diagnostics(frames: Frames, table: int = 1) -> Drawn:
    """How the optimizer worked: the share of coordinates not clipped, and of weights that a step changed."""
    found = study(frames, table)
    steps = found.of(frames.steps[frames.steps["of"] == "training"])
    if not any(name in steps and numbers(steps[name]).notna().any() for name in DIAGNOSTICS):
        raise NoDataError(
            f"no run has {' or '.join(DIAGNOSTICS)} in a train.jsonl: nothing was unlearned, or the file is gone"
        )
    figure, axes = grid(1, len(DIAGNOSTICS), 1.9, sharex=True)
    drawn: set[str] = set()
    n: list[int] = []
    notes: list[str] = []
    for axis, (name, words) in zip(axes[0], DIAGNOSTICS.items(), strict=True):
        axis.set(ylabel=f"{name}\n({words})", ylim=(-0.03, 1.03), xlabel="steps")
        if name not in steps or numbers(steps[name]).isna().all():
            say(axis, f"no optimizer here has a {name}")
            continue
        here = lost_lines(axis, found, steps, "step", name)
        for method, line in curves(steps, "step", name).groupby("method", sort=False):
            every = max(1, len(line) // 8)
            start = found.methods.names.index(str(method)) * every // len(found.methods.names)
            band(axis, {**found.looks[str(method)].line, "markevery": (start, every), "linewidth": 0.9}, line)
            here.add(str(method))
            n += line["n"].tolist()
        notes.append(found.without(here, f"no {name}"))
        drawn |= here
    return found.with_lines(figure, {}, n, drawn, found.marks(), *notes)


@styled
def cost(frames: Frames, table: int = 1) -> Drawn:
    """Time of unlearning, without tuning, against forget quality and utility."""
    found = study(frames, table)
    names = [name for name in (QUALITY, utility_of(found.runs)) if values_of(found.runs, name)]
    if not names or not values_of(found.runs, SECONDS):
        raise NoDataError("no run that unlearned has forget quality or utility: type stages=[prepare,unlearn,evaluate]")
    figure, axes = grid(1, len(names), 2.0, width=PAGE if len(names) > 1 else COLUMN)
    n: list[tuple[str, int]] = []  # method and number of seeds of each mark
    shown: list[tuple[str, pd.DataFrame]] = []  # metrics and what intervals of them are drawn
    entries: dict[str, Any] = {}
    untimed: set[str] = set()  # methods whose time a log axis has no place for
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_xscale("log")
        some, without_time = scatter(axis, found, found.runs, SECONDS, name)
        untimed |= without_time
        if not some:
            axis.set_xscale("linear")
            say(axis, f"no run has both a time of unlearning and {label_of(name)}")
            continue
        n += some.items()
        shown += [(each, found.summary(each)) for each in (SECONDS, name)]
        entries |= reference_lines([axis], found, name)
        limit(axis, "x", values_of(found.runs, SECONDS), ends_of(found, found.runs, SECONDS))
        limit(axis, "y", values_of(found.runs, name, REFERENCES), ends_of(found, found.runs, name))
        axis.set(xlabel="time of unlearning (s)", ylabel=found.label(name))
    lost = f"not drawn, as the time is 0 s: {'; '.join(sorted(untimed, key=found.methods.names.index))}" * bool(untimed)
    without = found.without({*dict(n), *untimed}, "no such numbers")
    return found.with_marks(figure, entries, n, shown, lost, without)


BY_TABLE: dict[str, Callable[[Frames, int], Drawn]] = {
    each.__name__: each for each in (trajectories, relearning, robustness, diagnostics, sensitivity, trials, cost)
}
NAMES = (plane.__name__, *BY_TABLE)


def drawn(frames: Frames, name: str) -> dict[str, Drawn | NoDataError]:
    """The figure `name` of all tables, or why there is none: `plane`, or with several tables `cost-A`, `cost-B`, ...

    A reason that holds for several tables stands once, and without their letters if it holds for all.
    """
    tables = sorted({int(table) for table in frames.runs["table"]})
    found: dict[str, Drawn | NoDataError] = {}
    reasons: dict[str, list[str]] = {}
    for i, table in enumerate(tables if name in BY_TABLE else [0]):
        title = f"{name}-{letter(i)}" if name in BY_TABLE and len(tables) > 1 else name
        try:
            found[title] = BY_TABLE[name](frames, table) if name in BY_TABLE else plane(frames)
        except NoDataError as error:
            reasons.setdefault(str(error), []).append(title)
    for reason, titles in reasons.items():
        found[name if not found and len(reasons) == 1 else ", ".join(titles)] = NoDataError(reason)
    return found
