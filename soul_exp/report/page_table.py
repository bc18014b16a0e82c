"""The tables of the report page: what each run measured, and means over the seeds of runs of one origin."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from soul_exp.metrics.dialects import OURS
from soul_exp.metrics.scale import is_kept
from soul_exp.report.labels import (
    ARROWS,
    NULL,
    ON_DEMAND,
    ceiling_of,
    declared,
    dialect_note,
    finite,
    label_of,
    number,
    scale_in,
    size_of_test,
    units_of,
    with_interval,
)
from soul_exp.report.runs import frame_of, study_of, varied
from soul_exp.report.statistics import Range, mean_of
from soul_exp.results import COMPARED, REQUEST, Results, metric_entries

KINDS = ("settings", "efficacy", "utility", "robustness", "validation", "cost")  # of columns, in their order
# The columns that are shown before others are asked for; of a kind without any of these, its first `FEW`
SHOWN = {
    *("log10_forget_quality", "forget_accuracy", "forget_rouge", "mia_auc"),
    *("utility", "retain_accuracy", "authors_accuracy", "facts_accuracy"),
    *("relearn_excess", "rtt_recovery", "uds"),
    *("seconds.unlearn", "peak_memory_gib"),
}
FEW = 3
ITEM = "."  # between the parts of the name of a column that is no metric


@dataclass(frozen=True)
class Column:
    """A column of the table of runs: a metric of the unlearned model, or another value of a run."""

    key: str
    label: str
    kind: str  # of KINDS
    arrow: str = ""
    version: int | None = None  # of the metric's definition
    is_metric: bool = True
    shown: bool = False


@dataclass(frozen=True)
class Cell:
    """A value in a table: its text, the range below it, and what it is sorted by (None: last)."""

    text: str
    value: float | str | None
    under: str = ""


def table_of(runs: dict[str, Results]) -> dict[str, Any]:
    """The tables of comparable runs: "columns", "rows" of runs, "means" of methods, "references", notes."""
    frame = frame_of(runs).set_index("run")
    first = next(iter(runs.values()))
    choices = [key for key in frame if key.startswith("choices.")]
    by = [key for key in choices if frame[key].nunique(dropna=False) > 1]
    keys = [*by, *(key for key in varied(frame) if key not in by)]
    methods = _methods(runs, {name: [_setting(key, row[key]) for key in keys] for name, row in frame.iterrows()})
    labels = {
        name: f"{method}, seed {runs[name].seeds.get('seed')}" if [*methods.values()].count(method) > 1 else method
        for name, method in methods.items()
    }
    labels = {name: name if [*labels.values()].count(label) > 1 else label for name, label in labels.items()}
    columns = _columns(runs, choices, keys)
    cells = {name: {c.key: _cell(run, c, frame.loc[name].get(c.key)) for c in columns} for name, run in runs.items()}
    by_method: dict[str, list[str]] = {}
    for name, method in methods.items():
        by_method.setdefault(method, []).append(name)
    models = [m for m in COMPARED if m.key != "unlearned" and first.metrics.get(m.key)]
    return {
        "caption": first.caption,
        "title": f"{next(iter(runs)) if len(runs) == 1 else f'{len(runs)} runs'}: {first.caption}",
        "labels": labels,
        "methods": methods,
        "columns": columns,
        "rows": [(name, labels[name], cells[name]) for name in runs],
        "means": [
            (method, names, {c.key: _of_runs({name: runs[name] for name in names}, c, cells) for c in columns})
            for method, names in by_method.items()
        ],
        "references": [
            (next(iter(runs)), m.key, m.title, {c.key: _cell_of(first, m.key, c.key) for c in columns if c.is_metric})
            for m in models
        ],
        "notes": list(dict.fromkeys([*_about(runs), *_notes(runs)])),
    }


def _methods(runs: Mapping[str, Results], settings: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What the runs that may share a mean have in common, by run: their settings and where their numbers come from.

    Runs of other code, versions, definitions, dialects or tuning never share a mean, nor do two with the same seeds.
    Code is named by the first of its commits: those that change none of it are the same.
    """
    commits: dict[str, str] = {}
    for run in runs.values():
        commits.setdefault(
            run.sha256.get("code") or str(run.commit), (run.commit or "unknown")[:10] + (run.commit or "")[40:]
        )
    origins = {name: _origin(run, commits) for name, run in runs.items()}
    kinds = dict.fromkeys(kind for origin in origins.values() for kind in origin)
    differing = [kind for kind in kinds if len({origin[kind] for origin in origins.values() if kind in origin}) > 1]
    found: dict[str, str] = {}
    seen: dict[tuple[str, str], int] = {}
    for name, run in runs.items():
        parts = [part for part in settings[name] if part] or [_title(name, run)]
        method = ", ".join([*parts, *(f"{kind} {origins[name][kind]}" for kind in differing if kind in origins[name])])
        key = (method, str(run.seeds))
        seen[key] = seen.get(key, 0) + 1
        found[name] = method if seen[key] == 1 else f"{method} (repeat {seen[key]})"
    return found


def _origin(run: Results, commits: Mapping[str, str]) -> dict[str, str]:
    origin = {"commit": commits[run.sha256.get("code") or str(run.commit)], "tuned on": run.tuned or "nothing"}
    definitions = {f"version of {name}": str(version) for name, version in run.metric_versions.items()}
    return {**origin, "dialect": str(run.config.get("dialect", OURS)), **run.versions, **definitions}


def _title(name: str, run: Results) -> str:
    """The loss and the optimizer; of a run that only evaluates a model, or is one of several requests, its name."""
    if name.startswith(REQUEST) or "unlearn" not in run.config.get("stages", ()):
        return name
    return " ".join(run.choices[key] for key in ("loss", "optimizer") if run.choices.get(key)) or name


def _setting(key: str, value: Any) -> str:
    """A setting as a label names it: "adam", "lr 0.001"; "" if the run has none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if key.startswith("choices.") else f"{key.rpartition(ITEM)[2]} {text}"


def _columns(runs: Mapping[str, Results], choices: Sequence[str], keys: Sequence[str]) -> list[Column]:
    """All columns, by kind; those of `SHOWN` are shown, and of a kind without any its first ones."""
    first = next(iter(runs.values()))
    entries = {name: entry for run in runs.values() for name, entry in metric_entries(run).items()}
    versions = {name: version for run in runs.values() for name, version in run.metric_versions.items()}
    of_attacks = {*entries} - {*(first.config["task"].get("metrics") or ())}
    found = [Column("status", "status", "settings", is_metric=False)]
    settings = dict.fromkeys([*choices, *keys])
    found += [Column(key, key.partition(ITEM)[2], "settings", is_metric=False) for key in settings]
    found += [Column("seeds.seed", "seed", "settings", is_metric=False)]
    for name in dict.fromkeys(name for run in runs.values() for name in run.metrics["unlearned"]):
        unit, better = declared(entries, name, first.config.get("dialect", OURS))
        kind = "robustness" if name in of_attacks else _kind(name, entries.get(name) or {})
        found.append(Column(name, label_of(name, unit), kind, ARROWS[better], versions.get(name)))
    stages = dict.fromkeys(stage for run in runs.values() for stage in run.seconds)
    found += [Column(f"seconds.{stage}", f"{stage}\u00a0s", "cost", is_metric=False) for stage in stages]
    found += [Column("peak_memory_gib", "peak\u00a0GiB", "cost", is_metric=False)]
    found += [Column("num_steps", "steps", "cost", is_metric=False)]
    shown = {column.key for column in found if column.key in SHOWN}
    shown |= {"status"} if {_status(run) for run in runs.values()} != {"finished"} else set()
    for kind in ("efficacy", "utility", "robustness"):
        of_kind = [c.key for c in found if c.kind == kind and not ON_DEMAND.match(c.key)]
        shown |= set() if shown & {*of_kind} else {*of_kind[:FEW]}
    ordered = sorted(found, key=lambda column: KINDS.index(column.kind))
    return [Column(**{**asdict(column), "shown": column.key in shown}) for column in ordered]


def _kind(name: str, entry: Mapping[str, Any]) -> str:
    """Utility is what the model is to keep; all else of a task says what was forgotten."""
    if name.startswith("validation_"):
        return "validation"
    is_utility = name.startswith(("utility", "suite")) or is_kept(entry.get("answers") or name.split("_")[0])
    return "utility" if is_utility else "efficacy"


def _cell(run: Results, column: Column, value: Any) -> Cell:
    """What `column` shows of `run`; `value` is that of a setting or a cost."""
    if column.is_metric:
        return _cell_of(run, "unlearned", column.key)
    if column.key == "status":
        return Cell(_status(run), _status(run))
    if value is None or value != value:  # nan: the run has none
        return Cell(NULL, None)
    if finite(value) is None or isinstance(value, bool):
        return Cell(str(value), str(value))
    return Cell(number(value) if column.kind == "cost" and column.key != "num_steps" else f"{value:g}", float(value))


def _status(run: Results) -> str:
    return "collapsed" if run.collapsed and any(run.collapsed.values()) else run.status


def _cell_of(run: Results, model: str, name: str) -> Cell:
    value = finite(run.metrics.get(model, {}).get(name))
    ends = run.intervals.get(model, {}).get(name)
    text, _, under = with_interval(value, ends).partition(" ")
    return Cell(text, value, under)


def _of_runs(runs: Mapping[str, Results], column: Column, cells: Mapping[str, Mapping[str, Cell]]) -> Cell:
    """The mean of a metric over the seeds of a method, with its 95 % interval; of another value the mean alone."""
    if not column.is_metric or len(runs) == 1:
        return _mean([cells[name][column.key] for name in runs])
    first = next(iter(runs.values()))
    scale = scale_in(metric_entries(first).get(column.key) or {}, first.config.get("dialect", OURS))
    values = [finite(run.metrics["unlearned"].get(column.key)) for run in runs.values()]
    ends = [_ends(run, column.key) for run in runs.values()]
    found = mean_of(values, ends, [study_of(run) for run in runs.values()], Range.of(scale))
    text, _, under = found.written.partition(" ")
    return Cell(text, found.value, under)


def _ends(run: Results, name: str) -> tuple[float, float] | None:
    ends = run.intervals.get("unlearned", {}).get(name)
    return (float(ends[0]), float(ends[1])) if ends else None


def _mean(cells: Sequence[Cell]) -> Cell:
    """The mean of numbers, and the smallest and the largest below it; of other values that which all share."""
    values = [cell.value for cell in cells if isinstance(cell.value, float)]
    if len(values) < len(cells) or len(cells) == 1:
        texts = dict.fromkeys(cell.text for cell in cells)
        return cells[0] if len(cells) == 1 else Cell(", ".join(texts) if len(texts) <= FEW else NULL, None)
    size = max(map(abs, values))
    ends = "" if min(values) == max(values) else f"{number(min(values), size)} … {number(max(values), size)}"
    return Cell(number(mean := statistics.fmean(values), size), mean, ends)


def _about(runs: Mapping[str, Results]) -> list[str]:
    """What holds for a whole table: what was tuned on, sizes, the ceiling, the dialect, commits and versions."""
    found: list[str] = []
    for run in runs.values():
        found += [text for text in (size_of_test(run), units_of(run), *ceiling_of(run)) if text]
        found += [f"learning rate and gamma tuned on the {run.tuned}"] if run.trials else []
        if (dialect := run.config.get("dialect", OURS)) != OURS:
            found.append(dialect_note(dialect))
    commits = dict.fromkeys((run.commit or "unknown")[:10] + (run.commit or "")[40:] for run in runs.values())
    versions = dict.fromkeys(f"{name} {version}" for run in runs.values() for name, version in run.versions.items())
    return [*found, f"commit {', '.join(commits)}; {', '.join(versions)}"]


def _notes(runs: Mapping[str, Results]) -> list[str]:
    """The notes of the runs, each once, with the run that has it, or how many have."""
    found: dict[str, list[str]] = {}
    for name, run in runs.items():
        for note in run.notes:
            found.setdefault(note, []).append(name)
    return [f"{note} ({names[0] if len(names) == 1 else f'{len(names)} runs'})" for note, names in found.items()]
