"""`python -m soul_exp.verify runs/NAME`: every metric of finished runs, recomputed from their records alone."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soul_exp import binding, results
from soul_exp.artifacts.answer_cache import Measured, read_answers
from soul_exp.artifacts.measures import measures
from soul_exp.artifacts.scores import RETRAINED
from soul_exp.build import metrics_of
from soul_exp.compose import check_trusted
from soul_exp.distributed.output import is_lost, open_standard_streams
from soul_exp.errors import UsageError
from soul_exp.files import hashes, mismatch, read_sealed
from soul_exp.metrics.dialects import DIALECTS, OURS
from soul_exp.metrics.scale import scale_of
from soul_exp.options import leaves
from soul_exp.report.console import comparison
from soul_exp.report.labels import printable
from soul_exp.run import Metric
from soul_exp.stages.evaluate import WEIGHTS
from soul_exp.stages.stage import MODEL, RECORDS
from soul_exp.training.checkpoints import COMPLETE

OF_METRICS = ("metrics", "intervals", "ceiling", "retrained_seeds")  # fields of results.json with a value per metric
# a field of results.json that is recomputed -> whether its first key is a model; else it is of the unlearned one
FIELDS = {name: True for name in ("metrics", "intervals", "free_answers")}
FIELDS |= {name: False for name in ("ceiling", "retrained_seeds", "samples", "collapsed")}
SAME = 1e-9  # relative: other releases of numpy and scipy may round the last digits otherwise


@dataclass(frozen=True)
class Verdict:
    """What `verify` found out about one run."""

    num_numbers: int = 0  # recomputed
    num_agree: int = 0  # of these
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()


def verify(folder: Path, trust: bool = False) -> Verdict:
    """Compares results.json in `folder` with the files that it was computed from, which alone are read.

    UsageError if there is no results.json, if the run is of a version that kept the records of the unlearned model
    only, or if it names metrics that conf/ does not list, unless `trust`.
    """
    run = _read(folder)
    entries = run.config["task"]["metrics"]
    check_trusted(folder / results.NAME, entries, trust)
    metrics = metrics_of(entries, run.config.get("dialect", OURS))
    damaged, foreign = dict(_damaged(folder, run)), _foreign(folder, run)
    other = dict(_other_versions(metrics, run.metric_versions))
    answers, unreadable = _answers(folder, run, damaged)
    metrics = {name: metric for name, metric in metrics.items() if name not in other and name not in run.reasons}
    compared = list(_compared(run, metrics, answers))
    notes = []
    if run.sha256.get("code") != results.code_hash():
        notes.append(f"measured by other code than this (commit {run.commit or 'unknown'})")
    wrong = [problem for problem in compared if problem is not None]
    problems = [*damaged.values(), *foreign, *unreadable, *other.values(), *wrong]
    return Verdict(len(compared), len(compared) - len(wrong), problems, notes)


def in_dialect(folder: Path, dialect: str, trust: bool = False) -> results.Results:
    """The run in `folder` with every metric as `dialect` defines it, from its records; UsageError as for `verify`."""
    run = _read(folder)
    entries = run.config["task"]["metrics"]
    check_trusted(folder / results.NAME, entries, trust)
    metrics = metrics_of(entries, dialect)
    known = {name: why for name, why in run.reasons.items() if name in metrics}
    metrics = {name: metric for name, metric in metrics.items() if name not in known}
    records = {model: read_answers(folder / RECORDS / model) for model in _models(run)}
    found = measures(metrics, records, run.seeds["seed"])
    stated = found.stated() | {"reasons": {**known, **found.reasons}}
    headline: dict[str, Any] = {key: found.metrics["unlearned"].get(key) for key in results.HEADLINE}
    return replace(run, config={**run.config, "dialect": dialect}, **stated, **headline)


def _read(folder: Path) -> results.Results:
    run = results.read(folder)
    if run is None:
        raise UsageError(f"{folder} has no {results.NAME}: give the folder of a finished run, as runs/tofu/default")
    if not run.sha256:
        raise UsageError(f"{folder} was run by a version that did not keep the records of all models: run it again")
    return run


def _damaged(folder: Path, run: results.Results) -> Iterator[tuple[str, str]]:
    """File below `folder` -> what is wrong with it, of records and kept weights whose SHA-256 is not the stated one."""
    stated, found = _stated(folder, run), _found(folder)
    for name in stated:
        if stated[name] != found.get(name):
            path = folder / name
            sealed = read_sealed(path.parent / COMPLETE)
            sizes = sealed.get("files", {}) if isinstance(sealed, dict) else {}
            inner = mismatch(path.parent, path.name, sizes) if path.name in sizes else None
            missing = "missing" if name not in found else "changed after it was written (its SHA-256 differs)"
            yield name, f"{path.parent.relative_to(folder)}/{inner}" if inner else f"{name}: {missing}"


def _foreign(folder: Path, run: results.Results) -> list[str]:
    stated = _stated(folder, run)
    return [f"{name}: a file that this run did not write" for name in _found(folder) if name not in stated]


def _stated(folder: Path, run: results.Results) -> dict[str, str]:
    """File below `folder` -> SHA-256 in results.json; of weights only where the folder of the model was kept."""
    weights = (run.sha256["models"].get("unlearned") or {}) if (folder / MODEL).is_dir() else {}
    return _below({RECORDS: run.sha256["records"], MODEL: weights})


def _found(folder: Path) -> dict[str, str]:
    return _below({RECORDS: hashes(folder / RECORDS, "*"), MODEL: hashes(folder / MODEL, WEIGHTS)})


def _below(named: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {f"{inner}/{name}": digest for inner, files in named.items() for name, digest in files.items()}


def _other_versions(metrics: Mapping[str, Metric], stated: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Metric -> the message that another version of its definition computed the stored value."""
    for name, metric in metrics.items():
        scale, then = scale_of(metric), stated.get(name)
        if scale is not None and then != scale.version:
            here = f"{scale.version} ({scale.history[-1]})"
            yield name, f"{name}: stored by version {then} of its definition, here is {here}"


def _answers(folder: Path, run: results.Results, damaged: Mapping[str, str]) -> tuple[dict[str, Measured], list[str]]:
    """The records of each model that are intact, and the message for each model whose records are not."""
    found: dict[str, Measured] = {}
    problems = []
    for model in _models(run):
        if any(name.startswith(f"{RECORDS}/{model}/") for name in damaged):
            problems.append(f"{model}: not recomputed, as its records are not those of the run")
        else:
            found[model] = read_answers(folder / RECORDS / model)
    return found, problems


def _models(run: results.Results) -> list[str]:
    """The models whose answers were recorded."""
    return list(dict.fromkeys(name.split("/")[0] for name in run.sha256["records"]))


def _compared(
    run: results.Results, metrics: Mapping[str, Metric], records: Mapping[str, Measured]
) -> Iterator[str | None]:
    """For each number that is stated, or that the records give: None if both agree, else what differs.

    What needs records that are not intact is left out.
    """
    if any(model.startswith("retrained") and model not in records for model in _models(run)):
        metrics = {name: metric for name, metric in metrics.items() if not {*RETRAINED} & {*binding.names(metric)}}
    for name in results.HEADLINE:
        stated, shown = run.metrics["unlearned"].get(name), getattr(run, name)
        yield None if _same(stated, shown) else f"{name}: {shown}, but {stated} in metrics.unlearned"
    if "unlearned" not in records:
        return
    found = measures(metrics, records, run.seeds["seed"])
    for name, of_model in FIELDS.items():
        then, now = (dict(leaves(getattr(each, name), into_lists=True)) for each in (run, found))
        for key in sorted(then.keys() | now.keys()):
            model, _, rest = key.partition(".") if of_model else ("unlearned", "", key)
            if model in records and (name not in OF_METRICS or rest.split(".")[0] in metrics):
                what = f"{name}.{key}: stated {then.get(key)}, its records give {now.get(key)}"
                yield None if _same(then.get(key), now.get(key)) else what


def _same(stated: Any, value: Any) -> bool:
    if isinstance(stated, float | int) and isinstance(value, float | int):
        return math.isclose(stated, value, rel_tol=SAME, abs_tol=1e-300) or stated == value
    return bool(stated == value)


def main() -> None:
    """Prints one line per run and one per problem; exits 1 if there is a problem, 2 for bad input."""
    parser = argparse.ArgumentParser(
        "python -m soul_exp.verify", description="Recompute every metric of finished runs from their records alone."
    )
    parser.add_argument("folder", type=Path, metavar="runs/NAME", help="the folder of a finished run, or of several")
    parser.add_argument("--trust", action="store_true", help="call metrics that results.json names and conf/ does not")
    parser.add_argument("--dialect", choices=DIALECTS, help="also print the metrics as this program defines them")
    args = parser.parse_args()
    open_standard_streams()
    failed, folders = False, runs_in(args.folder)
    if not folders:
        parser.exit(2, printable(f"soul_exp.verify: found no {results.NAME} in {args.folder} or below it\n"))
    for folder in folders:
        try:
            verdict = verify(folder, args.trust)
            in_other = comparison(in_dialect(folder, args.dialect, args.trust)) if args.dialect else ""
        except UsageError as error:
            verdict, in_other = Verdict(problems=[str(error)]), ""
        failed |= bool(verdict.problems)
        print(printable(f"{folder}: {verdict.num_agree} of {verdict.num_numbers} numbers agree with the records"))
        for line in (*verdict.problems, *(f"note: {note}" for note in verdict.notes)):
            print(printable(f"  {line}"), flush=True)
        if in_other and not verdict.problems:
            print(printable(in_other), flush=True)
    parser.exit(2 if is_lost() else int(failed))


def runs_in(folder: Path) -> list[Path]:
    """The folders of finished runs, `folder` or below it; of a sequence of requests those of its requests."""
    found = sorted(path.parent for path in folder.rglob(results.NAME))
    return [path for path in found if not (path / f"{results.REQUEST}1").is_dir()]


if __name__ == "__main__":
    main()
