"""The methods that the runs of a folder compare, and what their seeds say together."""

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from soul_exp.report.frames import Frames
from soul_exp.report.runs import CHOSEN
from soul_exp.report.statistics import Range, mean_of

CHOICES = ("loss", "optimizer", "model", "task", "precision", "adapter", "compute")
CHECKPOINT = "checkpoint"  # what nothing was unlearned from


@dataclass(frozen=True)
class Methods:
    """The runs below a folder, each result once, with a column `method`; what tells methods apart."""

    runs: pd.DataFrame
    names: list[str]  # in the order of the runs; by number where `option` tells them apart
    option: str | None  # the option (a column of `runs`) that alone tells all methods apart, and is a number
    numbers: dict[str, float]  # method -> its number, where there is such an option
    groups: dict[str, str]  # method -> its optimizer, where methods differ in loss and optimizer
    titles: dict[int, str]  # table -> what its runs share, after a letter; "" where there is one table


def methods(frames: Frames) -> Methods:
    """A method is what differs between runs of one table, without seeds and without what trials chose."""
    runs = frames.runs.copy()
    choices = [key for key in CHOICES if key in runs]
    chosen = CHOSEN if runs["num_trials"].any() else ()
    options = [
        key
        for key in runs
        if key.startswith("config.")
        and key not in chosen
        and _most_values(runs, ["table", *choices], _comparable(runs, key)) > 1  # else the choices imply it
    ]
    keys = [*(key for key in choices if _most_values(runs, "table", runs[key]) > 1), *options]
    short = [key.rpartition(".")[2] for key in keys]
    named = {key: last if short.count(last) == 1 else key for key, last in zip(keys, short, strict=True)}
    runs["method"] = [_name(row, keys or ["loss", "optimizer"], named) for _, row in runs.iterrows()]
    is_mixed = runs["tuned"].isna().groupby([runs["table"], runs["method"]]).transform("nunique") > 1
    runs.loc[is_mixed & runs["tuned"].isna(), "method"] += ", untuned"  # no mean is over both
    seeds = [key for key in runs if key.startswith("seeds.")]
    runs = runs[~runs.duplicated(["table", "method", *seeds])]
    names = list(dict.fromkeys(runs["method"]))
    numbers: dict[str, float] = {}
    if len(keys) == 1 and keys[0].startswith("config."):
        values = runs[keys[0]]
        if values.map(lambda value: isinstance(value, int | float) and not isinstance(value, bool)).all():
            numbers = dict(sorted(zip(runs["method"], values.astype(float), strict=True), key=lambda pair: pair[1]))
            numbers = {} if any(np.isnan(value) for value in numbers.values()) else numbers
    titles = _titles(runs, choices, seeds)
    has_both = {"loss", "optimizer"} <= {*keys}
    groups = dict(zip(runs["method"], runs["optimizer"].fillna(CHECKPOINT), strict=True)) if has_both else {}
    return Methods(runs, list(numbers) or names, keys[0] if numbers else None, numbers, groups, titles)


def _comparable(runs: pd.DataFrame, key: str) -> pd.Series:
    """The values of an option. A run without an attack is no other method, nor is one with other numbers from it."""
    values = runs[key]
    if not key.startswith("config.attack."):
        return values
    if "._target_" in key or ".metrics." in key:
        return values.isna() & False
    known = values.dropna()
    return values.fillna(known.iloc[0]) if len(known) else values


def _most_values(runs: pd.DataFrame, by: str | list[str], values: pd.Series) -> int:
    groups = [runs[key] for key in ([by] if isinstance(by, str) else by)]
    return int(values.groupby(groups, dropna=False).nunique(dropna=False).max())


def _name(row: pd.Series, keys: Sequence[str], named: dict[str, str]) -> str:
    if pd.isna(row["loss"]) and pd.isna(row["optimizer"]):
        keys = [key for key in keys if key not in ("loss", "optimizer")]
        start = [CHECKPOINT]
    else:
        start = []
    begins = {key: "" if key in CHOICES else f"{named[key]} = " for key in keys}
    return ", ".join([*start, *(f"{begins[key]}{_text(row[key])}" for key in keys if _is(row[key]))])


def _is(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and np.isnan(value))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _titles(runs: pd.DataFrame, choices: Iterable[str], seeds: Iterable[str]) -> dict[int, str]:
    """A letter and the caption of each table; the choices, and for one caption the seeds, in which tables differ."""
    first = runs.groupby("table").first()
    if len(first) == 1:
        return {int(first.index[0]): ""}
    keys = [*choices, *(seeds if first["caption"].duplicated().any() else ())]
    shared = [key for key in keys if _most_values(runs, "table", runs[key]) == 1 and first[key].nunique() > 1]
    titles = {}
    for number, (table, row) in enumerate(first.iterrows()):
        about = ", ".join(f"{key.removeprefix('seeds.')} {_text(row[key])}" for key in shared if _is(row[key]))
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


def over_seeds(runs: pd.DataFrame, name: str, least: float = -np.inf, largest: float = np.inf) -> pd.DataFrame:
    """A row for each method of `runs` with a value of the metric `name`: mean, low, high, n (of seeds).

    The 95 % interval is that of tables, `statistics.mean_of`, over runs (each tuning study counts once) and units, NaN
    without one; it ends at the `least` and the `largest` value of the metric. A diverged run does not count.
    """
    rows: dict[str, dict[str, float]] = {}
    for method, seeds in runs[runs["status"] != "diverged"].groupby("method", sort=False):
        values, low, high = (
            [None if np.isnan(value) else value for value in numbers(seeds.get(f"{name}{end}", np.nan), seeds.index)]
            for end in ("", ".low", ".high")
        )
        ends = [None if one is None or other is None else (one, other) for one, other in zip(low, high, strict=True)]
        cell = mean_of(values, ends, [*seeds["tuned"].fillna("")], Range(least, largest))
        if cell.value is not None:
            none = np.nan
            rows[str(method)] = {
                "mean": cell.value,
                "low": none if cell.low is None else cell.low,
                "high": none if cell.high is None else cell.high,
                "n": cell.n or 1,
            }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high", "n"])


def curves(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """A row for each method and value of `x`: the mean of `y` over seeds, its low(est), high(est), and n.

    A diverged run does not count.
    """
    sound = frame[frame["status"] != "diverged"]
    sound = sound.assign(x=numbers(sound[x]), y=numbers(sound[y]))
    groups = sound.dropna(subset=["x", "y"]).groupby(["method", "x"], sort=False)["y"]
    return groups.agg(mean="mean", low="min", high="max", n="count").reset_index()


def reference(runs: pd.DataFrame, model: str, name: str) -> dict[str, float] | None:
    """The metric `name` of a compared model, with its interval, of the first of `runs` that has it."""
    column = f"{model}.{name}"
    if column not in runs or (values := numbers(runs[column])).isna().all():
        return None
    first = values.first_valid_index()
    ends = {end: float(numbers(runs[f"{column}.{end}"])[first]) if f"{column}.{end}" in runs else np.nan
            for end in ("low", "high")}  # fmt: skip
    return {"mean": float(values[first]), **ends}
