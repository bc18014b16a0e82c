"""The stage that tunes: trials of learning rate x gamma, one budget for every cell of an ablation.

A trial unlearns the target at a seed that no reported run uses and is measured on validation rows only. Each is cached
as one file, named by all that decides it: the seeds of a cell share them, a killed run goes on at the first missing.
"""

import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from filelock import Timeout
from transformers import set_seed

from soul_exp.artifacts.scores import VALIDATION, validate, validation_of_target
from soul_exp.build import Config, build, trial
from soul_exp.comparison import with_rates
from soul_exp.data import content_hash
from soul_exp.distributed.processes import launch
from soul_exp.errors import UsageError, counted
from soul_exp.files import locked, read_sealed, shared_folder, write_sealed
from soul_exp.options import leaves
from soul_exp.run import Run
from soul_exp.stages.process import end_process, start_process
from soul_exp.stages.selection import Trial, best_forgetting, lost
from soul_exp.stages.stage import Job, check_unchanged, fingerprint
from soul_exp.stages.unlearn import unlearned

log = logging.getLogger(__name__)

VERSION = 3  # raise it when a change to the code that trains or measures a trial changes its numbers
PARALLEL = 2  # trials side by side on a CPU: each has one thread, and the smallest machine has two cores


def tune(job: Job) -> Job:
    """`job` with the numbers that the rule of its run selects, and its trials, each `chosen` or not."""
    run, tuning, start = job.run, job.run.tuning, time.perf_counter()
    assert tuning is not None
    files = files_of(job.config, run)
    missing = [file for file in files if not _is_made(file[2])]
    if missing:
        _make(job, missing)
    trials = [_read(path, lr, gamma) for lr, gamma, path in files]
    target = validation_of_target(run, job.reasons)
    chosen = tuning.rule(trials, target)
    if chosen not in trials:
        raise UsageError(f"tune.rule returned {chosen!r}: expected one of the trials that it was given")
    is_ours = tuning.rule.func is best_forgetting
    why = lost(chosen, target, tuning.rule.keywords["keep"]) if is_ours else None
    notes = [f"tune: no trial kept enough, the chosen one the most ({why})"] if why else []
    log.info(
        "tune: %s (%d in the cache) in %.0f s, lr %g and gamma %g: %s",
        counted(len(trials), "trial"), len(trials) - len(missing), time.perf_counter() - start, chosen.lr, chosen.gamma,
        _outcome(chosen),
    )  # fmt: skip
    config = {**with_rates(job.config, chosen.lr, chosen.gamma), "tuned": str(tuning)}
    listed = [{**asdict(each), "chosen": each is chosen} for each in trials]
    chosen_run = build(config)
    check_unchanged(job.run.task.hashes, chosen_run.task)
    return replace(job, config=config, run=chosen_run, trials=listed, notes=[*job.notes, *notes])


def worker(rank: int, config: Config, trials: Sequence[tuple[float, float, Path]]) -> None:
    """One process's share of the trials: first those that no other works on, then those that another left undone."""
    run = build(config)
    device = start_process(run.compute, rank, seed=run.seed, attention_kernel=run.model.attention)
    for patience in (0, -1):  # seconds to wait for another process; -1: until it is done or dead
        for number, (lr, gamma, path) in enumerate(trials, start=1):
            with contextlib.suppress(Timeout), locked(Path(f"{path}.lock"), timeout=patience):
                if not _is_made(path):
                    write_sealed(path, asdict(_try(config, lr, gamma, device, f"trial {number} of {len(trials)}")))


def rank_worker(rank: int, config: Config, lr: float, gamma: float, path: Path) -> None:
    """One rank's share of one trial, under DeepSpeed or where processes work together."""
    run = build(config)
    device = start_process(run.compute, rank, seed=run.seed, attention_kernel=run.model.attention)
    made = _try(config, lr, gamma, device, "trial")
    if rank == 0:
        write_sealed(path, asdict(made))
    end_process()


def _make(job: Job, missing: Sequence[tuple[float, float, Path]]) -> None:
    """Carry out the trials whose files are missing."""
    compute, logs = job.run.compute, job.out / "ranks" / "tune"
    shared_folder(missing[0][2].parent)
    if not compute.alone:  # fresh processes each: an engine outlives its trainer
        for number, (lr, gamma, path) in enumerate(missing, start=1):
            with locked(Path(f"{path}.lock")):
                if not _is_made(path):
                    log.info("tune: trial %d of %d", number, len(missing))
                    launch(
                        rank_worker, job.config, lr, gamma, path,
                        processes=compute.processes, threads=compute.threads, logs=logs,
                    )  # fmt: skip
        return
    assert job.run.tuning is not None
    workers = job.run.tuning.workers or (PARALLEL if compute.device == "cpu" else 1)
    launch(
        worker, job.config, list(missing),
        processes=min(workers, len(missing)), threads=compute.threads, logs=logs, alone=True,
    )  # fmt: skip


def _try(config: Config, lr: float, gamma: float, device: str, label: str) -> Trial:
    run = build(trial(config, lr, gamma))
    set_seed(run.seed)
    with tempfile.TemporaryDirectory() as folder:  # no checkpoints: a killed trial starts again
        lm, outcome = unlearned(run, folder=Path(folder), label=label, device=device)
    for note in outcome.notes:
        log.info("%s: %s", label, note)
    validated = validate(run, lm, label)
    lost = outcome.diverged is None and all(value is None for value in validated.metrics.values())
    diverged = "the weights are not finite" if lost else outcome.diverged
    made = Trial(
        **{**vars(validated), "diverged": diverged},
        lr=lr, gamma=gamma, num_steps=outcome.num_steps, seconds=outcome.seconds,
    )  # fmt: skip
    log.info("%s: lr %g, gamma %g: %s (%.0f s)", label, lr, gamma, _outcome(made), outcome.seconds)
    return made


def files_of(config: Config, run: Run) -> list[tuple[float, float, Path]]:
    """Learning rate, gamma and file of each trial, named by all that decides it: options, data, versions, own code."""
    assert run.tuning is not None
    found = []
    for lr, gamma in run.tuning.grid:
        tried = trial(config, lr, gamma)
        key = [VERSION, fingerprint(tried, run), code_of([tried["optimizer"], tried["loss"]])]
        found.append((lr, gamma, run.cache / "trials" / f"{content_hash(key)}.json"))
    return found


def untried(config: Config, run: Run) -> bool:
    """Whether a trial of `run` is still to be made."""
    return run.tuning is not None and any(isinstance(read_sealed(path), str) for _, _, path in files_of(config, run))


def code_of(node: Any) -> str:
    """A hash of the file of each `_target_` below `node` that is not of this package, whose VERSION covers its own."""
    targets = (value for key, value in leaves(node, into_lists=True) if key.endswith("._target_"))
    modules = {resolve_name(target).__module__ for target in targets if not target.startswith("soul_exp.")}
    files = sorted({Path(str(sys.modules[module].__file__)) for module in modules})
    return content_hash([file.read_bytes().hex() for file in files])


def _is_made(path: Path) -> bool:
    found = read_sealed(path)
    if isinstance(found, str) and path.exists():
        log.warning("%s is damaged (%s): this trial is made again", path, found)
    return not isinstance(found, str)


def _read(path: Path, lr: float, gamma: float) -> Trial:
    """The trial in `path`. Raises UsageError if the file is not one of these numbers."""
    found = read_sealed(path)
    try:
        if isinstance(found, str):
            raise ValueError(found)
        made = Trial(**found)
        if (made.lr, made.gamma) != (lr, gamma):
            raise ValueError(f"it is of lr {made.lr:g} and gamma {made.gamma:g}, expected {lr:g} and {gamma:g}")
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a trial's file ({error}): remove it and run again") from error
    return made


def _outcome(trial: Trial) -> str:
    numbers = ", ".join(
        f"{name.removeprefix(VALIDATION).replace('_', ' ')} {'lost' if value is None else f'{value:.3g}'}"
        for name, value in trial.metrics.items()
    )
    ended = (("collapsed", trial.collapsed), ("diverged", trial.diverged))
    return "; ".join([f"validation {numbers}", *(f"{how}: {why}" for how, why in ended if why)])
