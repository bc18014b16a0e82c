"""The tables of comparable runs: columns, cells, references and notes, a row for each combination."""

import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soul_exp.errors import counted
from soul_exp.metrics.dialects import OURS
from soul_exp.metrics.scale import is_kept
from soul_exp.report import contrasts, notes, paper
from soul_exp.report.labels import (
    DELTA,
    MIA,
    ON_DEMAND,
    ceiling_of,
    declared,
    dialect_note,
    finite,
    forget_quality_note,
    function_of,
    headline_first,
    label_of,
    scale_in,
    size_of_test,
    units_of,
)
from soul_exp.report.rows import Rows, text_of
from soul_exp.report.runs import ABOUT, CHOSEN, SUITE_OPTIONS, is_measured, study_of, tuned_on
from soul_exp.report.statistics import Range, mean_of
from soul_exp.report.table import GROUPS, Cell, Column, Comparison, Row, Table
from soul_exp.results import COMPARED, UNMERGED, Compared, attack_of, metric_entries

TITLES = {
    "efficacy": "Efficacy: what is forgotten",
    "utility": "Utility: what is kept",
    "robustness": "Robustness: what attacks bring back",
    "other": "Other numbers",
    "cost": "Cost",
}
STEPS = {
    "num_steps": "steps",
    "passes.forward": "forward passes per step",
    "passes.backward": "backward passes per step",
}
COSTS = {"peak_memory_gib": "peak memory GiB", "training.win_rate": "win_rate"}
OF_UNMERGED = "unmerged: attacked with the adapter beside its base; the row above is of the models with it merged"
AT_LEAST_0 = Range(0.0)
COST_RANGES = {"training.win_rate": Range(0.0, 1.0)}
DELTA_RANGE = Range(-1.0, 1.0)


@dataclass(frozen=True)
class Group(Rows):
    """The tables of comparable runs."""

    folder: Path
    varied_anywhere: Sequence[str]  # the keys that differ in the folder, perhaps not in the group
    apart: str  # why it is no part of an earlier group

    @functools.cached_property
    def entries(self) -> dict[str, Any]:
        """Metric -> its entry in the configuration of a run that has it."""
        return {name: entry for run in self.runs.values() for name, entry in metric_entries(run).items()}

    @functools.cached_property
    def of_attacks(self) -> set[str]:
        """The metrics of attacks."""
        return {name for run in self.runs.values() for name in attack_of(run)}

    @functools.cached_property
    def measured(self) -> list[str]:
        """The metrics of the unlearned models: those of the task, then those of attacks."""
        names = list(dict.fromkeys(name for run in self.runs.values() for name in run.metrics["unlearned"]))
        in_order = [name for name in self.entries if name in self.of_attacks and name in names]
        return [*(name for name in names if name not in self.of_attacks), *in_order]

    @functools.cached_property
    def usual(self) -> list[str]:
        """The metrics that have a column unless others are requested: forget beside retain, those of attacks last."""
        attacks = [name for name in self.measured if name in self.of_attacks and not ON_DEMAND.match(name)]
        others = [name for name in self.measured if name not in self.of_attacks]
        in_order = headline_first(sorted(others, key=lambda name: name.partition("_")[2]))
        return [*(name for name in in_order if not ON_DEMAND.match(name) and "truth_ratio" not in name), *attacks]

    # ---- columns

    def columns_of(self, names: Iterable[str]) -> list[Column]:
        """A column for each metric or cost; the MIA AUC's is followed by the difference to the retrained model's."""
        found, costs = [], {column.key: column for column in self.costs}
        for name in (each for given in names for each in ((given, DELTA) if given == MIA else (given,))):
            if name in costs:
                found.append(costs[name])
                continue
            unit, direction = declared(self.entries, name, self.first.dialect)
            column = Column(name, label_of(name, unit), self._group_of(name), direction)
            found.append(replace(column, is_p_value=self.range_of(column).is_p_value))
        return found

    def range_of(self, column: Column) -> Range:
        """Where the values of a column lie."""
        if column.group == "cost":
            return COST_RANGES.get(column.key, AT_LEAST_0)
        scale = scale_in(self.entries.get(column.key, {}), self.first.dialect)
        return DELTA_RANGE if column.key == DELTA else Range.of(scale)

    def _group_of(self, name: str) -> str:
        """What metric `name` is of, by the probes that it reads: rows to keep, or rows to forget or never seen."""
        if name in self.of_attacks:
            return "robustness"
        entry = self.entries.get(MIA if name == DELTA else name, {})
        function = function_of(str(entry.get("_target_", "")), self.first.dialect)
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
        listed = {**STEPS, **stages, **COSTS}
        return [Column(key, label, "cost") for key, label in listed.items() if self._has(key)]

    def _has(self, key: str) -> bool:
        return key in self.frame and bool(self.frame[key].notna().any())

    def cell(self, names: Sequence[str], column: Column, model: str = "unlearned") -> Cell:
        """The mean over these runs."""
        if column.key == "num_steps":
            steps = sorted({self.runs[name].num_steps for name in names})
            return Cell(" to ".join(map(str, steps[:1] + steps[1:][-1:])))
        if column.group == "cost":
            return mean_of([self._number(name, column.key) for name in names], within=self.range_of(column))
        values = [self._number(name, f"metrics.{model}.{column.key}") for name in names]
        ends = [self.runs[name].intervals.get(model, {}).get(column.key) or None for name in names]
        return mean_of(values, ends, [study_of(self.runs[name]) for name in names], self.range_of(column))

    def unmerged(self, names: Sequence[str], columns: Iterable[Column]) -> dict[str, Cell]:
        """Metric -> the mean over these runs, of attacks on their adapters beside the base; empty without such ones."""
        known = {key for name in names for key in self.runs[name].metrics.get(UNMERGED, ())}
        return {column.key: self.cell(names, column, UNMERGED) for column in columns if column.key in known}

    def _number(self, name: str, key: str) -> float | None:
        return finite(self.values[name].get(key))

    # ---- tables

    def comparison(self, requested: Sequence[str] | None, few: Sequence[str] | None = None) -> Comparison:
        """The tables of the group, of the metrics `requested` or of all that have a column, as `comparisons` says."""
        own = self.columns_of(paper.columns(self) if requested is None else ())
        requested = few if requested is None and not own else requested
        listed = self.columns_of(self.usual if requested is None else requested)
        runs = list(self.runs.values())
        own_measured = [column for column in own if is_measured(runs, column.key)]
        columns = [column for column in listed if requested is not None or is_measured(runs, column.key)]
        if requested is None:
            columns += self.costs
            parts = {group: [column for column in columns if column.group == group] for group in GROUPS}
            tables = [self._table(paper.OWN, own_measured)] if own else []
            tables += [self._table(TITLES[group], of) for group, of in parts.items() if of]
        else:
            tables = [self._table("", columns)]
        metrics = [column for column in columns if column.group != "cost"]
        tables += contrasts.Contrasts(self).tables(metrics, requested is not None)
        tables += self.published() if requested is None else []
        all_listed, shown = dict.fromkeys([*listed, *own]), dict.fromkeys([*columns, *own_measured])
        found = self.notes_on([*all_listed], [*shown])
        about = f"{self.about} {forget_quality_note(self.first.dialect)} {ABOUT}"
        return Comparison(self._title(), about, tuple(tables), tuple(found))

    def published(self) -> list[Table]:
        """Published numbers beside ours, where runs have paper=true."""
        return paper.beside(self, lambda names, key: self.cell(names, self.columns_of([key])[0]))

    def _table(self, title: str, columns: Sequence[Column]) -> Table:
        is_cost = all(column.group == "cost" for column in columns)
        rows = [] if is_cost and columns else list(self._references(columns))
        for method in self.methods:
            key, n = [*map(Cell, method.key)], Cell(str(len(method.runs)))
            cells = (self.cell(method.runs, column) for column in columns)
            rows.append(Row((*key, *cells, n, Cell(method.status)), method.is_sound))
            if apart := self.unmerged(method.runs, columns):
                cells = (apart.get(column.key, Cell("")) for column in columns)
                rows.append(Row((*key, *cells, n, Cell(UNMERGED)), is_sound=False))
        ended = (Column("n", "n"), Column("status", "status"))
        note = notes.of_cost(self.runs) if any(column.group == "cost" for column in columns) else ""
        found = Table(title, (*self.keys, *columns, *ended), tuple(rows), note)
        return found.marked([*[None] * len(self.keys), *self.targets(columns), None, None])

    def targets(self, columns: Sequence[Column]) -> list[float | None]:
        """The retrained model's values."""
        return [cell.value for cell in self.reference("retrained", columns)] or [None] * len(columns)

    def reference(self, model: str, columns: Sequence[Column]) -> list[Cell]:
        """The cells of a model that the unlearned ones are compared with, which has no cost of its own."""
        named = ((self.run_of_reference(model, column.key), column) for column in columns)
        return [
            Cell("") if column.group == "cost" else self.cell([name], column, model)
            for name, column in named
            if name is not None
        ]

    def run_of_reference(self, model: str, key: str) -> str | None:
        """The first run that has metric `key` of a compared model, or else the model: not every run measured it."""
        has = [name for name, run in self.runs.items() if model in run.metrics]
        return next((name for name in has if self._number(name, f"metrics.{model}.{key}") is not None), [*has, None][0])

    @functools.cached_property
    def references(self) -> list[Compared]:
        """The models that the unlearned ones are compared with and that a run measured."""
        measured = {model for run in self.runs.values() for model in run.metrics}
        return [model for model in COMPARED if model.role is not None and model.key in measured]

    def _references(self, columns: Sequence[Column]) -> Iterator[Row]:
        for model in self.references:
            before = [Cell(model.title), *[Cell("")] * (len(self.keys) - 1)]
            yield Row((*before, *self.reference(model.key, columns), Cell(""), Cell("")), is_reference=True)

    # ---- texts

    def _title(self) -> str:
        caption = self.first.caption
        return f"Checkpoints, measured as they are: {caption}" if self.is_checkpoints else caption

    @functools.cached_property
    def about(self) -> str:
        """What all rows share, and how many runs, seeds, studies and trials there are."""
        runs = list(self.runs.values())
        suite = [f"config.{option}" for option in SUITE_OPTIONS if any(r.suite and r.config[option] for r in runs)]
        known = dict.fromkeys((*self.choices, *self.varied_anywhere, *suite, *(CHOSEN if self.is_tuned_here else ())))
        left_out = {*self.by, *self.chosen, "config.task.source"}
        shared = [key for key in ("source", *known) if key in self.frame and key not in left_out]
        fixed = [f"{key.partition('.')[2] or key} {text_of(self.frame[key].iloc[0])}" for key in shared]
        dialect = self.first.dialect
        counts = [counted(len(runs), "run"), _listed("seed", {run.seeds.get("seed") for run in runs})]
        if self.is_tuned_here:
            studies = {study_of(run) for run in runs}
            num_trials = sorted({len(run.trials) for run in runs})
            noun = "tuning study" if len(studies) == 1 else "tuning studies"
            counts.append(f"{len(studies)} {noun} ({_listed('seed', studies)})")
            counts.append(f"{' to '.join(map(str, num_trials))} trials per row")
        text = f"All rows: {', '.join([*fixed, f'dialect {dialect}'])}; {', '.join(counts)}."
        if not self.has_tuned_on and (on := next(filter(None, map(tuned_on, runs)), None)):
            text += f" Learning rate and gamma tuned on the {on}." if self.is_tuned_here else f" Tuned on: {on}."
        return text if dialect == OURS else f"{text} {dialect_note(dialect)}"

    def notes_on(self, listed: Sequence[Column], columns: Sequence[Column]) -> list[str]:
        """What a reader of `columns` needs to know, and why those of `listed` that are none of them are missing."""
        runs, names = list(self.runs.values()), [column.key for column in columns]
        found = [*filter(None, [self.apart]), *notes.of_repeats(self.repeats, self.runs)]
        found += [text for run in runs for text in (size_of_test(run), units_of(run), *ceiling_of(run)) if text]
        found += [*self._of_intervals(columns), *notes.of_provenance(self.runs, [each.runs for each in self.methods])]
        found += [OF_UNMERGED] * any(UNMERGED in run.metrics for run in runs)
        found += [*notes.of_runs(self.runs), *notes.of_nulls(runs, names, [column.key for column in listed])]
        found += notes.of_records(self.folder, self.runs)
        versions = dict.fromkeys(f"{name} {version}" for run in runs for name, version in run.versions.items())
        commits = dict.fromkeys(notes.commit_of(run.commit) for run in runs)
        hardware = dict.fromkeys(run.hardware for run in runs if run.hardware)
        made_by = [f"commit {', '.join(commits)}", *hardware, ", ".join(versions)]
        return [*dict.fromkeys(found), "; ".join(made_by)]

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


def _listed(what: str, values: Iterable[Any]) -> str:
    known = sorted(value for value in values if value is not None)
    return f"{what}{'s' * (len(known) != 1)} {', '.join(map(str, known)) or 'unknown'}"
