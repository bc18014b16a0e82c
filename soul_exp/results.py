"""results.json, the only contract between running and analysing: a documented type, written in one atomic step."""

import functools
import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import DEVNULL, CalledProcessError, check_output
from typing import Any, get_type_hints

import yaml

from soul_exp import options
from soul_exp.errors import explained, short
from soul_exp.files import hashes, write_atomically
from soul_exp.metrics.scale import UNINFORMATIVE
from soul_exp.ranges import fits

FORMAT = 1
NAME = "results.json"
# beside it in a run's folder: what the console showed; why the run failed; what was typed, and what Hydra made of it
LOG, ERROR, TYPED = "soul_exp.log", "error.txt", ".hydra"
TASK = "task"  # the key of the task's version among those of the metrics
REQUEST = "request-"  # how the folders of a sequence of requests begin, inside its run's folder
HEADLINE = ("forget_quality", "utility", "mia_auc")
SHA256 = {"records": Mapping[str, str], "models": Mapping[str, Mapping[str, str] | None], "code": str}
PACKAGES = "torch transformers accelerate datasets deepspeed hydra-core lm_eval numpy scipy rouge-score".split()


@dataclass(frozen=True)
class Compared:
    """A model that a run compares."""

    key: str  # in `metrics`
    title: str
    role: str | None  # of the checkpoint, made by prepare or given; None: what the run itself unlearns or evaluates
    with_system_prompt: bool = False  # whether it answers with the run's system prompt


UNMERGED = "unmerged"  # the model of an unlearned adapter beside its base, which attacks try too: merged is `unlearned`
COMPARED = (
    Compared("original", "original", "target"),
    Compared("input_based", "input-based", "target", with_system_prompt=True),
    Compared("unlearned", "unlearned", None),
    Compared("retrained", "retrained", "retrained"),
)


@dataclass(frozen=True)
class Results:
    """One run. A metric that is not available is null in `metrics`, with the reason in `reasons`."""

    name: str  # the experiment: the folder that holds its runs
    status: str  # "finished" | "diverged": stopped, or weights or a metric of the unlearned model are not finite
    reason: str | None  # why it diverged
    caption: str  # what was forgotten, for tables
    choices: Mapping[str, str]  # group -> choice: model, task, loss, optimizer, compute, precision, adapter
    tuned: str | None  # the data that this combination was tuned on; None: untuned
    config: Mapping[str, Any]  # the resolved configuration
    # model, a key of COMPARED, or UNMERGED for numbers of attacks -> metric -> value, whose unit and direction its
    # function in `metric_entries` declares
    metrics: Mapping[str, Mapping[str, float | None]]
    # metric, or model.metric if it is null for that model only, or "collapsed" -> why it is null
    reasons: Mapping[str, str]
    training: Mapping[str, float | None]  # the last logged training numbers: losses, win_rate
    num_steps: int
    seconds: Mapping[str, float]  # stage -> wall-clock seconds
    peak_memory_gib: float  # of rank 0, which writes the results; device memory on a GPU, else resident memory
    seeds: Mapping[str, int]
    data_hashes: Mapping[str, str]
    commit: str | None
    versions: Mapping[str, str]
    forget_quality: float | None = None  # this and the next two: of the unlearned model
    utility: float | None = None
    mia_auc: float | None = None
    # model -> metric -> [low, high], the 95 % interval over independent units; null: the reason stands in `no_interval`
    intervals: Mapping[str, Mapping[str, Sequence[float] | None]] = field(default_factory=dict)
    no_interval: Mapping[str, str] = field(default_factory=dict)  # metric, or model.metric -> why it has no interval
    # metric of the test behind forget quality -> its values between every two retrained models, in increasing order;
    # their median is the ceiling of forget quality. This and the next are empty with a single retrained model
    ceiling: Mapping[str, Sequence[float]] = field(default_factory=dict)
    retrained_seeds: Mapping[str, Sequence[float | None]] = field(default_factory=dict)  # metric -> of each such model
    samples: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # probe -> number of "examples" and "units"
    unit: str = "item"  # what an independent unit is where it holds several examples, as "author"
    # probe -> why the unlearned model's free answers to it are those of a ruined model; null: that cannot be judged
    collapsed: Mapping[str, str] | None = None
    # model -> probe -> measure of its free answers, as metrics/collapse.py defines them
    free_answers: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    # attack -> model -> branch -> point -> measure -> value; under "uninformative": branch -> points. What follows from
    # them for each model stands in `metrics`
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # metric of an attack on the unlearned model -> unit -> its share in it, so that methods can be compared by unit
    unit_values: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    notes: Sequence[str] = ()  # what a reader of the numbers needs to know, such as degeneration to sign descent
    scorer: Mapping[str, Any] | None = None  # of toxicity: name, revision, auc on num_test unseen texts
    trials: Sequence[Mapping[str, Any]] = ()  # that `config`'s learning rate and gamma were chosen from
    # model -> task -> measure -> value (null: not finite), in the utility suite that `config` names; empty without one
    suite: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    # metric -> version of its definition, and the task's under TASK; a user's own function without a version is absent
    metric_versions: Mapping[str, int] = field(default_factory=dict)
    # model, or role of a further retrained one -> stage of its evaluation -> wall-clock seconds, when it was evaluated
    evaluation_seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    cached: Sequence[str] = field(default_factory=list)  # those of them whose answers were in the cache before this run
    # SHA-256: `records`: file below records/ -> of its bytes; `models`: model -> file of its weights -> of its bytes,
    # null where they are on the hub or were not kept; `code`: of the code that measured; `attacks`: as `records`, of
    # the files below attacks/, where the run was attacked
    sha256: Mapping[str, Any] = field(default_factory=dict)
    # "forward" and "backward": mean passes of a step through the model, the gradient's own included, in units of the
    # rows that the loss reads in a step; empty where no step was taken
    passes: Mapping[str, float] = field(default_factory=dict)
    hardware: str | None = None  # what trained or measured: the GPU, or the CPU, its instructions and cores
    format: int = field(default=FORMAT)

    @property
    def dialect(self) -> str:
        """The dialect of its metrics."""
        return str(self.config.get("dialect", options.DIALECTS[0]))


def write(folder: Path, results: Results) -> None:
    """Write `folder/results.json` in one atomic step; numbers that are not finite become null."""
    write_json(folder / NAME, asdict(results))


def read(folder: Path) -> Results | None:
    """The results in `folder`, under today's names; None if there are none. UsageError if they are not of FORMAT."""
    path = folder / NAME
    if not path.is_file():
        return None
    problem = f"{path} is not a results file of format {FORMAT}"
    errors = (ValueError, KeyError, TypeError, OSError, RecursionError, OverflowError)
    with explained(errors, problem, "remove it and run again"):
        found = Results(**json.loads(path.read_text()))
        for name, kind in get_type_hints(Results).items():
            if not fits(getattr(found, name), kind):
                raise ValueError(f"{name} is {short(getattr(found, name))}")
        if found.format != FORMAT:
            raise ValueError(f"its format is {found.format}")
        if not isinstance(found.config["task"], dict) or "unlearned" not in found.metrics:
            raise ValueError("config.task or metrics.unlearned is missing")
        if absent := {"lr", "gamma", "metrics"}.difference(*found.trials) if found.trials else ():
            raise ValueError(f"a trial has no {min(absent)}")
        if any(ends and len(ends) != 2 for of_model in found.intervals.values() for ends in of_model.values()):
            raise ValueError("an interval has not two ends")
        if any({"examples", "units"} - sample.keys() for sample in found.samples.values()):
            raise ValueError("a sample has no examples or no units")
        if found.sha256 and not all(fits(found.sha256.get(name), kind) for name, kind in SHA256.items()):
            raise ValueError(f"sha256 is {short(found.sha256)}")
        return replace(found, config=options.with_older_values(found.config))


def typed(folder: Path) -> list[str] | None:
    """The options that were typed for the run in `folder`, as KEY=VALUE; None if it does not have them.

    Raises UsageError for a file of them that is broken.
    """
    path = folder / TYPED / "overrides.yaml"
    if not path.is_file():
        return None
    with explained((ValueError, OSError, yaml.YAMLError), str(path), "expected a list of options: remove it"):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise ValueError(f"it holds {short(found)}")
        return [*map(str, found)]


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON in one atomic step: the file is absent, old or complete."""
    write_atomically(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def metric_entries(run: Results) -> dict[str, Any]:
    """Metric -> its entry in the configuration of `run`: those of the task and of every attack."""
    found = dict(run.config["task"].get("metrics") or {})
    for attack in (run.config.get("attack") or {}).values():
        found |= attack.get("metrics") or {}
    return found


def attack_of(run: Results) -> dict[str, str]:
    """Metric -> the attack that it is of, of all metrics of attacks in the configuration of `run`."""
    attacks = (run.config.get("attack") or {}).items()
    return {name: attack for attack, given in attacks for name in given.get("metrics") or {}}


def attack_points(run: Results) -> Iterator[tuple[str, str, str, str, Mapping[str, float | None], bool]]:
    """Attack, model, branch, name and measures of each point of a run, and whether anything can be recovered there."""
    for attack, by_model in run.attacks.items():
        lost = by_model.get(UNINFORMATIVE, {})
        for model, branches in by_model.items():
            for branch, points in branches.items() if model != UNINFORMATIVE else ():
                for point, measures in points.items():
                    yield attack, model, branch, point, measures, point not in lost.get(branch, ())


def versions() -> dict[str, str]:
    """Package -> installed version, of Python and of the packages that numbers may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@functools.cache
def source_hash(folder: Path = Path(__file__).parent) -> str:
    """The SHA-256 of all source files below `folder`: equal hashes, equal code, with or without git."""
    return hashlib.sha256(json.dumps(hashes(folder, "*.py", "*.c")).encode()).hexdigest()


@functools.cache
def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The hash of the git commit of `folder`, followed by "+changes" if tracked files differ; None outside git.

    Each process asks git once.
    """
    try:
        head = check_output(["git", "-C", str(folder), "rev-parse", "HEAD"], stderr=DEVNULL, text=True).strip()
        changed = check_output(["git", "-C", str(folder), "status", "--porcelain", "-uno"], stderr=DEVNULL, text=True)
    except (CalledProcessError, FileNotFoundError):
        return None
    return head + ("+changes" if changed.strip() else "")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
