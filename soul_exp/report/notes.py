"""What a reader of a table needs to know: how runs differ that share it, and why numbers are missing."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from soul_exp.report.labels import DELTA, MIA, NULL, label_of, quoted
from soul_exp.report.runs import UNKNOWN, folder_of
from soul_exp.report.units import RECORDS
from soul_exp.results import Results

T = TypeVar("T")
MOST_NAMES = 3  # of runs in a note
NUMBER = re.compile(r"(?<![\w.-])(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?!\w)")
COST = (
    "Wall-clock seconds by stage; prepare and evaluate are short where models or answers were in the cache. Steps are "
    "those of unlearning."
)
PASSES = (
    "Passes are those of a mean step through the model, the gradient's own included, in units of the rows that the "
    "loss reads in a step."
)


def of_provenance(runs: Mapping[str, Results], rows: Collection[Collection[str]]) -> Iterator[str]:
    """A note for each of `facts_of` in which runs differ; `rows` are those of a mean."""
    for what, fact in facts_of(runs).items():
        found = by(runs, fact)
        if len(found) > 1:
            mixed = any(len({fact(runs[name]) for name in row}) > 1 for row in rows)
            listed = "; ".join(f"{value}: {_which(names, len(runs))}" for value, names in found.items())
            yield f"DIFFERENT {what}{', also within a row' if mixed else ''}: {listed}"


def facts_of(runs: Mapping[str, Results]) -> dict[str, Callable[[Results], str]]:
    """What made the runs: commit or source code, hardware and version of each library -> its value for a run.

    Commits with the same source code count as one.
    """
    facts: dict[str, Callable[[Results], str]] = {}
    codes = {run.sha256.get("code") for run in runs.values()}
    if len({run.commit for run in runs.values()}) == 1:
        facts["source code"] = lambda run: f"SHA-256 {str(run.sha256.get('code', UNKNOWN))[:10]}"
    elif len(codes) > 1 or None in codes:
        facts["commit"] = lambda run: commit_of(run.commit)
    if any(run.hardware for run in runs.values()):
        facts["hardware"] = lambda run: run.hardware or UNKNOWN
    for package in dict.fromkeys(package for run in runs.values() for package in run.versions):
        facts[f"version of {package}"] = lambda run, package=package: run.versions.get(package, UNKNOWN)  # type: ignore[misc]
    return facts


def commit_of(commit: str | None) -> str:
    """The first ten digits of a run's commit, with "+changes" if files differed."""
    return commit[:10] + commit[40:] if commit else UNKNOWN


def by(runs: Mapping[str, T], fact: Callable[[T], str]) -> dict[str, list[str]]:
    """Value of the fact -> the quoted names of the runs that have it."""
    found: dict[str, list[str]] = {}
    for name, run in runs.items():
        found.setdefault(fact(run), []).append(quoted(name))
    return found


def of_runs(runs: Mapping[str, Results]) -> Iterator[str]:
    """What diverged, what collapsed, the runs' own notes, and whose best learning rate was at an end of those tried."""
    yield from (f"DIVERGED: {quoted(name)}: {run.reason}" for name, run in runs.items() if run.status == "diverged")
    for name, run in runs.items():
        if run.collapsed:
            yield f"COLLAPSED: {quoted(name)}: {'; '.join(f'{probe}: {why}' for probe, why in run.collapsed.items())}"
    noted: dict[tuple[str, ...], dict[str, list[str]]] = {}  # the text between its numbers -> run -> text and numbers
    for name, run in runs.items():
        for note in run.notes:
            parts = NUMBER.split(note)
            noted.setdefault(tuple(parts[::2]), {})[name] = parts
    for same in noted.values():
        yield f"{with_ranges(same.values())} ({_which([*map(quoted, same)], len(runs))})"
    if edges := [quoted(name) for name, run in runs.items() if _is_at_edge(run.trials)]:
        yield f"the smallest or the largest learning rate tried was the best: {_which(edges, len(runs))}"


def with_ranges(texts: Iterable[Sequence[str]]) -> str:
    """One text for several, each split at its numbers: a number that differs becomes the smallest to the largest."""
    return "".join(
        of[0] if len({*of}) == 1 else f"{min(of, key=float)} to {max(of, key=float)}" for of in zip(*texts, strict=True)
    )


def _which(quoted: Sequence[str], num_runs: int) -> str:
    """Which of the runs of a table they are: by their quoted names, unless these are all or many."""
    if len(quoted) == num_runs > 1:
        return "all runs"
    return f"{len(quoted)} of {num_runs} runs, see table.csv" if len(quoted) > MOST_NAMES else ", ".join(quoted)


def of_nulls(runs: Collection[Results], columns: Collection[str], listed: Collection[str]) -> Iterator[str]:
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


def of_cost(runs: Mapping[str, Results]) -> str:
    """What the columns of cost mean, and which runs do not state passes, as those of before do not."""
    found = [COST, PASSES] if any(run.passes for run in runs.values()) else [COST]
    if names := [quoted(name) for name, run in runs.items() if run.num_steps and not run.passes]:
        found.append(f"results.json does not state the passes: {_which(names, len(runs))}.")
    return " ".join(found)


def of_records(folder: Path, runs: Mapping[str, Results]) -> Iterator[str]:
    """A note on the runs below `folder` whose records are no longer there, by which metrics of answers are tested."""
    named = {name: folder_of(folder, name) / RECORDS for name, run in runs.items() if run.sha256.get("records")}
    if gone := [quoted(name) for name, records in named.items() if not records.is_dir()]:
        yield f"without records, and so without a test by unit in metrics of their answers: {_which(gone, len(runs))}"


def of_repeats(repeats: Mapping[str, Sequence[str]], runs: Mapping[str, Results]) -> Iterator[str]:
    """A note on runs of the same configuration and seed, of which the first counts: first -> the others."""
    same = [(first, others) for first, others in repeats.items()]
    for differ, text in (
        (False, "one result in several folders, counted once"),
        (True, "the same configuration and seed with OTHER NUMBERS, of which the first counts"),
    ):
        pairs = [
            " = ".join(map(quoted, (first, *kept)))
            for first, others in same
            if (kept := [name for name in others if (runs[name].metrics != runs[first].metrics) is differ])
        ]
        if pairs:
            yield f"{text}: {'; '.join(pairs)}"


def _is_at_edge(trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the chosen learning rate is the smallest or the largest tried, so that a wider search may do better."""
    rates = sorted({trial["lr"] for trial in trials})
    return len(rates) > 1 and any(trial["chosen"] and trial["lr"] in (rates[0], rates[-1]) for trial in trials)
