"""`python -m soul_exp.verify runs/NAME`: every metric of finished runs, recomputed from their records alone."""

import argparse
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soul_exp import binding, results
from soul_exp.artifacts.answer_cache import Measured, read_answers
from soul_exp.artifacts.measures import AttackMeasures, attack_measures, measures, with_attacks
from soul_exp.artifacts.scores import RETRAINED, of_probes
from soul_exp.build import attack_metrics_of, build_attack, metrics_of
from soul_exp.compose import check_trusted, listed_metrics
from soul_exp.distributed.output import is_lost, open_standard_streams
from soul_exp.errors import UsageError, explained, first_line
from soul_exp.files import hashes, mismatch, read_sealed
from soul_exp.metrics.dialects import DIALECTS
from soul_exp.metrics.scale import scale_of
from soul_exp.options import leaves
from soul_exp.ranges import SEED
from soul_exp.report.console import comparison
from soul_exp.report.labels import printable
from soul_exp.run import Metric
from soul_exp.stages.evaluate import WEIGHTS
from soul_exp.stages.stage import ATTACKS, MODEL, RECORDS
from soul_exp.training.checkpoints import COMPLETE

OF_METRICS = ("metrics", "intervals", "ceiling", "retrained_seeds")  # fields of results.json with a value per metric
NOT_COMPUTED = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)  # of changed records or constants
# a field of results.json that is recomputed -> whether its first key is a model; else it is of the unlearned one
FIELDS = {name: True for name in ("metrics", "intervals", "free_answers", "suite")}
FIELDS |= {name: False for name in ("no_interval", "ceiling", "retrained_seeds", "samples", "collapsed")}
FIELDS |= {name: False for name in ("attacks", "unit_values")}
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
    metrics = metrics_of(_entries(folder, run, trust), run.dialect)
    of_attacks = _attack_metrics(run)
    every = {**metrics, **{name: metric for each in of_attacks.values() for name, metric in each.items()}}
    damaged, foreign = dict(_damaged(folder, run)), [*_foreign(folder, run), *_foreign_names(run, every)]
    other = dict(_other_versions(every, run.metric_versions))
    answers, unreadable = _answers(folder, run, damaged)
    found, unread = _attacked(folder, run, of_attacks, damaged)
    foreign += _other_unit(run, answers)
    unattacked = {*of_attacks} - {*found.attacks}
    left_out = {*other, *(name for attack in unattacked for name in of_attacks[attack])}
    compared = list(_compared(run, metrics, left_out, answers, found))
    wrong = [problem for problem in compared if problem is not None]
    lacking = [*unread, *_without_records(run, {*found.metrics})]
    problems = [*damaged.values(), *foreign, *unreadable, *lacking, *other.values(), *wrong]
    return Verdict(len(compared), len(compared) - len(wrong), problems, list(_notes(folder, run, metrics, answers)))


def in_dialect(folder: Path, dialect: str, trust: bool = False) -> results.Results:
    """The run in `folder` with every metric as `dialect` defines it, from its records; UsageError as for `verify`."""
    run = _read(folder)
    metrics = metrics_of(_entries(folder, run, trust), dialect)
    known = {name: run.reasons[name] for name in metrics if _is_unavailable(run, name)}
    metrics = {name: metric for name, metric in metrics.items() if name not in known}
    with explained(NOT_COMPUTED, f"{folder}: its records give no metrics in this dialect", "run verify without it"):
        records = {model: read_answers(folder / RECORDS / model) for model in _models(run)}
        attacked, _ = _attacked(folder, run, _attack_metrics(run), {})
        found = with_attacks(measures(metrics, records, run.seeds["seed"]), attacked)
    stated = found.stated() | {"reasons": {**known, **found.reasons}}
    headline: dict[str, Any] = {key: found.metrics["unlearned"].get(key) for key in results.HEADLINE}
    return replace(run, config={**run.config, "dialect": dialect}, **stated, **headline)


def _read(folder: Path) -> results.Results:
    run = results.read(folder)
    if run is None:
        raise UsageError(f"{folder} has no {results.NAME}: give the folder of a finished run, as runs/tofu/default")
    if not run.sha256:
        raise UsageError(f"{folder} was run by a version that did not keep the records of all models: run it again")
    seed = run.seeds.get("seed")
    if not SEED.fits(seed):
        raise UsageError(f"{folder / results.NAME}: seeds.seed is {seed}, expected {SEED.expected()}")
    if run.dialect not in DIALECTS:
        raise UsageError(
            f"{folder / results.NAME}: config.dialect is {run.dialect}, expected one of {', '.join(DIALECTS)}"
        )
    return run


def _attack_metrics(run: results.Results) -> dict[str, dict[str, Metric]]:
    """Attack -> its metrics, of those that were carried out."""
    return attack_metrics_of({name: entry for name, entry in run.config["attack"].items() if name in run.attacks})


def _entries(folder: Path, run: results.Results, trust: bool) -> Any:
    check_trusted(folder / results.NAME, {**results.metric_entries(run), "attack": run.config["attack"]}, trust)
    return run.config["task"].get("metrics")


def _is_unavailable(run: results.Results, metric: str) -> bool:
    """Whether `metric` is stated as not available, for no model: then nothing is computed."""
    return metric in run.reasons and all(values.get(metric) is None for values in run.metrics.values())


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


def _foreign(folder: Path, run: results.Results) -> Iterator[str]:
    """The message for each file, folder and link that a run of its own does not have among records and weights."""
    stated, found = _stated(folder, run), _found(folder)
    folders = {str(parent) for name in stated for parent in Path(name).parents}
    weights = [folder / name for name in found if name.startswith(f"{MODEL}/")]
    roots = [folder / RECORDS, folder / ATTACKS]
    below = [path for root in roots for path in sorted(root.rglob("*"))]
    for path in (*roots, *below, folder / MODEL, *weights):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            yield f"{name}: a link to {os.readlink(path)}, which may be changed there"
        elif path.is_dir() and name not in (*folders, MODEL):
            yield f"{name}: a folder that this run did not write"
        elif path.exists() and not path.is_dir() and name not in stated:
            yield f"{name}: a file that this run did not write"
        elif path.is_file() and (number := path.stat().st_nlink) > 1:
            yield f"{name}: it has {number} names (hard links), and may be changed under another"


def _foreign_names(run: results.Results, metrics: Mapping[str, Metric]) -> Iterator[str]:
    """The message for each entry about a metric that the run does not have, or that declares no version."""
    versioned = {name for name, metric in metrics.items() if scale_of(metric) is not None} | {results.TASK}
    for model, values in run.metrics.items():
        for name in {*values} - {*metrics}:
            yield f"metrics.{model}.{name}: no metric of this run"
    for name in run.metric_versions:
        if name not in versioned:
            yield f"metric_versions.{name}: no metric of this run that has versions"
    for name in run.reasons:
        if name not in metrics and name.partition(".")[2] not in metrics and name not in ("collapsed", "ceiling"):
            yield f"reasons.{name}: no metric of this run"


def _other_unit(run: results.Results, answers: Mapping[str, Measured]) -> Iterator[str]:
    """The message that the records name other units than `unit`: "author 3" is an author; without names, an item."""
    probes = of_probes(answers.get("unlearned", {})).values()
    kinds = {name.partition(" ")[0] for given in probes for name in given.unit or ()} or {"item"}
    if "unlearned" in answers and probes and kinds != {run.unit}:
        yield f"unit: {run.unit}, but its records name {' and '.join(sorted(kinds))}"


def _without_records(run: results.Results, attacked: set[str]) -> Iterator[str]:
    """The message for each model that results.json names somewhere and that has no records.

    Records of attacks, on the models `attacked`, are enough for one that has no other numbers.
    """
    only = {model for model in attacked if {*run.metrics.get(model, {})} <= {*results.attack_of(run)}}
    named = {*run.metrics, *run.intervals, *run.free_answers, *run.suite, *run.sha256["models"]} - only
    for model in sorted(named - {*_models(run)}):
        yield f"{model}: it has no records, which its numbers must come from"
    for model in sorted({*_models(run)} - {*run.sha256["models"]}):
        yield f"{model}: it has records, but sha256.models does not name it"


def _stated(folder: Path, run: results.Results) -> dict[str, str]:
    """File below `folder` -> SHA-256 in results.json; of weights only where the folder of the model was kept."""
    weights = (run.sha256["models"].get("unlearned") or {}) if (folder / MODEL).is_dir() else {}
    return _below({RECORDS: run.sha256["records"], ATTACKS: run.sha256.get("attacks") or {}, MODEL: weights})


def _found(folder: Path) -> dict[str, str]:
    found = {inner: hashes(folder / inner, "*") for inner in (RECORDS, ATTACKS)}
    return _below({**found, MODEL: hashes(folder / MODEL, WEIGHTS)})


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
        elif problem := _unlisted(folder, run, f"{RECORDS}/{model}"):
            problems.append(f"{problem}: {model} is not recomputed")
        else:
            try:
                found[model] = read_answers(folder / RECORDS / model)
            except (*NOT_COMPUTED, OSError) as error:
                problems.append(f"{model}: not recomputed, as its records cannot be read ({first_line(error)})")
    return found, problems


def _attacked(
    folder: Path, run: results.Results, of_attacks: Mapping[str, Mapping[str, Metric]], damaged: Mapping[str, str]
) -> tuple[AttackMeasures, list[str]]:
    """The numbers of the attacks whose records are intact, and the message for each that is not recomputed."""
    places = dict.fromkeys(name.rpartition("/")[0] for name in run.sha256.get("attacks") or ())
    problems = {
        name: f"{ATTACKS}/{name}: no attack that config.attack describes"
        for name in dict.fromkeys(place.partition("/")[0] for place in places)
        if name not in of_attacks
    }
    found = attack_measures({}, {}, run.seeds["seed"])
    for attack, metrics in of_attacks.items():
        own = [place for place in places if place.startswith(f"{attack}/")]
        records: dict[str, dict[str, Measured]] = {}
        try:
            if any(name.startswith(f"{ATTACKS}/{attack}/") for name in damaged):
                raise ValueError("its records are not those of the run")
            for place in own:
                if problem := _unlisted(folder, run, f"{ATTACKS}/{place}"):
                    raise ValueError(problem)
                _, model, branch = place.split("/")
                records.setdefault(model, {})[branch] = read_answers(folder / ATTACKS / place)
            made = build_attack(attack, run.config["attack"][attack])
            wanted, named = {*made.branches()}, made.named_points()
            if not records or any({*branches} != wanted for branches in records.values()):
                raise ValueError(f"its records have not the branches {', '.join(sorted(wanted))} of every model")
            for model, branches in records.items():
                for branch, points in branches.items():
                    if named is not None and {*points} != {*named}:
                        stated = f"{model}/{branch} has the points {', '.join(points)}"
                        raise ValueError(f"{stated}, and its options name {', '.join(named)}")
            each = attack_measures({attack: metrics}, {attack: records}, run.seeds["seed"])
        except (*NOT_COMPUTED, OSError) as error:
            problems[attack] = f"{attack}: not recomputed ({first_line(error)})"
        else:
            found = with_attacks(found, each)
    return found, [*problems.values()]


def _unlisted(folder: Path, run: results.Results, place: str) -> str | None:
    """How the marker of the records in `place`, which says what is read, differs from results.json, or None."""
    inner = folder / place
    sealed, where = read_sealed(inner / COMPLETE), f"{place}/{COMPLETE}"
    if isinstance(sealed, str):
        return f"{place}/{sealed}"
    files = sealed.get("files")
    below = (name for name in _stated(folder, run) if name.startswith(f"{place}/"))
    stated = {name.removeprefix(f"{place}/") for name in below} - {COMPLETE}
    if not isinstance(files, dict) or {*files} != stated:
        return f"{where}: it does not list the files that results.json does"
    with explained(NOT_COMPUTED, where, "run again"):
        differ = filter(None, (mismatch(inner, name, files) for name in files))
        return next((f"{place}/{problem}" for problem in differ), None)


def _models(run: results.Results) -> list[str]:
    """The models whose answers were recorded."""
    return list(dict.fromkeys(name.split("/")[0] for name in run.sha256["records"]))


def _compared(
    run: results.Results,
    metrics: Mapping[str, Metric],
    left_out: set[str],
    records: Mapping[str, Measured],
    of_attacks: AttackMeasures,
) -> Iterator[str | None]:
    """For each number that is stated, or that the records give: None if both agree, else what differs.

    What needs records that are not intact is left out, and so are the metrics `left_out`. `of_attacks` are the numbers
    of attacks whose records are intact.
    """
    for key, why in of_attacks.reasons.items():
        stated = run.reasons.get(key)
        yield None if stated == why else f"reasons.{key}: stated {stated}, its records give {why}"
    if any(model.startswith("retrained") and model not in records for model in _models(run)):
        left_out = left_out | {name for name, metric in metrics.items() if {*RETRAINED} & {*binding.names(metric)}}
    yield from _stated_twice(run)
    if "unlearned" not in records:
        return
    taken = {name: metrics[name] for name in metrics if name not in left_out and not _is_unavailable(run, name)}
    try:
        found = with_attacks(measures(taken, records, run.seeds["seed"]), of_attacks)
    except NOT_COMPUTED as error:
        yield f"metrics: they cannot be computed from the records ({first_line(error)})"
        return
    if found.not_finite and run.status != "diverged":
        yield f"status: {run.status}, but {found.not_finite}"
    not_read = {*run.attacks} - {*of_attacks.attacks}
    for name, of_model in FIELDS.items():
        then, now = (dict(_leaves(getattr(each, name))) for each in (run, found))
        for key in sorted(then.keys() | now.keys()):
            model, _, rest = key.partition(".") if of_model else ("unlearned", "", key)
            if name == "no_interval":
                model, _, rest = key.partition(".") if key.split(".")[0] in records else ("unlearned", "", key)
            by_metric = name in (*OF_METRICS, "no_interval", "unit_values")
            by_attack = model not in _models(run) and model in of_attacks.metrics
            is_left_out = rest.split(".")[0] in (left_out if by_metric else not_read if name == "attacks" else ())
            if (model in records or by_attack) and not is_left_out:
                what = f"{name}.{key}: stated {then.get(key)}, its records give {now.get(key)}"
                yield None if _same(then.get(key), now.get(key)) else what


def _stated_twice(run: results.Results) -> Iterator[str | None]:
    """For each value that results.json states in two places: None if both agree, else what differs."""
    for name in results.HEADLINE:
        stated, shown = run.metrics["unlearned"].get(name), getattr(run, name)
        yield None if _same(stated, shown) else f"{name}: {shown}, but {stated} in metrics.unlearned"
    configured = {"seed": run.config.get("seed"), "prepare.seed": (run.config.get("prepare") or {}).get("seed")}
    for name, seed in run.seeds.items():
        if seed != configured.get(name):
            yield f"seeds.{name}: {seed}, but {configured.get(name)} in config"
    if run.status not in ("finished", "diverged") or (run.status == "diverged") != (run.reason is not None):
        yield f"status: {run.status} with the reason {run.reason}, expected finished without or diverged with one"


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """As `leaves`, of results: what is not finite is null in results.json, and empty mappings hold nothing."""
    for key, leaf in leaves(value, into_lists=True):
        if leaf != {}:
            yield key, None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf


def _notes(
    folder: Path, run: results.Results, metrics: Mapping[str, Metric], records: Mapping[str, Measured]
) -> Iterator[str]:
    """What a reader of the verdict has to know: what was not compared, or is compared with something unusual."""
    if {run.sha256["code"], *(run.sha256.get("attack_code") or {}).values()} != {results.source_hash()}:
        yield f"measured by other code than this (commit {run.commit or 'unknown'})"
    if run.sha256["models"].get("unlearned") and not (folder / MODEL).is_dir() and run.num_steps:
        yield f"{MODEL}: not here, so that the weights are not compared"
    by_content: dict[Any, list[str]] = {}
    attacked = {f"{ATTACKS}/{name}": sha for name, sha in (run.sha256.get("attacks") or {}).items()}
    named = dict.fromkeys("/".join(name.split("/")[:3]) for name in attacked)
    for model in (*_models(run), *named):
        recorded = attacked if model in named else run.sha256["records"]
        files = {name: sha for name, sha in recorded.items() if name.startswith(f"{model}/")}
        by_content.setdefault(tuple(sorted(files.values())), []).append(model)
    for models in by_content.values():
        if len(models) > 1:
            yield f"{' and '.join(models)} have the same records, to the last bit"
    entries = results.metric_entries(run)
    listed = listed_metrics()
    if own := [name for name in metrics if name in listed and entries[name] not in listed[name]]:
        yield f"not what conf/ calls so, as config.task.metrics says: {', '.join(own)}"
    if unavailable := [name for name in metrics if _is_unavailable(run, name)]:
        yield f"stated as not available, so not computed: {', '.join(unavailable)}"


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
            asked = args.dialect and not verdict.problems
            in_other = comparison(in_dialect(folder, args.dialect, args.trust)) if asked else ""
        except UsageError as error:
            verdict, in_other = Verdict(problems=[str(error)]), ""
        failed |= bool(verdict.problems)
        print(printable(f"{folder}: {verdict.num_agree} of {verdict.num_numbers} numbers agree with the records"))
        for line in (*verdict.problems, *(f"note: {note}" for note in verdict.notes)):
            print(printable(f"  {line}"), flush=True)
        if in_other:
            print(printable(in_other), flush=True)
    parser.exit(2 if is_lost() else int(failed))


def runs_in(folder: Path) -> list[Path]:
    """The folders of finished runs, `folder` or below it; of a sequence of requests those of its requests."""
    found = sorted(path.parent for path in folder.rglob(results.NAME))
    return [path for path in found if not (path / f"{results.REQUEST}1").is_dir()]


if __name__ == "__main__":
    main()
