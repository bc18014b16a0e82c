"""The runs of a folder as tables: one comparison for each set of comparable runs, a row for each combination."""

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from soul_exp.errors import UsageError, counted
from soul_exp.metrics.dialects import OURS
from soul_exp.metrics.scale import is_kept
from soul_exp.report import contrasts, notes
from soul_exp.report.labels import (
    DELTA,
    HEADLINE,
    MIA,
    NULL,
    ON_DEMAND,
    ceiling_of,
    declared,
    dialect_note,
    finite,
    function_of,
    headline_first,
    label_of,
    scale_in,
    size_of_test,
    units_of,
)
from soul_exp.report.runs import (
    ABOUT,
    CHOSEN,
    SUITE_OPTIONS,
    comparable,
    find,
    frame_of,
    is_measured,
    is_unlearned,
    study_of,
    tuned_on,
    typed_order,
    varied,
    why_apart,
)
from soul_exp.report.statistics import Range, mean_of
from soul_exp.report.table import GROUPS, Cell, Column, Comparison, Row, Table
from soul_exp.results import COMPARED, REQUEST, Results, metric_entries

TITLES = {
    "efficacy": "Efficacy: what is forgotten",
    "utility": "Utility: what is kept",
    "robustness": "Robustness: what attacks bring back",
    "other": "Other numbers",
    "cost": "Cost",
}
COSTS = {"num_steps": "steps", "peak_memory_gib": "peak memory GiB", "training.win_rate": "win_rate"}
MOST_REASONS = 4  # that a note lists
AT_LEAST_0 = Range(0.0)
COST_RANGES = {"training.win_rate": Range(0.0, 1.0)}
DELTA_RANGE = Range(-1.0, 1.0)
OF_COST = (
    "Wall-clock seconds by stage; prepare and evaluate are short where models or answers were in the cache. Steps are "
    "those of unlearning. " + notes.NOT_STATED + "."
)
SEQUENCE = (
    "Each request starts from the model that the one before left. Forget is that request, earlier all before it; "
    "the original model is that before the first request, the retrained one has seen none of the requests so far."
)


def comparisons(folder: Path | str, metrics: Sequence[str] | None = None) -> list[Comparison]:
    """The tables of the runs below `folder`; the requests of a run that is a sequence of them are one table.

    `metrics` are the columns, named as in results.json, of one table; by default each group of GROUPS has its own.
    Raises UsageError as `load` does, and for an unknown metric.
    """
    runs, missing = find(folder)
    known = dict.fromkeys(name for run in runs.values() for name in run.metrics["unlearned"])
    unknown = [name for name in metrics or () if name not in known]
    if unknown:
        raise UsageError(f"--metrics: no run has {unknown[0]!r}, choose from {', '.join(known)}")
    if all(name.startswith(REQUEST) for name in runs):
        found = [_sequence(runs, metrics)]
    else:
        found = [group.comparison(metrics) for group in _groups(folder, runs)]
    named: dict[str, list[str]] = {}
    for name, why in missing.items():
        named.setdefault(why, []).append(f"`{name}`")
    without = tuple(f"without results: {', '.join(names)} ({why})" for why, names in named.items())
    return [*found, Comparison("", "", (), without)] if without else found


def aggregated(folder: Path | str) -> pd.DataFrame:
    """One row per combination, over its seeds: for every metric and cost its mean, `.low` and `.high` of the 95 %
    interval, and `.n`, the runs that have a value; `table` is the number of its comparison, as in `load`."""
    runs, _ = find(folder)
    rows = []
    for place, group in enumerate(_groups(folder, runs), 1):
        columns = [*group.columns_of(group.measured), *group.costs]
        for method in group.methods:
            row: dict[str, Any] = {"table": place}
            row |= {column.label: text for column, text in zip(group.keys, method.key, strict=True)}
            row |= {"n": len(method.runs), "status": method.status}
            for column in columns:
                cell = group.cell(method.runs, column)
                row[column.key] = cell.value if cell.text is None else cell.text
                if cell.text is None:
                    row |= {f"{column.key}.{end}": getattr(cell, end) for end in ("low", "high", "n")}
            rows.append(row)
    return pd.DataFrame(rows)


def _groups(folder: Path | str, runs: Mapping[str, Results]) -> list["_Group"]:
    keys, order, found = varied(frame_of(runs)), typed_order(folder), comparable(runs)
    return [_Group(Path(folder), group, keys, order, _apart(group, found[:place])) for place, group in enumerate(found)]


def _apart(group: Mapping[str, Results], earlier: Iterable[Mapping[str, Results]]) -> str:
    """Why a group is no part of the first of the `earlier` ones with the same caption; "" without such a one."""
    run = next(iter(group.values()))
    for others in earlier:
        for name, other in others.items():
            if other.caption == run.caption and (why := why_apart(run, other)):
                more = f"; and {len(why) - MOST_REASONS} more" if len(why) > MOST_REASONS else ""
                return f"NOT COMPARABLE with the table of `{name}`: {'; '.join(why[:MOST_REASONS])}{more}"
    return ""


@dataclass(frozen=True)
class Method:
    """One row: runs that differ in the seed only and ended alike."""

    key: tuple[str, ...]  # what says which row it is, column by column
    runs: tuple[str, ...]  # each seed once
    status: str
    is_sound: bool  # neither diverged nor collapsed, not even some of the runs


@dataclass(frozen=True)
class _Group:
    """Runs that are comparable; `varied_anywhere` are the keys that differ in the folder, perhaps not in the group."""

    folder: Path
    runs: Mapping[str, Results]
    varied_anywhere: Sequence[str]
    order: Mapping[str, Sequence[str]]  # option -> its values as typed
    apart: str  # why it is no part of an earlier group

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """One row per run, by its name."""
        frame = frame_of(self.runs)
        return frame.set_index("run", drop=False)

    @functools.cached_property
    def first(self) -> Results:
        """Any run: of what all share."""
        return next(iter(self.runs.values()))

    @functools.cached_property
    def entries(self) -> dict[str, Any]:
        """Metric -> its entry in the configuration of a run that has it."""
        return {name: entry for run in self.runs.values() for name, entry in metric_entries(run).items()}

    @functools.cached_property
    def of_attacks(self) -> set[str]:
        """The metrics of attacks."""
        of_task = {name for run in self.runs.values() for name in run.config["task"].get("metrics") or ()}
        return {name for name in self.entries if name not in of_task}

    @functools.cached_property
    def measured(self) -> list[str]:
        """The metrics of the unlearned models: those of the task, then those of attacks."""
        names = list(dict.fromkeys(name for run in self.runs.values() for name in run.metrics["unlearned"]))
        in_order = [name for name in self.entries if name in self.of_attacks and name in names]
        return [*(name for name in names if name not in self.of_attacks), *in_order]

    @functools.cached_property
    def is_tuned_here(self) -> bool:
        """Whether trials chose the learning rate and gamma, in all runs then."""
        return bool(self.first.trials)

    @functools.cached_property
    def is_checkpoints(self) -> bool:
        """Whether none of the models was unlearned here."""
        return not any(map(is_unlearned, self.runs.values()))

    @functools.cached_property
    def by(self) -> list[str]:
        """The keys of the frame that tell methods apart."""
        always = [] if self.is_checkpoints else ["choices.loss", "choices.optimizer"]
        choices = [key for key in self.choices if self.frame[key].nunique(dropna=False) > 1]
        found = [*always, *choices, *varied(self.frame)]
        return [key for key in found if not (self.is_tuned_here and key in CHOSEN)]

    @functools.cached_property
    def choices(self) -> list[str]:
        """The keys of the choices beside loss and optimizer."""
        told = ("choices.loss", "choices.optimizer")
        return [key for key in self.frame if key.startswith("choices.") and key not in told]

    @functools.cached_property
    def chosen(self) -> list[str]:
        """The keys of what trials chose, where it differs."""
        tuned = self.is_tuned_here
        return [key for key in CHOSEN if tuned and key in self.frame and self.frame[key].nunique(dropna=False) > 1]

    @functools.cached_property
    def has_tuned_on(self) -> bool:
        """Whether rows were tuned on several data."""
        return len({tuned_on(run) for run in self.runs.values()} - {None}) > 1

    @functools.cached_property
    def keys(self) -> list[Column]:
        """The columns that say which row it is."""
        names = [key.partition(".")[2] for key in (*self.by, *self.chosen)]
        names = ["model", *names] if self.is_checkpoints else names
        return [Column(name, name) for name in (*names, *(["tuned on"] if self.has_tuned_on else []))]

    @functools.cached_property
    def members(self) -> dict[tuple[Any, ...], list[str]]:
        """What tells a method from the others -> its runs."""
        found: dict[tuple[Any, ...], list[str]] = {}
        for name, run in self.runs.items():
            values = tuple(_value(self.frame.at[name, key]) for key in self.by)
            tried = tuple(sorted((trial["lr"], trial["gamma"]) for trial in run.trials))
            found.setdefault((values, tuned_on(run), tried), []).append(name)
        return dict(sorted(found.items(), key=lambda pair: self._place(pair[0][0])))

    def _place(self, values: tuple[Any, ...]) -> tuple[tuple[int, float], ...]:
        """Where a row of these values stands: numbers by size, texts as they were typed, or else as runs have them."""
        place = []
        for key, value in zip(self.by, values, strict=True):
            if value is None:
                place.append((0, 0.0))
            elif isinstance(value, int | float) and not isinstance(value, bool):
                place.append((1, float(value)))
            else:
                typed = self.order.get(key.partition(".")[2], ())
                texts = [*typed, *(str(other) for other in self.frame[key] if str(other) not in typed)]
                place.append((2, float(texts.index(str(value)))))
        return tuple(place)

    @functools.cached_property
    def repeats(self) -> dict[str, list[str]]:
        """Run -> the others of the same method, seed and study."""
        seeds = [key for key in self.frame if key.startswith("seeds.")]
        found: dict[str, list[str]] = {}
        for names in self.members.values():
            firsts: dict[tuple[Any, ...], str] = {}
            for name in names:
                identity = (*self.frame.loc[name, seeds], study_of(self.runs[name]))
                if (first := firsts.setdefault(identity, name)) != name:
                    found.setdefault(first, []).append(name)
        return found

    @functools.cached_property
    def methods(self) -> list[Method]:
        """The rows; diverged seeds have one of their own."""
        repeated = {name for others in self.repeats.values() for name in others}
        found = []
        for names in self.members.values():
            kept = [name for name in names if name not in repeated]
            for status in sorted({self.runs[name].status for name in kept}, reverse=True):
                same = [name for name in kept if self.runs[name].status == status]
                found.append(self._method(same, len(kept), status))
        return found

    def _method(self, names: Sequence[str], num_seeds: int, status: str) -> Method:
        runs = [self.runs[name] for name in names]
        diverged = f", {num_seeds - len(names)} of {num_seeds} diverged" if len(names) < num_seeds else ""
        text = "DIVERGED" if status == "diverged" else f"{status}{diverged}"
        text += ", untuned" * (runs[0].tuned is None and is_unlearned(runs[0]))
        if num_collapsed := sum(bool(run.collapsed) for run in runs):
            text += ", COLLAPSED" if num_collapsed == len(runs) else f", {num_collapsed} of {len(runs)} collapsed"
        key = [text_of(self.frame.at[names[0], of]) for of in self.by]
        if self.is_checkpoints:
            key = ["checkpoint", *key]
        elif not is_unlearned(runs[0]):
            key[0] = "checkpoint"
        for of in self.chosen:
            key.append(", ".join(f"{value:g}" for value in sorted({float(self.frame.at[name, of]) for name in names})))
        key += [tuned_on(runs[0]) or NULL] if self.has_tuned_on else []
        return Method(tuple(key), tuple(names), text, status != "diverged" and not num_collapsed)

    # ---- columns

    def columns_of(self, names: Iterable[str]) -> list[Column]:
        """A column for each metric; that of the MIA AUC is followed by the difference to the retrained model's."""
        dialect = self.first.config.get("dialect", OURS)
        found = []
        for name in (each for given in names for each in ((given, DELTA) if given == MIA else (given,))):
            unit, direction = declared(self.entries, name, dialect)
            found.append(Column(name, label_of(name, unit), self._group_of(name), direction))
        return found

    def _group_of(self, name: str) -> str:
        """What metric `name` is of, by the probes that it reads: rows to keep, or rows to forget or never seen."""
        if name in self.of_attacks:
            return "robustness"
        entry = self.entries.get(MIA if name == DELTA else name, {})
        function = function_of(str(entry.get("_target_", "")), self.first.config.get("dialect", OURS))
        named = [] if function is None else [*inspect.signature(function).parameters]
        read = [entry["answers"]] if "answers" in entry else named
        kept = [is_kept(str(probe)) for probe in read]
        if False in kept:
            return "efficacy"
        return "utility" if True in kept or "suite" in read else "other"

    @functools.cached_property
    def costs(self) -> list[Column]:
        """The columns of cost that a run has."""
        stages = {key: f"{key.partition('.')[2]} seconds" for key in self.frame if key.startswith("seconds.")}
        listed = {"num_steps": COSTS["num_steps"], **stages, **COSTS}
        return [Column(key, label, "cost") for key, label in listed.items() if self._has(key)]

    def _has(self, key: str) -> bool:
        return key in self.frame and bool(self.frame[key].notna().any())

    def cell(self, names: Sequence[str], column: Column, model: str = "unlearned") -> Cell:
        """The mean over these runs."""
        if column.key == "num_steps":
            steps = sorted({self.runs[name].num_steps for name in names})
            return Cell(" to ".join(map(str, steps[:1] + steps[1:][-1:])))
        if column.group == "cost":
            within = COST_RANGES.get(column.key, AT_LEAST_0)
            return mean_of([self._number(name, column.key) for name in names], [None] * len(names), names, within)
        scale = scale_in(self.entries.get(column.key, {}), self.first.config.get("dialect", OURS))
        values, ends = [], []
        for name in names:
            values.append(self._number(name, f"metrics.{model}.{column.key}"))
            low, high = (self._number(name, f"metrics.{model}.{column.key}.{end}") for end in ("low", "high"))
            ends.append(None if low is None or high is None else (low, high))
        studies = [study_of(self.runs[name]) for name in names]
        return mean_of(values, ends, studies, DELTA_RANGE if column.key == DELTA else Range.of(scale))

    def _number(self, name: str, key: str) -> float | None:
        return finite(self.frame.at[name, key]) if key in self.frame else None

    # ---- tables

    def comparison(self, requested: Sequence[str] | None) -> Comparison:
        """The tables of the group, of the metrics `requested` or of all that have a column."""
        listed = self.columns_of(_usual(self.measured, self.of_attacks) if requested is None else requested)
        runs = list(self.runs.values())
        columns = [column for column in listed if requested is not None or is_measured(runs, column.key)]
        if requested is None:
            columns += self.costs
            parts = {group: [column for column in columns if column.group == group] for group in GROUPS}
            tables = [self._table(TITLES[group], of) for group, of in parts.items() if of]
        else:
            tables = [self._table("", columns)]
        comparing = contrasts.Contrasts(self.folder, self.runs, self.methods, [key.label for key in self.keys])
        metrics = [column for column in columns if column.group != "cost"]
        tables += comparing.tables(metrics, self._targets(metrics), self.cell, requested is not None)
        return Comparison(self._title(), self._about(), tuple(tables), tuple(self._notes(listed, columns)))

    def _table(self, title: str, columns: Sequence[Column]) -> Table:
        is_cost = all(column.group == "cost" for column in columns)
        rows = [] if is_cost and columns else list(self._references(columns))
        for method in self.methods:
            cells = [*map(Cell, method.key), *(self.cell(method.runs, column) for column in columns)]
            rows.append(Row((*cells, Cell(str(len(method.runs))), Cell(method.status)), method.is_sound))
        ended = (Column("n", "n"), Column("status", "status"))
        found = Table(title, (*self.keys, *columns, *ended), tuple(rows), OF_COST if is_cost and columns else "")
        return found.marked([*[None] * len(self.keys), *self._targets(columns), None, None])

    def _targets(self, columns: Sequence[Column]) -> list[float | None]:
        """The retrained model's values."""
        return [cell.value for cell in self._reference("retrained", columns)] or [None] * len(columns)

    def _reference(self, model: str, columns: Sequence[Column]) -> list[Cell]:
        """The cells of a model that the unlearned ones are compared with; not every run needs to have measured it."""
        has = [name for name, run in self.runs.items() if model in run.metrics]
        cells = []
        for column in columns:
            having = [name for name in has if self._number(name, f"metrics.{model}.{column.key}") is not None] or has
            cells += [self.cell(having[:1], column, model)] if having else []
        return cells

    def _references(self, columns: Sequence[Column]) -> Iterator[Row]:
        for model in (each for each in COMPARED if each.role is not None):
            if any(model.key in run.metrics for run in self.runs.values()):
                before = [Cell(model.title), *[Cell("")] * (len(self.keys) - 1)]
                yield Row((*before, *self._reference(model.key, columns), Cell(""), Cell("")), is_reference=True)

    # ---- texts

    def _title(self) -> str:
        caption = self.first.caption
        return f"Checkpoints, measured as they are: {caption}" if self.is_checkpoints else caption

    def _about(self) -> str:
        """What all rows share, how many runs, seeds, studies and steps there are, and what the numbers mean."""
        runs = list(self.runs.values())
        suite = [f"config.{option}" for option in SUITE_OPTIONS if any(r.suite and r.config[option] for r in runs)]
        known = dict.fromkeys((*self.choices, *self.varied_anywhere, *suite, *(CHOSEN if self.is_tuned_here else ())))
        left_out = {*self.by, *self.chosen, "config.task.source"}
        shared = [key for key in ("source", *known) if key in self.frame and key not in left_out]
        fixed = [f"{key.partition('.')[2] or key} {text_of(self.frame[key].iloc[0])}" for key in shared]
        dialect = self.first.config.get("dialect", OURS)
        counts = [counted(len(runs), "run"), _listed("seed", {run.seeds.get("seed") for run in runs})]
        if self.is_tuned_here:
            studies = {study_of(run) for run in runs}
            num_trials = sorted({len(run.trials) for run in runs})
            noun = "tuning study" if len(studies) == 1 else "tuning studies"
            counts.append(f"{len(studies)} {noun} ({_listed('seed', studies)})")
            counts.append(f"{' to '.join(map(str, num_trials))} trials a row")
        text = f"All rows: {', '.join([*fixed, f'dialect {dialect}'])}; {', '.join(counts)}."
        if not self.has_tuned_on and (on := next(filter(None, map(tuned_on, runs)), None)):
            text += f" Learning rate and gamma tuned on the {on}." if self.is_tuned_here else f" Tuned on: {on}."
        return f"{text}{'' if dialect == OURS else f' {dialect_note(dialect)}'} {ABOUT}"

    def _notes(self, listed: Sequence[Column], columns: Sequence[Column]) -> list[str]:
        runs, names = list(self.runs.values()), [column.key for column in columns]
        found = [*filter(None, [self.apart]), *notes.of_repeats(self.repeats, self.runs)]
        found += [text for run in runs for text in (size_of_test(run), units_of(run), *ceiling_of(run)) if text]
        found += [*self._of_intervals(columns), *notes.of_provenance(self.runs, [each.runs for each in self.methods])]
        found += [*notes.of_runs(self.runs), *notes.of_nulls(runs, names, [column.key for column in listed])]
        versions = dict.fromkeys(f"{name} {version}" for run in runs for name, version in run.versions.items())
        commits = dict.fromkeys(map(notes.commit_of, runs))
        return [*dict.fromkeys(found), f"commit {', '.join(commits)}; {', '.join(versions)}"]

    def _of_intervals(self, columns: Sequence[Column]) -> Iterator[str]:
        """Which means have an interval over runs alone."""
        several = [method.runs for method in self.methods if len(method.runs) > 1]
        alone = [
            column.label
            for column in columns
            if column.group != "cost"
            and any(self._number(name, f"metrics.unlearned.{column.key}.low") is None for of in several for name in of)
        ]
        if alone:
            yield f"the interval of a mean is over runs alone, as not every run has one of its own: {', '.join(alone)}"


def _usual(measured: Iterable[str], of_attacks: Iterable[str]) -> list[str]:
    """The metrics that have a column unless others are requested: forget beside retain, those of attacks last."""
    attacks = [name for name in measured if name in of_attacks and not ON_DEMAND.match(name)]
    others = sorted((name for name in measured if name not in of_attacks), key=lambda name: name.partition("_")[2])
    usual = [name for name in headline_first(others) if not ON_DEMAND.match(name) and "truth_ratio" not in name]
    return [*usual, *attacks]


def _value(value: Any) -> Any:
    """A value of a frame as Python's own; None if it is missing."""
    plain = value.item() if hasattr(value, "item") else value
    return None if plain is None or plain != plain else plain


def _ends(given: Sequence[float] | None) -> tuple[float, float] | None:
    return (given[0], given[1]) if given else None


def text_of(value: Any) -> str:
    """A value of the configuration as text."""
    return NULL if _value(value) is None else f"{value:g}" if isinstance(value, float) else str(value)


def _listed(what: str, values: Iterable[Any]) -> str:
    known = sorted(value for value in values if value is not None)
    return f"{what}{'s' * (len(known) != 1)} {', '.join(map(str, known)) or 'unknown'}"


def _sequence(runs: Mapping[str, Results], requested: Sequence[str] | None) -> Comparison:
    """A sequence of requests: each model's metrics on each request, and on those before it."""
    measured = dict.fromkeys(name for run in runs.values() for name in run.metrics["unlearned"])
    usual = [name for name in headline_first(measured) if name in HEADLINE or name.endswith(("_probability", "_rouge"))]
    listed = [name for name in usual if not name.startswith("validation_")] if requested is None else list(requested)
    names = [name for name in listed if requested is not None or is_measured(runs.values(), name)]
    rows = []
    for request, run in runs.items():
        for model in COMPARED:
            if model.key in run.metrics and not model.with_system_prompt:
                ends = run.intervals.get(model.key, {})
                given = [(finite(run.metrics[model.key].get(name)), ends.get(name)) for name in names]
                numbers = (mean_of([value], [_ends(each)], [None]) for value, each in given)
                rows.append(Row((Cell(request if model.role is None else ""), Cell(model.title), *numbers)))
    columns = (
        Column("request", "request"),
        Column("model", "model"),
        *(Column(name, label_of(name)) for name in names),
    )
    found = [*filter(None, map(units_of, runs.values()))]
    found += notes.of_runs({name: replace(run, notes=()) for name, run in runs.items()})
    found += [f"`{request}`: {note}" for request, run in runs.items() for note in run.notes]
    found += notes.of_nulls(list(runs.values()), names, listed)
    table = Table("", columns, tuple(rows))
    return Comparison(f"{len(runs)} requests in sequence", SEQUENCE, (table,), tuple(dict.fromkeys(found)))
