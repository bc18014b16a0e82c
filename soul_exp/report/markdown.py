"""The runs of a folder as Markdown: a table per set of comparable runs, a row per combination, over seeds."""

import math
import re
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student

from soul_exp.errors import UsageError
from soul_exp.metrics.dialects import OURS
from soul_exp.report.labels import (
    ARROWS,
    DELTA,
    HEADLINE,
    MIA,
    NULL,
    ON_DEMAND,
    ceiling_of,
    declared,
    dialect_note,
    finite,
    headline_first,
    label_of,
    number,
    size_of_test,
    units_of,
    with_interval,
)
from soul_exp.report.paired import compared
from soul_exp.report.runs import ABOUT, CHOSEN, SUITE_OPTIONS, comparable, find, frame_of, is_measured, varied
from soul_exp.results import COMPARED, REQUEST, TASK, Results, metric_entries

MOST_NAMES = 3  # of runs in a note
NUMBER = re.compile(r"(?<![\w.-])(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?!\w)")
AFTER = ("steps", "unlearn seconds", "win_rate", "n", "status")  # the columns after the metrics
BASELINE = "adam"  # the optimizer that the others are compared with, unit by unit
PAIRED = (
    "Each unit's share in a number, averaged over seeds, less that of the same unit with the baseline; p of the exact "
    "sign-flip test, two-sided, after Holm's correction over the rows of a column."
)
SEQUENCE = (
    "Each request starts from the model that the one before left. Forget is that request, earlier all before it; "
    "the original model is that before the first request, the retrained one has seen none of the requests so far."
)


def table(folder: Path | str, metrics: Sequence[str] | None = None) -> str:
    """The runs below `folder` as Markdown; the requests of a run that is a sequence of them stand one after the other.

    `metrics` are the columns, named as in results.json. Raises UsageError as `load` does, and for an unknown metric.
    """
    runs, missing = find(folder)
    known = dict.fromkeys(name for run in runs.values() for name in run.metrics["unlearned"])
    unknown = [name for name in metrics or () if name not in known]
    if unknown:
        raise UsageError(f"--metrics: no run has {unknown[0]!r}, choose from {', '.join(known)}")
    if all(name.startswith(REQUEST) for name in runs):
        parts = [_sequence(runs, metrics)]
    else:
        keys = varied(frame_of(runs))
        parts = [_table(group, metrics, keys) for group in comparable(runs)]
    named: dict[str, list[str]] = {}
    for name, why in missing.items():
        named.setdefault(why, []).append(f"`{name}`")
    if named:
        parts.append("\n".join(_listed(f"without results: {', '.join(names)} ({why})" for why, names in named.items())))
    return "\n\n".join(parts) + "\n"


def _table(named: Mapping[str, Results], requested: Sequence[str] | None, varied_anywhere: Sequence[str]) -> str:
    """The Markdown of one group; `varied_anywhere` are the keys that differ in the folder, perhaps not in the group."""
    frame, runs = frame_of(named), list(named.values())
    choices = [key for key in frame if key.startswith("choices.") and key not in ("choices.loss", "choices.optimizer")]
    varied_choices = [key for key in choices if frame[key].nunique(dropna=False) > 1]
    by = ["choices.loss", "choices.optimizer", *varied_choices, *varied(frame)]
    measured = list(dict.fromkeys(name for run in runs for name in run.metrics["unlearned"]))
    entries = {name: entry for run in runs for name, entry in metric_entries(run).items()}
    of_task = runs[0].config["task"].get("metrics") or ()
    of_attacks = [name for name in entries if name not in of_task]
    listed = _columns([name for name in measured if name not in of_attacks], requested)
    listed += [name for name in (of_attacks if requested is None else requested) if name in of_attacks]
    columns = [name for name in listed if requested is not None or is_measured(runs, name)]
    frame["untuned"] = frame["tuned"].isna() & frame["choices.loss"].notna()
    identity = [*by, "untuned", *(key for key in frame if key.startswith("seeds."))]
    repeats = frame.duplicated(identity)
    folders = frame.groupby(identity, dropna=False, sort=False)["run"].agg(list)
    same = [" = ".join(f"`{name}`" for name in names) for names in folders if len(names) > 1]
    metrics, dialect = entries, runs[0].config.get("dialect", OURS)

    def rows_of(columns: Sequence[str]) -> list[list[str]]:
        scales = [(name, *declared(metrics, name, dialect)) for name in columns]
        titles = [f"{label_of(name, unit)} {ARROWS[better]}".rstrip() for name, unit, better in scales]
        header = [*(key.partition(".")[2] for key in by), *titles, *AFTER]
        compared_models = _compared_models(frame, runs, columns, len(by))
        return [header, *compared_models, *_combinations(frame[~repeats], by, columns)]

    parts = [[name for name in columns if (name in of_attacks) is attacked] for attacked in (False, True)]
    tables = [_lines(rows_of(parts[0]))] if parts[0] or not parts[1] else []
    if parts[1]:
        tables.append(["#### What attacks bring back", "", *_lines(rows_of(parts[1]))])
    notes = [f"one result in several folders, counted once: {'; '.join(same)}"] if same else []
    commits = dict.fromkeys(run.commit[:10] + run.commit[40:] if run.commit else "unknown" for run in runs)
    versions = dict.fromkeys(f"{name} {version}" for run in runs for name, version in run.versions.items())
    notes += [text for run in runs for text in (size_of_test(run), units_of(run), *ceiling_of(run)) if text]
    notes += [*_version_notes(named, columns), *_run_notes(named), *_null_notes(runs, columns, listed)]
    notes.append(f"commit {', '.join(commits)}; {', '.join(versions)}")
    fixed = _fixed(frame, runs, [*choices, *varied_anywhere], by)
    tuned = f" Learning rate and gamma tuned on the {runs[0].tuned}." if runs[0].trials else ""
    dialects = dict.fromkeys(run.config.get("dialect", OURS) for run in runs)
    foreign = "".join(f" {dialect_note(dialect)}" for dialect in dialects if dialect != OURS)
    above = [f"### {_escaped(runs[0].caption)}", "", _escaped(f"All rows: {fixed}.{tuned}{foreign} {ABOUT}")]
    paired = _paired(named, frame[~repeats], by, columns)
    shown = [line for lines in tables for line in (*lines, "")]
    return "\n".join([*above, "", *shown, *_listed(notes), *paired])


def _paired(runs: Mapping[str, Results], frame: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> list[str]:
    """A table of the differences from the method with optimizer=adam, where there is one, in what attacks brought back.

    The methods are the combinations of the keys `by`; the runs of each are its seeds.
    """
    varying = [key for key in by if frame[key].nunique(dropna=False) > 1]
    groups = frame.groupby(varying, dropna=False) if varying else ()
    methods = {", ".join(map(_text, key)): [runs[name] for name in rows["run"]] for key, rows in groups}
    adams = [name for name, of in methods.items() if of[0].choices["optimizer"] == BASELINE]
    measures = [name for name in columns if any(run.unit_values.get(name) for run in runs.values())]
    if len(methods) < 2 or not measures or not adams:
        return []
    if len(adams) > 1:
        return ["", f"Not compared by unit: {len(adams)} rows have optimizer={BASELINE} ({'; '.join(adams)})."]
    found = {}
    for measure in measures:
        values = {name: [run.unit_values.get(measure, {}) for run in of] for name, of in methods.items()}
        found[measure] = compared(values, adams[0])
    rows = [[", ".join(key.partition(".")[2] for key in varying), *map(label_of, measures)]]
    for method in methods:
        if method != adams[0]:
            cells = (found[measure][method] for measure in measures)
            shown = (f"{number(each.difference)} (p {number(each.p)})" if each else NULL for each in cells)
            rows.append([method, *shown])
    title = f"#### Difference from {adams[0]}, paired by {next(iter(runs.values())).unit}"
    return ["", title, "", PAIRED, "", *_lines(rows)]


def _columns(measured: Iterable[str], requested: Sequence[str] | None) -> list[str]:
    """The names of the metrics that have a column, in order; the difference to the retrained model's AUC follows it."""
    names = sorted(measured, key=lambda name: name.partition("_")[2])  # forget beside retain
    usual = [name for name in headline_first(names) if not ON_DEMAND.match(name) and "truth_ratio" not in name]
    chosen = [name for name in (usual if requested is None else requested) if name in names]
    return [column for name in chosen for column in ((name, DELTA) if name == MIA else (name,))]


def _compared_models(
    frame: pd.DataFrame, runs: Sequence[Results], columns: Sequence[str], num_keys: int
) -> Iterator[list[str]]:
    """A row for each model that the unlearned ones are compared with; not every run needs to have measured it."""
    for model in (each for each in COMPARED if each.role is not None):
        first = next((i for i, run in enumerate(runs) if model.key in run.metrics), None)
        if first is not None:
            cells = [_of_metric(frame[first : first + 1], model.key, name) for name in columns]
            yield [model.title, *[""] * (num_keys - 1), *cells, *[""] * len(AFTER)]


def _combinations(frame: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> Iterator[list[str]]:
    """A row for each combination of the keys `by`, over its seeds; diverged seeds have a row of their own."""
    for (*key, untuned), seeds in frame.groupby([*by, "untuned"], dropna=False):
        for status, same in sorted(seeds.groupby("status"), reverse=True, key=lambda pair: pair[0]):
            diverged = f", {len(seeds) - len(same)} of {len(seeds)} diverged" if len(same) < len(seeds) else ""
            status = ("DIVERGED" if status == "diverged" else f"{status}{diverged}") + ", untuned" * bool(untuned)
            if num_collapsed := int(same["collapsed"].eq(True).sum()):
                status += ", COLLAPSED" if num_collapsed == len(same) else f", {num_collapsed} of {len(same)} collapsed"
            cells = [_of_metric(same, "unlearned", name) for name in columns]
            cells.append(" to ".join(map(str, sorted({same["num_steps"].min(), same["num_steps"].max()}))))
            cells += [_cell(same.get(name, [])) for name in ("seconds.unlearn", "training.win_rate")]
            yield [*map(_text, key), *cells, str(len(same)), status]


def _version_notes(runs: Mapping[str, Results], columns: Iterable[str]) -> Iterator[str]:
    """A note for the task, and for each metric of `columns`, of which runs have values of different definitions."""
    for name in (TASK, *columns):
        by_version: dict[str, list[str]] = {}
        for folder, run in runs.items():
            if name == TASK or name in run.metrics["unlearned"]:
                by_version.setdefault(str(run.metric_versions.get(name, "unknown")), []).append(f"`{folder}`")
        if len(by_version) > 1:
            listed = "; ".join(f"version {version}: {', '.join(names)}" for version, names in by_version.items())
            what = "the task's rows and probes" if name == TASK else label_of(name)
            yield f"NOT COMPARABLE: {what} of several definitions ({listed}): measure these runs again"


def _of_metric(frame: pd.DataFrame, model: str, name: str) -> str:
    """The metric of the runs in `frame`; that of a single run with its interval over independent units."""
    columns = [f"metrics.{model}.{name}{end}" for end in ("", ".low", ".high")]
    values, *ends = ([finite(value) for value in frame.get(column, [])] for column in columns)
    low, high = ends[0][:1] or [None], ends[1][:1] or [None]
    if len(values) == 1 and low[0] is not None and high[0] is not None:
        return with_interval(values[0], (low[0], high[0]))
    return _cell(values)


def _run_notes(runs: Mapping[str, Results]) -> Iterator[str]:
    yield from (f"DIVERGED: `{name}`: {run.reason}" for name, run in runs.items() if run.status == "diverged")
    for name, run in runs.items():
        if run.collapsed:
            yield f"COLLAPSED: `{name}`: {'; '.join(f'{probe}: {why}' for probe, why in run.collapsed.items())}"
    noted: dict[tuple[str, ...], dict[str, list[str]]] = {}  # the text between its numbers -> run -> text and numbers
    for name, run in runs.items():
        for note in run.notes:
            parts = NUMBER.split(note)
            noted.setdefault(tuple(parts[::2]), {})[name] = parts
    for same in noted.values():
        yield f"{''.join(map(_range, zip(*same.values(), strict=True)))} ({_which(list(same), len(runs))})"
    if edges := [name for name, run in runs.items() if _is_at_edge(run.trials)]:
        yield f"the smallest or the largest learning rate tried was the best: {_which(edges, len(runs))}"


def _range(texts: Sequence[str]) -> str:
    """The text, where all are the same, or else the smallest and the largest of these numbers."""
    if len(set(texts)) == 1:
        return texts[0]
    return f"{min(texts, key=float)} to {max(texts, key=float)}"


def _which(names: Sequence[str], num_runs: int) -> str:
    """Which of the runs of a table they are: by their names, unless these are all or many."""
    if len(names) == num_runs > 1:
        return "all runs"
    if len(names) > MOST_NAMES:
        return f"{len(names)} of {num_runs} runs, see table.csv"
    return ", ".join(f"`{name}`" for name in names)


def _null_notes(runs: Collection[Results], columns: Collection[str], listed: Collection[str]) -> Iterator[str]:
    """Why a number is null: of a metric that has a column, or is `listed` and has none because no model has it."""
    labels: dict[str, dict[str, None]] = {}  # the line around the names of the metrics -> these names
    for run in runs:
        for key, why in run.reasons.items():
            model, _, name = key.rpartition(".")
            if name in listed:
                begin = f"{NULL if name in columns else 'not measured:'} %s"
                line = f"{begin}{f' of the {model} model' if model else ''}: {why.replace('%', '%%')}"
                labels.setdefault(line, {})[label_of(name)] = None
    yield from (line % ", ".join(names) for line, names in labels.items())
    if DELTA in listed and MIA in columns and DELTA not in columns:
        yield f"not measured: {label_of(DELTA)}: no run has the retrained model's"


def _fixed(frame: pd.DataFrame, runs: Sequence[Results], keys: Sequence[str], by: Collection[str]) -> str:
    """The choices and options that all rows share, as text: of `keys`, those that are no column."""
    suite = [f"config.{option}" for option in SUITE_OPTIONS if any(run.suite and run.config[option] for run in runs)]
    known = dict.fromkeys((*keys, *suite, *(CHOSEN if frame["num_trials"].any() else ())))
    shared = [key for key in known if key not in by and key in frame and key != "config.task.source"]
    return ", ".join(f"{key.partition('.')[2] or key} {_text(frame[key].iloc[0])}" for key in ("source", *shared))


def _sequence(runs: Mapping[str, Results], requested: Sequence[str] | None) -> str:
    """The Markdown of a sequence of requests: each model's metrics on each request, and on those before it."""
    measured = dict.fromkeys(name for run in runs.values() for name in run.metrics["unlearned"])
    usual = [name for name in headline_first(measured) if name in HEADLINE or name.endswith(("_probability", "_rouge"))]
    listed = [name for name in usual if not name.startswith("validation_")] if requested is None else list(requested)
    columns = [name for name in listed if requested is not None or is_measured(runs.values(), name)]
    rows = [["request", "model", *map(label_of, columns)]]
    for request, run in runs.items():
        for model in COMPARED:
            if model.key in run.metrics and not model.with_system_prompt:
                ends = run.intervals.get(model.key, {})
                cells = [with_interval(finite(run.metrics[model.key].get(name)), ends.get(name)) for name in columns]
                rows.append([request if model.role is None else "", model.title, *cells])
    notes = [
        *filter(None, map(units_of, runs.values())),
        *_run_notes({name: replace(run, notes=()) for name, run in runs.items()}),
    ]
    notes += [f"`{request}`: {note}" for request, run in runs.items() for note in run.notes]
    notes += _null_notes(runs.values(), columns, listed)
    return "\n".join([f"### {len(runs)} requests in sequence", "", SEQUENCE, "", *_lines(rows), "", *_listed(notes)])


def _lines(rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table whose first row is the header; all cells of a column are equally wide."""
    rows = [[_escaped(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [f"| {' | '.join(f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True))} |" for row in rows]


def _is_at_edge(trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the chosen learning rate is the smallest or the largest tried, so that a wider search may do better."""
    rates = sorted({trial["lr"] for trial in trials})
    return len(rates) > 1 and any(trial["chosen"] and trial["lr"] in (rates[0], rates[-1]) for trial in trials)


def _cell(values: Iterable[float | None]) -> str:
    """Mean ± half-width of its 95 % t-interval; one number stands alone; n is given where some values are null."""
    given = [finite(value) for value in values]
    known = [value for value in given if value is not None]
    if len(known) < 2:
        text = number(known[0] if known else None)
    else:
        mean, error = statistics.mean(known), statistics.stdev(known) / math.sqrt(len(known))
        half = float(student.ppf(0.975, len(known) - 1)) * error
        text = f"{number(mean, max(abs(mean), half))} ± {number(half, max(abs(mean), half))}"
    return f"{text} (n={len(known)})" if 0 < len(known) < len(given) else text


def _text(value: Any) -> str:
    is_missing = value is None or value != value
    return NULL if is_missing else f"{value:g}" if isinstance(value, float) else str(value)


def _listed(notes: Iterable[str]) -> list[str]:
    """The notes as a list, each once."""
    return [f"- {_escaped(note)}" for note in dict.fromkeys(notes)]


def _escaped(text: str) -> str:
    """`text` without HTML, links and images of whoever wrote it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(")
