"""Run folders as data frames: which runs lie below a folder, what they share and where they differ."""

import functools
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from soul_exp import options, results
from soul_exp.errors import UsageError, short
from soul_exp.report.labels import DELTA, HEADLINE, MIA, NULL, finite, on_one_line
from soul_exp.results import COMPARED, ERROR, REQUEST, TASK, TYPED, Compared, Results, attack_of, attack_points

SUITE_OPTIONS = ("utility_suite", "utility_limit")
ENDS = ("low", "high")  # of an interval
# results that no row holds as they are
NESTED = (
    *("intervals", "no_interval", "samples", "unit", "ceiling", "retrained_seeds", "collapsed", "free_answers"),
    *("evaluation_seconds", "cached", "attacks", "unit_values"),
)
METRIC_ENTRY = re.compile(r"config\.(task|attack\.\w+)\.metrics\.")  # `comparable` reads these
UNKNOWN = "unknown"  # the version of a definition, in older results
CHOSEN = tuple(f"config.{key}" for key in options.CHOSEN)

ABOUT = (
    "↑ higher is better, ↓ lower is better, → nearest to the retrained model is best. n counts runs that differ in "
    "the seed only. [low, high] is a 95 % interval: of a single run over its independent units, of the mean of several "
    "over runs (Student's t) and units, in the metric's range. Bold is the best mean of the rows that neither diverged "
    "nor collapsed, ≈ one that is no further from it than both intervals explain."
)


def load(folder: Path | str) -> pd.DataFrame:
    """One row per run below `folder`: choices, `config.` keys that differ, metrics, number of its `table` (from 1).

    A bare metric is the unlearned model's, the others' begin with `original.` and so on; `utility.low` and
    `utility.high` are its 95 % interval over independent units; null is NaN. Raises UsageError
    if there are no runs or a results.json is broken.
    """
    groups = enumerate(comparable(find(folder)[0]), 1)
    frame = pd.concat([frame_of(group).assign(table=number) for number, group in groups], ignore_index=True)
    kept, hidden = _differing(frame), ("config", "data_hashes", "versions")
    frame = frame[[key for key in frame if key in kept or key.split(".")[0] not in hidden]]
    return frame.rename(
        columns=lambda c: c.removeprefix("choices.").removeprefix("metrics.").removeprefix("unlearned.")
    )


def trials(folder: Path | str) -> pd.DataFrame:
    """One row per trial of each run below `folder` (seeds share them): options, validation metrics, whether chosen."""
    rows = [{"run": name, **trial} for name, run in find(folder)[0].items() for trial in run.trials]
    return pd.json_normalize(rows).rename(columns=lambda c: c.removeprefix("metrics."))


def attacks(folder: Path | str) -> pd.DataFrame:
    """One row per point of an attack on a model of each run below `folder`: `point` is a number where it is named so.

    Columns run, attack, model, branch, point, and the measures; `informative` is false where nothing can be recovered.
    """
    rows = [
        {"run": name, "attack": attack, "model": model, "branch": branch, "point": number_of(point), **measures}
        | {"informative": is_informative}
        for name, run in find(folder)[0].items()
        for attack, model, branch, point, measures, is_informative in attack_points(run)
    ]
    return pd.DataFrame(rows, columns=None if rows else ["run", "attack", "model", "branch", "point", "informative"])


def number_of(point: str) -> float | str:
    """The number that names a point, such as one of steps; the name where it is none."""
    try:
        return float(point)
    except ValueError:
        return point


def folder_of(folder: Path, name: str) -> Path:
    """The folder of the run that `find` calls `name`: below `folder`, or this itself."""
    return folder / name if (folder / name).is_dir() else folder


def find(folder: Path | str) -> tuple[dict[str, Results], dict[str, str]]:
    """The results below `folder` by the name of their run, and the error of each run without results.

    A run that is a sequence of requests counts once, by its last request; if `folder` itself is such a run, each of its
    requests counts. Raises UsageError as `load` does.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder: expected one that holds runs, such as runs/tofu")
    is_sequence = (root / f"{REQUEST}1").is_dir()
    runs, missing = {}, {}
    for path, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [inner for inner in subfolders if not _leads_up(Path(path) / inner)]
        here = Path(path)
        name = on_one_line(here.relative_to(root).as_posix() if here != root else root.resolve().name)
        lists_requests = here == root and is_sequence  # its own results repeat those of the last request
        if not lists_requests and (here / results.NAME).is_file():
            file = (here / results.NAME).stat()
            runs[name] = _read(here.absolute(), (file.st_ino, file.st_mtime_ns, file.st_size))
        elif (ERROR in names or TYPED in subfolders) and not lists_requests:
            error = (here / ERROR).read_text(errors="replace").strip() if ERROR in names else ""
            missing[name] = (
                on_one_line(error.split("\n")[0])
                or "no error.txt: still running, killed, or without the stage evaluate"
            )
        is_run = results.NAME in names or TYPED in subfolders
        skipped = (
            ".",
            *(("wandb/", "model/") if is_run else ()),
            *((REQUEST,) if is_run and not lists_requests else ()),
        )
        subfolders[:] = [inner for inner in subfolders if not f"{inner}/".startswith(skipped)]
    if not runs:
        example = "".join(f"; without results: {name} ({why})" for name, why in list(missing.items())[:1])
        raise UsageError(f"{root} has no runs: there is no {results.NAME} in any folder below it{example}")
    return dict(sorted(runs.items(), key=_order)), dict(sorted(missing.items(), key=_order))


def _leads_up(folder: Path) -> bool:
    """Whether `folder` is a link to a folder that holds it, which would be walked without end."""
    return folder.is_symlink() and folder.resolve() in (folder.parent.resolve(), *folder.parent.resolve().parents)


@functools.lru_cache(maxsize=4096)  # a command makes several tables of the same runs
def _read(folder: Path, version: tuple[int, int, int]) -> Results:
    """The results in `folder`, whose file is of that `version`, with all texts escaped."""
    run = results.read(folder)
    assert run is not None
    return replace(run, **{field: _on_one_line(value) for field, value in vars(run).items()})


def _on_one_line(value: Any) -> Any:
    """`value`, which a file of somebody else may hold, with all its texts escaped."""
    if isinstance(value, str):
        return on_one_line(value)
    if isinstance(value, Mapping):
        return {_on_one_line(key): _on_one_line(inner) for key, inner in value.items()}
    return [_on_one_line(inner) for inner in value] if isinstance(value, list | tuple) else value


def _order(named: tuple[str, Any]) -> tuple[str, int]:
    """Request 10 comes after request 2."""
    start, _, number = named[0].rpartition(REQUEST)
    return (start + REQUEST, int(number)) if number.isdigit() else (named[0], 0)


def is_measured(runs: Collection[Results], name: str) -> bool:
    """Whether any model of the runs has a value of the metric `name`, or of the difference DELTA."""
    if name == DELTA:
        return any(finite(run.metrics.get("retrained", {}).get(MIA)) is not None for run in runs)
    return any(finite(values.get(name)) is not None for run in runs for values in run.metrics.values())


def comparable(runs: Mapping[str, Results]) -> list[dict[str, Results]]:
    """The runs in groups that one table may hold; each stands in the first one that it fits.

    All of a group have the same task, dialect, suite, compared models and tuning, and agree in whatever two of them
    both have: data, definitions of metrics, and numbers of the compared models. So a run with one metric more stays.
    """
    groups: list[tuple[dict[str, Any], dict[str, Any], dict[str, Results]]] = []
    for name, run in runs.items():
        common, shared = _common(run), _shared(run)
        for of_group, known, members in groups:
            if of_group == common and all(known.get(key, value) == value for key, value in shared.items()):
                known.update(shared)
                members[name] = run
                break
        else:
            groups.append((common, shared, {name: run}))
    return [members for _, _, members in groups]


def _common(run: Results) -> dict[str, Any]:
    """What all runs of a table share."""
    tune = {key: value for key, value in (run.config.get("tune") or {}).items() if key not in ("seed", "workers")}
    return {
        "caption": run.caption,
        "source": run.config["task"].get("source"),
        "dialect": run.dialect,
        **{option: run.config.get(option) for option in SUITE_OPTIONS},
        "compared models": [each.key for each in _references() if each.key in run.metrics],
        "tuning": tune if run.trials else None,
    }


def _shared(run: Results) -> dict[str, Any]:
    """What two runs of a table agree in, where both have it."""
    found: dict[str, Any] = {f"hash of the data's {key}": value for key, value in run.data_hashes.items()}
    of_task = run.config["task"].get("metrics") or {}
    of_attacks = attack_of(run)
    for name in (TASK, *run.metrics["unlearned"]):
        found[f"version of {name}"] = str(run.metric_versions.get(name, UNKNOWN))
        found[f"options of {name}"] = of_task.get(name)
        for model in _references() if name not in of_attacks else ():
            value = run.metrics.get(model.key, {}).get(name)
            found[f"{name} of the {model.title} model"] = None if value is None else f"{value:.5g}"
    return found


def why_apart(run: Results, other: Results) -> list[str]:
    """Why two tables hold `run` and `other`: what differs, with the value of `other` there and that of `run` here."""
    here, there = ({**_common(each), **_shared(each)} for each in (run, other))
    return [
        f"{key}: {short(there[key])} there, {short(value)} here"
        for key, value in here.items()
        if key in there and there[key] != value
    ]


def _references() -> list[Compared]:
    """The models that are the same for all runs of a table."""
    return [each for each in COMPARED if each.role is not None and not each.with_system_prompt]


def study_of(run: Results) -> int | None:
    """The seed of the tuning study that chose the run's numbers; None without trials."""
    return (run.config.get("tune") or {}).get("seed") if run.trials else None


def tuned_on(run: Results) -> str | None:
    """What the run was tuned on, without the seed of the study; None: untuned, or nothing was unlearned."""
    if not is_unlearned(run):
        return None
    return run.tuned and run.tuned.replace(f", seed {study_of(run)})", ")")


def is_unlearned(run: Results) -> bool:
    """Whether the run unlearned; else its model is a checkpoint, measured as it is."""
    return "unlearn" in run.config.get("stages", ())


def frame_of(runs: Mapping[str, Results]) -> pd.DataFrame:
    """One row per run, all of its results.json under dotted names; no loss or optimizer where nothing was unlearned."""
    rows = []
    for name, run in runs.items():
        left_out = (*HEADLINE, *NESTED, "name", "format", "trials", *(() if run.suite else ("suite",)))
        row = {key: value for key, value in vars(run).items() if key not in left_out}
        if not is_unlearned(run):
            row["choices"] = {**run.choices, "loss": None, "optimizer": None}
            row["config"] = {k: v for k, v in run.config.items() if k not in ("loss", "optimizer", "train")}
        ends = {
            model: {f"{name}.{end}": each[i] for name, each in given.items() if each for i, end in enumerate(ENDS)}
            for model, given in run.intervals.items()
        }
        row["metrics"] = {model: {**of, **ends.get(model, {})} for model, of in with_delta(run).items()}
        row["collapsed"] = None if run.collapsed is None else bool(run.collapsed)
        source = Path(run.config["task"].get("source") or NULL).name
        rows.append({"run": name, "source": source, **row, "num_trials": len(run.trials)})
    return pd.json_normalize(rows).map(lambda value: str(value) if isinstance(value, list) else value)


def with_delta(run: Results) -> dict[str, dict[str, float | None]]:
    """The metrics of each model, with the difference of the retrained model's MIA AUC from its own."""
    aucs = {model: finite(values.get(MIA)) for model, values in run.metrics.items()}
    target = aucs.get("retrained")
    deltas = {model: None if target is None or auc is None else target - auc for model, auc in aucs.items()}
    return {model: {**values, DELTA: deltas[model]} for model, values in run.metrics.items()}


def _differing(frame: pd.DataFrame) -> list[str]:
    """The configuration keys that differ between runs and have a column."""
    drawn = {key for key in frame if key.startswith("config.optimizer.") and key.endswith(".seed")}  # the run has it
    keys = [key for key in frame if key.startswith("config.") and not METRIC_ENTRY.match(key) and key not in drawn]
    # a run without an attack has none of its options
    differ = [key for key in keys if frame[key].nunique(dropna=key.startswith("config.attack.")) > 1]
    return [key for key in differ if options.option_of(key.removeprefix("config.")).has_column]


def varied(frame: pd.DataFrame) -> list[str]:
    """The differing configuration keys that their group's choice (as adam its lr) does not imply, or trials chose."""
    chosen = CHOSEN if frame["num_trials"].any() else ()

    def is_implied(key: str) -> bool:
        group = f"choices.{key.split('.')[1]}"
        return group in frame and frame.groupby(group, dropna=False)[key].nunique(dropna=False).max() == 1

    return [key for key in _differing(frame) if key in chosen or not is_implied(key)]
