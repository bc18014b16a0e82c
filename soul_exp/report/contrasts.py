"""Methods compared with one another: unit by unit with a baseline, by dominance, and by the tail over units."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from soul_exp.report.labels import label_of, quoted
from soul_exp.report.paired import compared
from soul_exp.report.rows import Method
from soul_exp.report.runs import folder_of
from soul_exp.report.statistics import dominated_by, performance_profile, probability_of_improvement
from soul_exp.report.table import CHOSEN_GROUP, Cell, Column, Row, Table, loss_of
from soul_exp.report.units import Units

if TYPE_CHECKING:
    from soul_exp.report.group import Group

BASELINE = "adam"  # the optimizer that the others are compared with
OBJECTIVES = ("log10_forget_quality", "utility", "relearn_excess")  # forget, utility, robustness
PROFILED, THRESHOLDS = "forget_extraction_strength", (0.1, 0.2, 0.3, 0.5, 0.9)
PAIRED = (
    "Each unit's share in a number, averaged over seeds, less that of the same unit with the baseline; p of the "
    "sign-flip test over units (exact up to 16, else of 100,000 random patterns), given these seeds, two-sided, Holm's "
    "correction over the rows of a column; the interval is over seeds and units. Units are those of the rows that a "
    "number is of, or its items where each is independent."
)
TRADE_OFF = (
    "A method is dominated if another one is at least as good in each of {objectives}, and better in one; of means, "
    "whatever their noise."
)
IMPROVEMENT = (
    f" P: the share of pairs of a run and a run with optimizer={BASELINE}, all else alike, in which the former is "
    "better, ties ½ (Agarwal et al. 2021); of 2 runs or more each."
)
PROFILE = (
    "The share of all (run, unit) pairs whose {measure} exceeds the threshold: a mean can hide units that are still "
    "known (performance profile, Agarwal et al. 2021)."
)


@dataclass(frozen=True)
class Contrasts:
    """The rows of a comparison."""

    of: "Group"

    def tables(self, columns: Sequence[Column], is_requested: bool) -> list[Table]:
        """The tables that there is something to say in; where columns are requested, of these by unit alone."""
        if len(self.of.methods) < 2:
            return []
        units = {name: Units(folder_of(self.of.folder, name), run) for name, run in self.of.runs.items()}
        found = [self._paired(block, columns, units) for block in self._blocks()]
        if not is_requested:
            found += [self._trade_offs(columns), self._profile(units)]
        return [table for table in found if table is not None]

    def _names(self) -> dict[str, Method]:
        """The methods by the values that tell them apart; a diverged part of a method is not one."""
        named: dict[str, Method] = {}
        for row in self.of.methods:
            named.setdefault(", ".join(row.key[place] for place in self.of.places) or "all runs", row)
        return named

    def _label(self) -> str:
        return ", ".join(self.of.keys[place].label for place in self.of.places) or "runs"

    def _blocks(self) -> list[list[str]]:
        """The names of methods that differ in the optimizer and its own options only: what has one baseline."""
        found: dict[tuple[str, ...], list[str]] = {}
        for name, row in self._names().items():
            same = (
                text
                for text, key in zip(row.key, self.of.keys, strict=True)
                if key.group != CHOSEN_GROUP and key.key.partition(".")[0] != "optimizer"
            )
            found.setdefault(tuple(same), []).append(name)
        return [*found.values()]

    def _baselines(self, block: Sequence[str]) -> list[str]:
        named = self._names()
        return [name for name in block if self.of.runs[named[name].runs[0]].choices.get("optimizer") == BASELINE]

    def _first_of(self, model: str, name: str) -> list[float | None]:
        """The metric by unit of a compared model, in the first run that recorded it."""
        found = (Units(folder_of(self.of.folder, run), of, model).of(name) for run, of in self.of.runs.items())
        return [*next(filter(None, found), {}).values()]

    def _paired(self, block: Sequence[str], columns: Sequence[Column], units: Mapping[str, Units]) -> Table | None:
        """The differences of the methods of a block from the one with optimizer=adam, if there is one."""
        named, baselines = self._names(), self._baselines(block)
        if not baselines or len(block) == len(baselines) == 1:
            return None
        values = {
            column: {name: [units[run].of(column.key) for run in named[name].runs] for name in block}
            for column in columns
        }
        has = [column for column, of in values.items() if any(unit for seeds in of.values() for unit in seeds)]
        about = " ".join([PAIRED * bool(has), *self._not_tested(block, columns, units)]).strip()
        if not has:
            return Table("", (), (), about) if about else None
        if len(baselines) > 1:
            listed = "; ".join(map(quoted, baselines))
            why = f"Not compared by unit: {len(baselines)} rows have optimizer={BASELINE} ({listed})."
            return Table("", (), (), why)
        tested = {column: compared(values[column], baselines[0], self.of.range_of(column)) for column in has}
        rows = []
        for name in (each for each in block if each != baselines[0]):
            rows.append(Row((Cell(self._stated(name)), *(tested[column][name] or Cell() for column in has))))
        header = (Column("method", self._label()), *(Column(column.key, column.label) for column in has))
        title = f"Difference from {self._stated(baselines[0])}, paired by {self.of.first.unit}"
        return Table(title, header, tuple(rows), about)

    def _stated(self, name: str) -> str:
        """The name of a method, with how its runs ended unless all are sound."""
        row = self._names()[name]
        return name if row.is_sound else f"{name} ({row.status})"

    def _not_tested(self, block: Sequence[str], columns: Sequence[Column], units: Mapping[str, Units]) -> Iterator[str]:
        """A sentence for each column of an attack whose values by unit do not add up to it in some method."""
        named = self._names()
        for column in columns:
            lacks = [
                name
                for name in block
                if any(
                    column.key in units[run].run.unit_values and not units[run].add_up(column.key)
                    for run in named[name].runs
                )
            ]
            if lacks:
                which = "any method" if len(lacks) == len(block) else "; ".join(lacks)
                yield f"No test of {column.label} of {which}: the units' shares do not add up to it."

    def _trade_offs(self, columns: Sequence[Column]) -> Table | None:
        """Which methods are dominated, and how often a run of each is better than one of the baseline."""
        named = {name: row for name, row in self._names().items() if row.is_sound}
        columns = [column for column in columns if column.key in OBJECTIVES]
        goals = [*zip(columns, self.of.targets(columns), strict=True)]

        def losses(names: Sequence[str], column: Column, target: float | None) -> list[float]:
            values = (self.of.cell([name], column).value for name in names)
            return [loss for value in values if (loss := loss_of(value, column.direction, target)) is not None]

        means = {
            name: [loss_of(self.of.cell(row.runs, column).value, column.direction, target) for column, target in goals]
            for name, row in named.items()
        }
        complete = {name: [loss for loss in of if loss is not None] for name, of in means.items() if None not in of}
        if len(goals) < 2 or len(complete) < 2:
            return None
        dominated = dominated_by(complete)
        base = {name: self._baselines(block) for block in self._blocks() for name in block}
        better: dict[tuple[str, Column], float] = {}
        for (name, row), goal in itertools.product(named.items(), goals):
            if len(base[name]) == 1 and base[name] != [name] and base[name][0] in named:
                ours, theirs = losses(row.runs, *goal), losses(named[base[name][0]].runs, *goal)
                if min(len(ours), len(theirs)) > 1:
                    better[name, goal[0]] = probability_of_improvement(ours, theirs)
        shown = [column for column, _ in goals if any(key[1] == column for key in better)]
        rows = []
        for name in named:
            rivals = dominated.get(name)
            text = (
                f"dominated by {'; '.join(rivals)}" if rivals else "on the front" if rivals == [] else "a value is null"
            )
            shares = (Cell(None, better.get((name, column))) for column in shown)
            rows.append(Row((Cell(name), Cell(text), *shares)))
        for name, row in self._names().items():
            if name not in named:
                rows.append(Row((Cell(name), Cell(f"not compared: {row.status}"), *(Cell() for _ in shown))))
        header = [Column("method", self._label()), Column("pareto", "Pareto")]
        header += [Column(column.key, f"P({column.label} better than {BASELINE}'s)") for column in shown]
        about = TRADE_OFF.format(objectives=", ".join(column.title for column, _ in goals))
        return Table("Trade-offs", tuple(header), tuple(rows), about + (IMPROVEMENT if shown else ""))

    def _profile(self, units: Mapping[str, Units]) -> Table | None:
        of_models = {model: self._first_of(model, PROFILED) for model in ("original", "retrained")}
        of_rows = {
            name: [value for run in row.runs for value in units[run].of(PROFILED).values()]
            for name, row in self._names().items()
        }
        scores = {
            name: performance_profile([value for value in values if value is not None], THRESHOLDS)
            for name, values in {**of_models, **of_rows}.items()
            if values and None not in values
        }
        if not scores.keys() & of_rows.keys():
            return None
        header = (Column("method", self._label()), *(Column(f"{each:g}", f"> {each:g}") for each in THRESHOLDS))
        rows = (Row((Cell(name), *(Cell(None, share) for share in of))) for name, of in scores.items())
        unit, label = self.of.first.unit, label_of(PROFILED)
        about = PROFILE.format(measure=label)
        if lacks := [name for name in of_rows if name not in scores]:
            about += f" Without a value of each {unit}, and so without a profile: {'; '.join(lacks)}."
        return Table(f"Profile of {label} over {unit}s", header, tuple(rows), about)
