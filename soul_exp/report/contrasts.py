"""Methods compared with one another: unit by unit with a baseline, by dominance, and by the tail over units."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from soul_exp.report.labels import label_of
from soul_exp.report.paired import compared
from soul_exp.report.rows import Method
from soul_exp.report.statistics import dominated_by, performance_profile, probability_of_improvement
from soul_exp.report.table import CHOSEN_GROUP, Cell, Column, Row, Table, loss_of
from soul_exp.report.units import Units
from soul_exp.results import Results

BASELINE = "adam"  # the optimizer that the others are compared with
OBJECTIVES = ("log10_forget_quality", "utility", "relearn_excess")  # forget, utility, robustness
PROFILED, THRESHOLDS = "forget_extraction_strength", (0.1, 0.2, 0.3, 0.5, 0.9)
PAIRED = (
    "Each unit's share in a number, averaged over seeds, less that of the same unit with the baseline; p of the exact "
    "sign-flip test over units, given these seeds, two-sided, after Holm's correction over the rows of a column; the "
    "interval is over seeds and units. Units are those of the rows that a number is of, or its items where each is "
    "independent."
)
TRADE_OFF = (
    "A method is dominated if another one is at least as good in each of {objectives}, and better in one; of means, "
    "whatever their noise."
)
IMPROVEMENT = (
    " P: the share of pairs of a run and a run of {baseline} in which the former is better, ties ½ (Agarwal et al. "
    "2021); of 2 runs or more each."
)
PROFILE = (
    "The share of all (run, unit) pairs whose {measure} exceeds the threshold: a mean can hide units that are still "
    "known (performance profile, Agarwal et al. 2021)."
)


CellOf = Callable[[Sequence[str], Column], Cell]


@dataclass(frozen=True)
class Contrasts:
    """The rows of a comparison."""

    folder: Path
    runs: Mapping[str, Results]
    rows: Sequence[Method]
    keys: Sequence[Column]  # that tell rows apart, and what trials chose

    def tables(
        self, columns: Sequence[Column], targets: Sequence[float | None], cell: CellOf, is_requested: bool
    ) -> list[Table]:
        """The tables that there is something to say in; where columns are requested, of these by unit alone."""
        if len(self.rows) < 2:
            return []
        units = {name: Units(self._folder_of(name), run) for name, run in self.runs.items()}
        found = [self._paired(columns, units)]
        if not is_requested:
            found += [self._trade_offs(columns, targets, cell), self._profile(units)]
        return [table for table in found if table is not None]

    def _folder_of(self, name: str) -> Path:
        return self.folder / name if (self.folder / name).is_dir() else self.folder  # the folder may be the run

    def _names(self) -> dict[str, Method]:
        """The methods by the values that tell them apart; a diverged part of a method is not one."""
        named: dict[str, Method] = {}
        for row in self.rows:
            named.setdefault(", ".join(row.key[place] for place in self._places()) or "all runs", row)
        return named

    def _places(self) -> list[int]:
        """The places of the keys in which rows differ, without what trials chose if the others tell rows apart."""
        differ = [place for place in range(len(self.keys)) if len({row.key[place] for row in self.rows}) > 1]
        few = [place for place in differ if self.keys[place].group != CHOSEN_GROUP]
        keys = {row.key for row in self.rows}
        return few if len({tuple(key[place] for place in few) for key in keys}) == len(keys) else differ

    def _label(self) -> str:
        return ", ".join(self.keys[place].label for place in self._places()) or "runs"

    def _baselines(self, named: Mapping[str, Method]) -> list[str]:
        return [name for name, row in named.items() if self.runs[row.runs[0]].choices.get("optimizer") == BASELINE]

    def _first_of(self, model: str, name: str) -> list[float | None]:
        """The metric by unit of a compared model, in the first run that recorded it."""
        found = (Units(self._folder_of(run), of, model).of(name) for run, of in self.runs.items())
        return [*next(filter(None, found), {}).values()]

    def _paired(self, columns: Sequence[Column], units: Mapping[str, Units]) -> Table | None:
        named = self._names()
        baselines, title = self._baselines(named), f"paired by {next(iter(self.runs.values())).unit}"
        if len(baselines) > 1:
            why = f"Not compared by unit: {len(baselines)} rows have optimizer={BASELINE} ({'; '.join(baselines)})."
            return Table("", (), (), why)
        if not baselines or len(named) < 2:
            return None
        values = {
            column: {name: [units[run].of(column.key) for run in row.runs] for name, row in named.items()}
            for column in columns
        }
        has = [column for column, of in values.items() if any(unit for seeds in of.values() for unit in seeds)]
        if not has:
            return None
        tested = {column: compared(values[column], baselines[0]) for column in has}
        rows = []
        for name in named:
            if name != baselines[0]:
                found = (tested[column][name] for column in has)
                cells = (
                    Cell() if each is None else Cell(None, each.difference, each.low, each.high, p=each.p)
                    for each in found
                )
                rows.append(Row((Cell(name), *cells)))
        header = (Column("method", self._label()), *(Column(column.key, column.label) for column in has))
        return Table(f"Difference from {baselines[0]}, {title}", header, tuple(rows), PAIRED)

    def _trade_offs(self, columns: Sequence[Column], targets: Sequence[float | None], cell: CellOf) -> Table | None:
        """Which methods are dominated, and how often a run of each is better than one of the baseline."""
        named = {name: row for name, row in self._names().items() if row.is_sound}
        goals = [(column, target) for column, target in zip(columns, targets, strict=True) if column.key in OBJECTIVES]

        def losses(names: Sequence[str], column: Column, target: float | None) -> list[float]:
            values = (cell([name], column).value for name in names)
            return [loss for value in values if (loss := loss_of(value, column.direction, target)) is not None]

        means = {
            name: [loss_of(cell(row.runs, column).value, column.direction, target) for column, target in goals]
            for name, row in named.items()
        }
        complete = {name: [loss for loss in of if loss is not None] for name, of in means.items() if None not in of}
        if len(goals) < 2 or len(complete) < 2:
            return None
        dominated = dominated_by(complete)
        baseline = next(iter(self._baselines(named)), None) if len(self._baselines(named)) == 1 else None
        better = [goal for goal in goals if baseline is not None and len(losses(named[baseline].runs, *goal)) > 1]
        rows = []
        for name, row in named.items():
            rivals = dominated.get(name)
            text = (
                "a value is null"
                if rivals is None
                else f"dominated by {'; '.join(rivals)}"
                if rivals
                else "on the front"
            )
            cells = [Cell(name), Cell(text)]
            for goal in better:
                mine, base = losses(row.runs, *goal), losses(named[str(baseline)].runs, *goal)
                is_given = name != baseline and len(mine) > 1
                cells.append(Cell(None, probability_of_improvement(mine, base)) if is_given else Cell())
            rows.append(Row(tuple(cells)))
        header = [Column("method", self._label()), Column("pareto", "Pareto")]
        header += [Column(column.key, f"P({column.label} better than {baseline}'s)") for column, _ in better]
        about = TRADE_OFF.format(objectives=", ".join(column.title for column, _ in goals))
        about += IMPROVEMENT.format(baseline=baseline) if better else ""
        return Table("Trade-offs", tuple(header), tuple(rows), about)

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
        unit, label = next(iter(self.runs.values())).unit, label_of(PROFILED)
        return Table(f"Profile of {label} over {unit}s", header, tuple(rows), PROFILE.format(measure=label))
