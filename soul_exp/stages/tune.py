"""The same budget for every cell of an ablation: trials of learning rate x gamma, judged on the validation part.

A trial unlearns the target at a seed that no reported run uses and is measured on validation rows only. Each is cached
as one file, named by all that decides it: the seeds of a cell share them, a killed run goes on at the first missing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra.utils
from filelock import FileLock, Timeout
from hydra.errors import InstantiationException
from transformers import set_seed

from soul_exp import build
from soul_exp.artifacts.scores import FORGET_QUALITY, RETAIN, VALIDATION, known_answers, measure, validate
from soul_exp.checks.check import Checked
from soul_exp.data import content_hash
from soul_exp.distributed.processes import launch
from soul_exp.errors import UsageError
from soul_exp.files import read_sealed, write_sealed
from soul_exp.ranges import COUNT, POSITIVE, SEED, Number
from soul_exp.stages import unlearn
from soul_exp.tasks.task import Task

log = logging.getLogger(__name__)

VERSION = 1  # raise it when a change to this module changes the numbers of a trial
CODE = (  # what trains and what measures a trial
    *("artifacts/*.py", "binding.py", "build.py", "data.py", "distributed/*.py", "evaluation/*.py", "losses/*.py"),
    *("metrics/*.py", "models/*.py", "optim/**/*.py", "optim/**/*.c", "stages/unlearn.py", "tasks/**/*.py"),
    *("training/*.py",),
)
PARALLEL = 2  # trials side by side on a CPU: each has one thread, and the smallest machine has two cores


@dataclass(frozen=True)
class Trial:
    """What one learning rate and one gamma came to on the validation part; a metric is None where it was lost."""

    lr: float
    gamma: float
    metrics: Mapping[str, float | None]
    diverged: str | None  # why, or None
    num_steps: int
    seconds: float  # of unlearning

    @property
    def sound(self) -> bool:
        return self.diverged is None and None not in (self.metrics.get(FORGET_QUALITY), self.metrics.get(RETAIN))

    def at(self, metric: str) -> float:
        value = self.metrics[metric]
        assert value is not None
        return value


def best_forgetting(trials: Sequence[Trial], start: Mapping[str, float], *, keep: float) -> Trial:
    """The largest validation log10 forget quality among trials that keep the target's validation retain probability.

    `keep` is the share of it (`start`, the target's metrics) that is enough. A trial that diverged does not count. Ties
    go to the smaller learning rate, then to the gamma named first. If none keeps enough: the one that keeps most; if
    all diverged: the smallest learning rate, so that the run tells it.
    """
    by_lr = sorted(trials, key=lambda trial: trial.lr)
    sound = [trial for trial in by_lr if trial.sound]
    keeping = [trial for trial in sound if trial.at(RETAIN) >= keep * start[RETAIN]]
    if keeping:
        return max(keeping, key=lambda trial: trial.at(FORGET_QUALITY))
    return max(sound, key=lambda trial: trial.at(RETAIN)) if sound else by_lr[0]


def is_wanted(config: Mapping[str, Any]) -> bool:
    """Whether this run chooses its learning rate and gamma by trials."""
    return bool(config["tune"]) and ("unlearn" in config["stages"] or not config["stages"])


def grid(config: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The (learning rate, gamma) of each trial: factors of the optimizer's own rate, and gammas common to all cells."""
    if not is_wanted(config):
        return []
    rates = [float(f"{factor * config['optimizer']['lr']:.6g}") for factor in config["tune"]["lr"]]
    return [(rate, float(gamma)) for rate in rates for gamma in config["tune"]["gamma"]]


def at(config: Mapping[str, Any], lr: Any, gamma: Any) -> dict[str, Any]:
    """`config` with this learning rate and this gamma."""
    return {
        **config,
        "optimizer": {**config["optimizer"], "lr": lr},
        "loss": {**config["loss"], "gamma": gamma},
    }


def check_tune(config: Mapping[str, Any], checked: Checked) -> None:
    """Raises UsageError at the first thing in `config["tune"]` that cannot work."""
    if not is_wanted(config):
        return
    settings: Mapping[str, Any] = config["tune"]
    absent = [key for key in ("seed", "lr", "gamma", "rule") if settings.get(key) is None]
    if absent:
        raise UsageError(f"tune.{absent[0]} is missing: choose a preset that states it, as experiment=ablation_rho")
    for key, number in (("lr", POSITIVE), ("gamma", Number(0))):
        values = settings[key]
        if not isinstance(values, list) or not values or not all(map(number.fits, values)):
            raise UsageError(f"tune.{key}={values}: expected a list, each {number.expected()}")
        if len(set(values)) < len(values):
            raise UsageError(f"tune.{key}={values}: a value stands there twice, remove one")
    for key, number in (("seed", SEED), ("workers", COUNT)):
        value = settings.get(key)
        if not (number.fits(value) or (value is None and key == "workers")):
            raise UsageError(f"tune.{key}={value}: expected {number.expected()}")
    if settings["seed"] == config["seed"]:
        raise UsageError(f"tune.seed={settings['seed']} is the run's own seed: change tune.seed")
    if not POSITIVE.fits(config["optimizer"].get("lr")):
        raise UsageError(f"optimizer={config['choices']['optimizer']} states no lr: give optimizer.lr")
    if config["loss"].get("retain_term") is None:
        raise UsageError(f"loss={config['choices']['loss']} has no retain term, so no gamma: choose another loss")
    if config["stages"] and "prepare" not in config["stages"]:
        raise UsageError(f"stages={config['stages']}: trials are judged against prepared models, add prepare to stages")
    for metric in (FORGET_QUALITY, RETAIN):
        if metric not in checked.metrics:
            raise UsageError(f"tune: task={config['choices']['task']} does not report {metric}: choose task=tofu")
        if metric in checked.reasons:
            raise UsageError(f"tune: {metric} cannot be had: {checked.reasons[metric]}")
    words(config)


def words(config: Mapping[str, Any]) -> str:
    """On what and how this configuration is tuned, in one sentence: for results and the captions of tables."""
    settings = config["tune"]
    rule = _rule(config)
    said = (inspect.getdoc(rule.func) or rule.func.__name__).splitlines()[0].rstrip(".")
    constants = ", ".join(f"{key}={value}" for key, value in rule.keywords.items())
    return (
        f"validation part, {len(grid(config))} trials a cell ({len(settings['lr'])} learning rates x "
        f"{len(settings['gamma'])} gammas, seed {settings['seed']}): {said[0].lower()}{said[1:]} ({constants})"
    )


def tuned(
    config: Mapping[str, Any], checked: Checked, fingerprint: Callable[[Mapping[str, Any], Checked], str], logs: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`config` with the numbers that its rule chose, and the trials, each `chosen` or not.

    `fingerprint` hashes all of a configuration that decides numbers.
    """
    task = checked.task
    places = [(lr, gamma, str(_place(config, lr, gamma, checked, fingerprint))) for lr, gamma in grid(config)]
    missing = [place for place in places if not _is_made(Path(place[2]))]
    start = time.perf_counter()
    if missing:
        _make(config, missing, logs)
    trials = [_read(Path(path), lr, gamma) for lr, gamma, path in places]
    known = known_answers(config, task)
    start_metrics = {
        name: measure(metric, known["original"], known["retrained"])
        for name, metric in checked.metrics.items()
        if name.startswith(VALIDATION) and name not in checked.reasons
    }
    chosen = _rule(config)(trials, start_metrics)
    if chosen not in trials:
        raise UsageError(f"tune.rule returned {chosen!r}: expected one of the trials that it was given")
    log.info(
        "tune: %d trials (%d in the cache) in %.0f s, lr %g and gamma %g: %s",
        len(trials), len(trials) - len(missing), time.perf_counter() - start, chosen.lr, chosen.gamma, _told(chosen),
    )  # fmt: skip
    config = {**at(config, chosen.lr, chosen.gamma), "tuned": words(config)}
    return config, [{**asdict(trial), "chosen": trial is chosen} for trial in trials]


def worker(rank: int, config: Mapping[str, Any], trials: Sequence[tuple[float, float, str]]) -> None:
    """One process's share of the trials: first those that nobody is at, then those that another process left undone."""
    device = unlearn.start_process(config, rank)
    task = build.build_task(config)
    for patience in (0, -1):  # seconds to wait for another process; -1: until it is done or dead
        for number, (lr, gamma, path) in enumerate(trials, start=1):
            with contextlib.suppress(Timeout), FileLock(f"{path}.lock", timeout=patience):
                if not _is_made(Path(path)):
                    trial = _trial(config, task, lr, gamma, device, f"trial {number} of {len(trials)}")
                    write_sealed(Path(path), asdict(trial))


def rank_worker(rank: int, config: Mapping[str, Any], lr: float, gamma: float, path: str) -> None:
    """One rank's share of one trial, under DeepSpeed or where processes work together."""
    device = unlearn.start_process(config, rank)
    trial = _trial(config, build.build_task(config), lr, gamma, device, "trial")
    if rank == 0:
        write_sealed(Path(path), asdict(trial))
    unlearn.end_process()


def _make(config: Mapping[str, Any], missing: Sequence[tuple[float, float, str]], logs: Path) -> None:
    """Carry out the trials whose files are missing."""
    compute = config["compute"]
    Path(missing[0][2]).parent.mkdir(parents=True, exist_ok=True)
    if compute["deepspeed"] or compute["processes"] > 1:  # fresh processes each: an engine outlives its trainer
        for number, (lr, gamma, path) in enumerate(missing, start=1):
            with FileLock(f"{path}.lock"):
                if not _is_made(Path(path)):
                    log.info("tune: trial %d of %d", number, len(missing))
                    launch(
                        rank_worker, config, lr, gamma, path,
                        processes=compute["processes"], threads=compute["threads"], logs=logs,
                    )  # fmt: skip
        return
    workers = config["tune"].get("workers") or (PARALLEL if compute["device"] == "cpu" else 1)
    launch(
        worker, config, list(missing),
        processes=min(workers, len(missing)), threads=compute["threads"], logs=logs, alone=True,
    )  # fmt: skip


def _trial(config: Mapping[str, Any], task: Task, lr: float, gamma: float, device: str, label: str) -> Trial:
    config = _trial_config(config, lr, gamma)
    set_seed(config["seed"])
    with tempfile.TemporaryDirectory() as folder:  # no checkpoints: a killed trial starts again
        subject, outcome = unlearn.trained(config, task, folder=Path(folder), label=label, device=device)
    measured = validate(config, task, subject, label)
    lost = outcome.diverged is None and all(value is None for value in measured.values())
    diverged = "the weights are not finite" if lost else outcome.diverged
    trial = Trial(lr, gamma, measured, diverged, outcome.num_steps, outcome.seconds)
    log.info("%s: lr %g, gamma %g: %s (%.0f s)", label, lr, gamma, _told(trial), outcome.seconds)
    return trial


def _trial_config(config: Mapping[str, Any], lr: float, gamma: float) -> dict[str, Any]:
    """The configuration of one trial: of the run's, all but the seed and what is to be tuned."""
    seed = config["tune"]["seed"]
    given = at(config, lr, gamma)
    return {
        **given,
        "seed": seed,
        "optimizer": _seeded(given["optimizer"], seed),
        "loss": _seeded(given["loss"], seed),
        "train": {**given["train"], "save_steps": None},
        "tune": None,
        "tuned": None,
    }


def _seeded(node: Any, seed: int) -> Any:
    """`node` with `seed` under every key of that name: what draws numbers has been given the run's."""
    if not isinstance(node, Mapping):
        return node
    return {key: seed if key == "seed" else _seeded(value, seed) for key, value in node.items()}


def _place(
    config: Mapping[str, Any],
    lr: float,
    gamma: float,
    checked: Checked,
    fingerprint: Callable[[Mapping[str, Any], Checked], str],
) -> Path:
    """The file of one trial, named by everything that decides it: its configuration, its data and the code."""
    trial = {**_trial_config(config, lr, gamma), "evaluate": {}}
    key = [VERSION, fingerprint(trial, checked), _code([config["optimizer"], config["loss"]])]
    return Path(config["cache"]) / "trials" / f"{content_hash(key)}.json"


def _code(node: Any) -> str:
    """A hash of the code that trains, and of the file of each `_target_` below `node`: no edit inherits old trials."""
    here = Path(__file__).parents[1]
    ours = [file for pattern in CODE for file in sorted(here.glob(pattern))]
    return content_hash([file.read_bytes().hex() for file in [*ours, *sorted(set(_files(node)))]])


def _files(node: Any) -> Iterator[Path]:
    if isinstance(node, list):
        for inner in node:
            yield from _files(inner)
    elif isinstance(node, Mapping):
        yield from _files(list(node.values()))
        if "_target_" in node:
            yield Path(str(sys.modules[hydra.utils.get_object(node["_target_"]).__module__].__file__))


def _is_made(path: Path) -> bool:
    found = read_sealed(path)
    if isinstance(found, str) and path.exists():
        log.warning("%s is damaged (%s): this trial is made again", path, found)
    return not isinstance(found, str)


def _content(path: Path) -> dict[str, Any]:
    found = read_sealed(path)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _read(path: Path, lr: float, gamma: float) -> Trial:
    """The trial in `path`. Raises UsageError if the file is not one of these numbers."""
    try:
        trial = Trial(**_content(path))
        if (trial.lr, trial.gamma) != (lr, gamma):
            raise ValueError(f"it is of lr {trial.lr:g} and gamma {trial.gamma:g}, expected {lr:g} and {gamma:g}")
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a trial's file ({error}): remove it and run again") from error
    return trial


def _rule(config: Mapping[str, Any]) -> functools.partial[Trial]:
    """The rule, with its constants. Raises UsageError if it is not a function with all of them."""
    try:
        rule = hydra.utils.instantiate(config["tune"]["rule"], _convert_="all")
        inspect.signature(rule).bind([], {})
    except (InstantiationException, TypeError, ValueError) as error:
        raise UsageError(f"tune.rule: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(rule, functools.partial):
        raise UsageError(f"tune.rule: found {type(rule).__name__}, expected a function with _partial_: true")
    return rule


def _told(trial: Trial) -> str:
    numbers = ", ".join(
        f"{name.removeprefix(VALIDATION).replace('_', ' ')} {'lost' if value is None else f'{value:.3g}'}"
        for name, value in trial.metrics.items()
    )
    return f"validation {numbers}" + (f"; diverged: {trial.diverged}" if trial.diverged else "")
