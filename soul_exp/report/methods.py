"""The methods that the tables of a folder compare, as figures name them, and what their runs say together."""

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from soul_exp.report.frames import Frames
from soul_exp.report.group import Group
from soul_exp.report.rows import Rows, text_of
from soul_exp.report.runs import CHOSEN, find, study_of
from soul_exp.report.table import Cell, Column

CHOICES = ("loss", "optimizer", "model", "task", "precision", "adapter", "compute")
CHECKPOINT = "checkpoint"  # what nothing was unlearned from
Tuning = tuple[str, tuple[tuple[float, float], ...]]  # on what, and the learning rates and gammas tried


@dataclass(frozen=True)
class Methods:
    """The runs below a folder, each result once, with the columns `method` and `study`; what tells methods apart."""

    runs: pd.DataFrame
    names: list[str]  # in the order of the rows of tables; by number where `option` tells them apart
    option: str | None  # the option (a column of `runs`) that alone tells all methods apart, and is a number
    numbers: dict[str, float]  # method -> its number, where there is such an option
    groups: dict[str, str]  # method -> its optimizer, where methods differ in loss and optimizer
    titles: dict[int, str]  # table -> what its runs share, after a letter; "" where there is one table
    tables: Mapping[int, Group]
    tunings: Sequence[Tuning]  # what `tuning 1` in names is, ...

    def cell(self, table: int, names: Sequence[str], metric: str) -> Cell:
        """The mean of a metric or cost over the runs `names` of a table, as the table has it."""
        group = self.tables[table]
        return group.cell(names, next((each for each in group.costs if each.key == metric), Column(metric, metric)))

    def reference(self, table: int, model: str, metric: str) -> dict[str, float] | None:
        """The metric of a compared model as the table has it: mean, low, high; NaN for an end that it has not."""
        found = self.tables[table].reference(model, [Column(metric, metric)])
        return _numbers_of(found[0]) if found and found[0].value is not None else None

    def summary(self, runs: pd.DataFrame, metric: str) -> pd.DataFrame:
        """A row for each method of `runs`, of one table, with a value of `metric`: mean, low, high, n, has_units.

        The mean and its 95 % interval are those of tables, over runs (or tuning studies) and units; an end is NaN where
        there is none. `n` counts runs, `has_units` says whether each has an interval of its own. A diverged run does
        not count.
        """
        rows: dict[str, dict[str, float]] = {}
        for method, same in runs[runs["status"] != "diverged"].groupby("method", sort=False):
            table, names = int(same["table"].iloc[0]), [*same["run"]]
            cell = self.cell(table, names, metric)
            if cell.value is not None:
                alone = (self.cell(table, [name], metric) for name in names)
                has_units = all(each.low is not None for each in alone if each.value is not None)
                rows[str(method)] = {**_numbers_of(cell), "n": cell.n, "has_units": has_units}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high", "n", "has_units"])


def _numbers_of(cell: Cell) -> dict[str, float]:
    ends = {"mean": cell.value, "low": cell.low, "high": cell.high}
    return {name: np.nan if end is None else end for name, end in ends.items()}


def methods(frames: Frames) -> Methods:
    """A method is what the tables have a row for; its name says in what it differs from the others of its table."""
    results = find(frames.folder)[0]
    tables = dict(enumerate(frames.tables, 1))
    keys = _keys([*tables.values()])
    short = [key.rpartition(".")[2] for key in keys]
    named = {key: last if short.count(last) == 1 else key for key, last in zip(keys, short, strict=True)}
    tunings: list[Tuning] = []
    method_of: dict[str, str] = {}  # run -> its method, in the order of the tables
    for group in tables.values():
        method_of |= _named(group, named or {"choices.loss": "", "choices.optimizer": ""}, tunings)
    runs = frames.runs.set_index("run", drop=False).loc[[*method_of]].reset_index(drop=True)
    runs = runs.assign(method=method_of.values(), study=numbers([study_of(results[name]) for name in method_of]))
    names = list(dict.fromkeys(method_of.values()))
    options = [key for key in keys if key.startswith("config.")]
    by_number: dict[str, float] = {}
    if len(keys) == len(options) == 1:
        values = runs[keys[0]]
        if values.map(lambda value: isinstance(value, int | float) and not isinstance(value, bool)).all():
            pairs = sorted({*zip(runs["method"], values.astype(float), strict=True)}, key=lambda pair: pair[1])
            is_one_each = len(pairs) == len(names) == len({number for _, number in pairs})
            by_number = dict(pairs) if is_one_each and values.notna().all() else {}
    groups = dict(zip(runs["method"], runs["optimizer"].fillna(CHECKPOINT), strict=True))
    has_both = {"choices.loss", "choices.optimizer"} <= {*keys}
    seeds = [key for key in runs if key.startswith("seeds.")]
    titles = _titles(runs, [key for key in CHOICES if key in runs], seeds)
    option = keys[0] if by_number else None
    groups = groups if has_both else {}
    return Methods(runs, list(by_number) or names, option, by_number, groups, titles, tables, tunings)


def _keys(tables: Sequence[Rows]) -> list[str]:
    """The keys that tell rows of a table apart, choices first, without options that the choices imply."""
    found: dict[str, None] = {}
    for group in tables:
        choices = [key for key in group.frame if key.startswith("choices.")]
        for key in group.by:
            by_choices = group.frame if key in choices else group.frame.groupby(choices, dropna=False)
            if np.max(by_choices[key].nunique(dropna=False)) > 1:
                found[key] = None
    return sorted(found, key=lambda key: not key.startswith("choices."))


def _named(group: Rows, keys: Mapping[str, str], tunings: list[Tuning]) -> dict[str, str]:
    """Run -> the name of its method, without repeats; appends to `tunings` those that alone tell methods apart."""
    same: dict[str, list[tuple[Any, ...]]] = {}
    for member, (first, *_) in group.members.items():
        same.setdefault(_name(group.frame.loc[first], keys, is_tuned=group.is_tuned_here), []).append(member)
    suffixes: dict[tuple[Any, ...], str] = {}
    for name, alike in same.items():
        several = sum(on is not None for _, on, _ in alike) > 1
        for member in alike:
            _, on, tried = member
            suffixes[member] = name
            if len(alike) > 1 and on is None:
                suffixes[member] += ", untuned"  # no mean is over both
            elif several:
                if (tuning := (on, tried)) not in tunings:
                    tunings.append(tuning)
                suffixes[member] += f", tuning {tunings.index(tuning) + 1}"
    repeated = {name for others in group.repeats.values() for name in others}
    return {run: suffixes[member] for member, of in group.members.items() for run in of if run not in repeated}


def _name(row: pd.Series, keys: Mapping[str, str], *, is_tuned: bool) -> str:
    """The values of `keys` (key -> its name) in a row, which was tuned here or not."""
    is_checkpoint = pd.isna(row["choices.loss"]) and pd.isna(row["choices.optimizer"])
    parts = [CHECKPOINT] if is_checkpoint else []
    for key, short in keys.items():
        if key in row and pd.notna(row[key]) and not (is_tuned and key in CHOSEN):
            parts.append(("" if key.startswith("choices.") else f"{short} = ") + text_of(row[key]))
    return ", ".join(parts)


def _titles(runs: pd.DataFrame, choices: Iterable[str], seeds: Iterable[str]) -> dict[int, str]:
    """A letter and the caption of each table; the choices, and for one caption the seeds, in which tables differ."""
    by_table = runs.groupby("table")
    first = by_table.first()
    if len(first) == 1:
        return {int(first.index[0]): ""}
    keys = [*choices, *(seeds if first["caption"].duplicated().any() else ())]
    shared = [key for key in keys if by_table[key].nunique(dropna=False).max() == 1 and first[key].nunique() > 1]
    titles = {}
    for number, (table, row) in enumerate(first.iterrows()):
        about = ", ".join(f"{key.removeprefix('seeds.')} {text_of(row[key])}" for key in shared if pd.notna(row[key]))
        titles[int(str(table))] = f"{letter(number)}: {row['caption']}" + (f" ({about})" if about else "")
    return titles


def letter(number: int) -> str:
    """A, B, ..., Z, A1, B1, ..."""
    letters = string.ascii_uppercase
    return letters[number % 26] + (str(number // 26) if number >= 26 else "")


def numbers(values: Any, index: Any = None) -> pd.Series:
    """`values` as floats; NaN for what is null or no number."""
    found = pd.to_numeric(pd.Series(values, index=index), errors="coerce").astype(float)
    return found.replace([np.inf, -np.inf], np.nan)


def curves(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """A row for each method and value of `x`: the mean of `y` over runs (each tuning study counts once), low, high, n.

    A diverged run does not count.
    """
    sound = frame[frame["status"] != "diverged"]
    sound = sound.assign(x=numbers(sound[x]), y=numbers(sound[y]), study=sound["study"].fillna(-1))
    groups = sound.dropna(subset=["x", "y"]).groupby(["method", "x"], sort=False)
    found = groups["y"].agg(low="min", high="max", n="count")
    studies = sound.groupby(["method", "x", "study"], sort=False)["y"].mean()
    return found.assign(mean=studies.groupby(["method", "x"]).mean()).reset_index()
