"""The tables of a folder of runs, a row a combination, over seeds. Reads results.json only."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student

from soul_exp import results as files
from soul_exp.errors import UsageError
from soul_exp.files import write_atomically
from soul_exp.report.console import (  # fmt: skip
    DELTA,
    HEADLINE,
    HIGHER,
    LOWER,
    MIA,
    NULL,
    TARGET,
    finite,
    headline_first,
    hint_of,
    label_of,
    number,
)
from soul_exp.results import Results

REQUEST = "request-"  # how the folders of a sequence of requests begin, inside its run's folder
SUITE_OPTIONS = ("utility_suite", "utility_limit")
# columns of a table only if asked for, as are truth ratios
ON_DEMAND = ("holdout_", "authors_", "facts_", "validation_", "earlier_")
# names, places and speed of a run, what is aggregated over, and what has a column anyway
IGNORED = (
    *("name", "seed", "stages", "overwrite", "cache", "save", "wandb", "choices", "tuned", "tune", "start"),
    "input_based",
    "evaluate.batch_size",
)
CHOSEN = ("config.optimizer.lr", "config.loss.gamma")  # by trials
ABOUT = (
    "Forget quality is the p-value of a two-sample KS test against the retrained model; its mean and that of its "
    "log10 are taken apart. ↑ higher is better, ↓ lower is better, → nearest to the retrained model is best. n counts "
    "runs that differ in nothing but the seed: mean ± half-width of the 95 % t-interval where n is 2 or more."
)


def load(folder: Path | str) -> pd.DataFrame:
    """One row a run below `folder`: choices, `config.` keys that differ, metrics, and which `table` it belongs to.

    A bare metric is the unlearned model's, the others' begin with `original.`, `input_based.` and `retrained.`; null is
    NaN. Raises UsageError if there are no runs or a results.json is broken.
    """
    runs, _ = _find(Path(folder))
    frame = pd.concat([_frame(group).assign(table=i) for i, group in enumerate(_groups(runs), 1)], ignore_index=True)
    kept, hidden = _differing(frame), ("config", "data_hashes", "versions")
    frame = frame[[key for key in frame if key in kept or key.split(".")[0] not in hidden]]
    return frame.rename(
        columns=lambda c: c.removeprefix("choices.").removeprefix("metrics.").removeprefix("unlearned.")
    )


def table(folder: Path | str, metrics: Sequence[str] | None = None) -> str:
    """The runs below `folder` as Markdown: a table for each set of comparable runs, a row a combination, over seeds.

    `metrics` are its columns, named as in results.json. Raises UsageError as `load` does, and for an unknown metric.
    """
    runs, missing = _find(Path(folder))
    known = dict.fromkeys(name for found in runs.values() for name in found.metrics["unlearned"])
    is_sequence = all(name.startswith(REQUEST) for name in runs)
    unknown = [name for name in metrics or () if name not in known]
    if unknown:
        raise UsageError(f"--metrics: no run has {unknown[0]!r}, choose from {', '.join(known)}")
    varied = _shown(_frame(runs))
    if is_sequence:
        parts = [_sequence(runs, metrics)]
    else:
        parts = [_table(_frame(group), list(group.values()), metrics, varied) for group in _groups(runs)]
    parts += ["\n".join(f"- without results: `{name}` ({why})" for name, why in missing.items())] if missing else []
    return "\n\n".join(parts) + "\n"


def trials(folder: Path | str) -> pd.DataFrame:
    """One row a trial of the runs below `folder`: what was tried, its validation metrics, whether it was chosen.

    The seeds of a cell share their trials, so each of its runs has them. Empty where nothing was tuned.
    """
    runs, _ = _find(Path(folder))
    frame = pd.json_normalize([{"run": run, **trial} for run, found in runs.items() for trial in found.trials])
    return frame.rename(columns=lambda c: c.removeprefix("metrics."))


def main() -> None:
    """`python -m soul_exp.tables runs/NAME` prints the table and leaves it there; exits 2 for bad input."""
    parser = argparse.ArgumentParser("python -m soul_exp.tables", description="Set the runs of a folder side by side.")
    parser.add_argument(
        "folder",
        type=Path,
        metavar="runs/NAME",
        help="table.md and table.csv (one row a run) go there, and trials.csv where runs were tuned",
    )
    parser.add_argument("--metrics", metavar="A,B,C", help="the columns of the table, named as in results.json")
    args = parser.parse_args()
    try:
        text = table(args.folder, args.metrics.split(",") if args.metrics else None)
        print(text, end="", flush=True)
        write_atomically(args.folder / "table.md", text)
        write_atomically(args.folder / "table.csv", load(args.folder).to_csv(index=False))
        if len(tried := trials(args.folder)):
            write_atomically(args.folder / "trials.csv", tried.to_csv(index=False))
    except (UsageError, OSError) as error:
        print(f"soul_exp.tables: {error}", file=sys.stderr)
        sys.exit(2)


def _find(folder: Path) -> tuple[dict[str, Results], dict[str, str]]:
    """The results below `folder` by the name of their run, and the error of each run without results.

    A run that is a sequence of requests counts once, by its last; of the folder of such a run, each request does.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: expected one that holds runs, such as runs/tofu")
    is_sequence = (folder / f"{REQUEST}1").is_dir()
    runs, missing = {}, {}
    for place, inner, names in os.walk(folder):
        here = Path(place)
        name = here.relative_to(folder).as_posix() if here != folder else folder.resolve().name
        inside_out = here == folder and is_sequence  # its results are those of the last request, once more
        if files.NAME in names and not inside_out:
            runs[name] = _read(here)
        elif ("error.txt" in names or ".hydra" in inner) and not inside_out:
            told = (here / "error.txt").read_text(errors="replace").strip() if "error.txt" in names else ""
            missing[name] = told.split("\n")[0] or "no error.txt: still running, killed, or not asked to evaluate"
        inner[:] = [inside for inside in inner if not inside.startswith(".") and inside not in ("wandb", "model")]
        inner[:] = [inside for inside in inner if inside_out or not inside.startswith(REQUEST)]
    if not runs:
        some = "".join(f"; without results: {name} ({why})" for name, why in list(missing.items())[:1])
        raise UsageError(f"{folder} has no runs: there is no {files.NAME} in any folder below it{some}")
    return dict(sorted(runs.items(), key=_place)), dict(sorted(missing.items(), key=_place))


def _place(named: tuple[str, Any]) -> tuple[str, int]:
    """Request 10 comes after request 2."""
    start, _, number = named[0].rpartition(REQUEST)
    return (start + REQUEST, int(number)) if number.isdigit() else (named[0], 0)


def _read(folder: Path) -> Results:
    try:
        found = files.read(folder)
        assert found is not None
        parts = (found.choices, found.config["task"], found.metrics["unlearned"], found.seeds, found.seconds)
        if found.format != files.FORMAT or not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"it is not of format {files.FORMAT}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(f"{folder / files.NAME} is broken: {error}") from error
    return found


def _groups(runs: Mapping[str, Results]) -> list[dict[str, Results]]:
    """Runs that one table may hold: the same caption, source, suite, metrics, data, trials, original and retrained."""
    groups: dict[str, dict[str, Results]] = {}
    for run, found in runs.items():
        key: list[Any] = [found.caption, found.config["task"].get("source"), found.config["task"].get("metrics")]
        key += [found.config.get(option) for option in SUITE_OPTIONS]
        key += [*found.metrics["unlearned"], found.data_hashes, found.tuned if found.trials else None]
        for model in ("original", "retrained"):
            key += [(model, name, value and f"{value:.5g}") for name, value in found.metrics.get(model, {}).items()]
        groups.setdefault(str(key), {})[run] = found
    return list(groups.values())


def _frame(runs: Mapping[str, Results]) -> pd.DataFrame:
    """One row a run, all of its results.json under dotted names; no loss or optimizer where nothing was unlearned."""
    rows = []
    for run, found in runs.items():
        left_out = (*HEADLINE, "name", "format", "trials", *(() if found.suite else ("suite",)))
        row = {key: value for key, value in vars(found).items() if key not in left_out}
        if "unlearn" not in found.config.get("stages", ()):
            row["choices"] = {**found.choices, "loss": None, "optimizer": None}
            row["config"] = {k: v for k, v in found.config.items() if k not in ("loss", "optimizer", "train")}
        aucs = {model: finite(measured.get(MIA)) for model, measured in found.metrics.items()}
        target = aucs.get("retrained")
        deltas = {model: None if target is None or auc is None else target - auc for model, auc in aucs.items()}
        row["metrics"] = {model: {**measured, DELTA: deltas[model]} for model, measured in found.metrics.items()}
        row["num_trials"] = len(found.trials)
        rows.append({"run": run, "source": Path(found.config["task"].get("source") or NULL).name, **row})
    return pd.json_normalize(rows).map(lambda value: str(value) if isinstance(value, list) else value)


def _differing(frame: pd.DataFrame) -> list[str]:
    """The configuration keys that differ between runs, less those that do not matter."""
    ignored = tuple(f"config.{key}" for key in IGNORED)
    drawn = [key for key in frame if key.startswith("config.optimizer.") and key.endswith(".seed")]  # it is the run's
    keys = [key for key in frame if key.startswith("config.") and not key.startswith((*ignored, *drawn))]
    return [key for key in keys if frame[key].nunique(dropna=False) > 1]


def _shown(frame: pd.DataFrame) -> list[str]:
    """The differing keys that are not implied by the choice of their own group, as `optimizer.lr` may be by adam.

    What was chosen by trials is shown in any case.
    """
    tuned = CHOSEN if frame["num_trials"].any() else ()

    def implied(key: str) -> bool:
        group = f"choices.{key.split('.')[1]}"
        return group in frame and frame.groupby(group, dropna=False)[key].nunique(dropna=False).max() == 1

    return [key for key in _differing(frame) if key in tuned or not implied(key)]


def _table(frame: pd.DataFrame, runs: Sequence[Results], asked: Sequence[str] | None, varied: Sequence[str]) -> str:
    """The Markdown of one group; `varied` are the keys that differ in the whole folder, some perhaps not in here."""
    by = ["choices.loss", "choices.optimizer"]
    choices = [key for key in frame if key.startswith("choices.") and key not in by]
    by += [key for key in choices if frame[key].nunique(dropna=False) > 1] + _shown(frame)
    has = sorted(runs[0].metrics["unlearned"], key=lambda name: name.partition("_")[2])  # forget beside retain
    usual = [name for name in headline_first(has) if not name.startswith(ON_DEMAND) and "truth_ratio" not in name]
    wanted = [name for name in (usual if asked is None else asked) if name in has]
    columns = [column for name in wanted for column in ((name, DELTA) if name == MIA else (name,))]
    arrows = {HIGHER: " ↑", LOWER: " ↓", TARGET: " →", "": ""}
    titles = [key.partition(".")[2] for key in by] + [label_of(name) + arrows[hint_of(name)] for name in columns]
    rows = [[*titles, "steps", "unlearn seconds", "win_rate", "n", "status"]]
    for model in ("original", "input_based", "retrained"):
        having = [i for i, found in enumerate(runs) if model in found.metrics]  # it may have been measured in some only
        for i in having[:1]:
            numbers = [_cell(frame.get(f"metrics.{model}.{name}", [])[i : i + 1]) for name in columns]
            rows.append([model.replace("_", "-"), *[""] * (len(by) - 1), *numbers, *[""] * 5])
    frame["untuned"] = frame["tuned"].isna() & frame["choices.loss"].notna()
    again = frame.duplicated([*by, "untuned", *(key for key in frame if key.startswith("seeds."))])
    notes = [f"left out, repeats a seed: `{run}`" for run in frame["run"][again]]
    for (*key, untuned), seeds in frame[~again].groupby([*by, "untuned"], dropna=False):
        for status, same in sorted(seeds.groupby("status"), reverse=True, key=lambda pair: pair[0]):
            lost = f", {len(seeds) - len(same)} of {len(seeds)} diverged" if len(same) < len(seeds) else ""
            mark = ("DIVERGED" if status == "diverged" else f"{status}{lost}") + ", untuned" * bool(untuned)
            numbers = [_cell(same[f"metrics.unlearned.{name}"]) for name in columns]
            numbers.append(" to ".join(map(str, sorted({same["num_steps"].min(), same["num_steps"].max()}))))
            numbers += [_cell(same.get(name, [])) for name in ("seconds.unlearn", "training.win_rate")]
            rows.append([*map(_text, key), *numbers, str(len(same)), mark])
    lost_runs = frame[frame["status"] == "diverged"]
    notes += [f"DIVERGED: `{run}`: {why}" for run, why in zip(lost_runs["run"], lost_runs["reason"], strict=True)]
    said: dict[str, list[str]] = {}
    for run, found in zip(frame["run"], runs, strict=True):
        for note in found.notes:
            said.setdefault(note, []).append(f"`{run}`")
    notes += [f"{note} ({', '.join(where)})" for note, where in said.items()]
    edges = [f"`{run}`" for run, found in zip(frame["run"], runs, strict=True) if _is_at_edge(found.trials)]
    notes += [f"the smallest or the largest learning rate tried was the best: {', '.join(edges)}"] if edges else []
    notes += _why_null(runs, columns)
    commits = dict.fromkeys(found.commit[:10] + found.commit[40:] if found.commit else "unknown" for found in runs)
    versions = dict.fromkeys(f"{name} {version}" for found in runs for name, version in found.versions.items())
    notes.append(f"commit {', '.join(commits)}; {', '.join(versions)}")
    asked = [f"config.{option}" for option in SUITE_OPTIONS if any(run.suite and run.config[option] for run in runs)]
    known = dict.fromkeys((*choices, *varied, *asked, *(CHOSEN if frame["num_trials"].any() else ())))
    alike = [key for key in known if key not in by and key in frame and key != "config.task.source"]
    told = ", ".join(f"{key.partition('.')[2] or key} {_text(frame[key].iloc[0])}" for key in ("source", *alike))
    how = f" Learning rate and gamma tuned on the {runs[0].tuned}." if runs[0].trials else ""
    above = [f"### {runs[0].caption}", "", f"All rows: {told}.{how} {ABOUT}"]
    return "\n".join([*above, "", *_markdown(rows), "", *(f"- {note}" for note in dict.fromkeys(notes))])


def _sequence(runs: Mapping[str, Results], asked: Sequence[str] | None) -> str:
    """The Markdown of a sequence of requests: what each model makes of each request, and of those before it."""
    has = dict.fromkeys(name for found in runs.values() for name in found.metrics["unlearned"])
    usual = [name for name in headline_first(has) if name in HEADLINE or name.endswith(("_probability", "_rouge"))]
    columns = [name for name in usual if not name.startswith("validation_")] if asked is None else list(asked)
    rows = [["request", "model", *map(label_of, columns)]]
    for run, found in runs.items():
        for model in ("original", "unlearned", "retrained"):
            if model in found.metrics:
                numbers = [number(finite(found.metrics[model].get(name))) for name in columns]
                rows.append([run if model == "unlearned" else "", model, *numbers])
    about = (
        "Each request starts from the model that the one before left. Forget is that request, earlier all before it; "
        "the original model is that before the first request, the retrained one has seen none of the requests so far."
    )
    notes = [f"`{run}`: {note}" for run, found in runs.items() for note in found.notes]
    notes += _why_null(runs.values(), columns)
    told = [f"- {note}" for note in dict.fromkeys(notes)]
    return "\n".join([f"### {len(runs)} requests in sequence", "", about, "", *_markdown(rows), "", *told])


def _why_null(runs: Iterable[Results], columns: Collection[str]) -> list[str]:
    """A note for each reason why one of `columns` is null, of the unlearned model or of another that is named."""
    notes = []
    for found in runs:
        for key, why in found.reasons.items():
            model, _, name = key.rpartition(".")
            if name in columns:
                notes.append(f"{NULL} {label_of(name)}{f' of the {model} model' if model else ''}: {why}")
    return notes


def _markdown(rows: list[list[str]]) -> list[str]:
    """The lines of a table, of which the first row is the header; its columns are as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [f"| {' | '.join(f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True))} |" for row in rows]


def _is_at_edge(trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a wider range of learning rates might have held a better one."""
    rates = sorted({trial["lr"] for trial in trials})
    return len(rates) > 1 and any(trial["chosen"] and trial["lr"] in (rates[0], rates[-1]) for trial in trials)


def _cell(values: Iterable[float | None]) -> str:
    """Mean ± half-width of its 95 % t-interval; one number stands alone; n is said where some are null."""
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
    missing = value is None or value != value
    return NULL if missing else f"{value:g}" if isinstance(value, float) else str(value).replace("|", "\\|")


if __name__ == "__main__":
    main()
