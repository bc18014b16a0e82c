"""The story of one run: check, prepare, tune where configured, unlearn, evaluate, results."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from soul_exp import results
from soul_exp.artifacts import prepared_models, scores, texts
from soul_exp.build import Config, build, tried
from soul_exp.checks import disk
from soul_exp.checks.check import check
from soul_exp.comparison import compared, differences
from soul_exp.distributed import interrupts
from soul_exp.distributed.join import WorkerGroup
from soul_exp.distributed.output import note
from soul_exp.distributed.processes import launch
from soul_exp.errors import UsageError
from soul_exp.files import explain_full_disk, hashes, locked
from soul_exp.options import ADDED_DATA
from soul_exp.results import Results
from soul_exp.run import Run
from soul_exp.stages import LAST_STAGES, RANK_STAGES, STAGES, prepare
from soul_exp.stages.attack import carried_over
from soul_exp.stages.process import end_process, start_process
from soul_exp.stages.stage import (
    ATTACKS,
    CHECKPOINTS,
    LOSSES,
    MODEL,
    RECORDS,
    Job,
    RankJob,
    check_unchanged,
    fingerprint,
)
from soul_exp.stages.trajectory import NAME as TRAJECTORY
from soul_exp.stages.wandb_log import WandbLog
from soul_exp.training import checkpoints

log = logging.getLogger(__name__)

REPEATS = "the same configuration has finished in {}: this run repeats it, and tables count both once"


def run(
    config: Config, out: Path, group: WorkerGroup | None = None, begin: Callable[[str], None] = log.info
) -> Results | None:
    """Carry out the stages of `config` in `out`; returns the results, or None where the stages end before them.

    Every stage starts workers of its own; where a `group` exists, it is the one that unlearns. `begin` is called
    with the disk space that the run needs, as a message, under the run's lock and before anything in `out` changes; it
    is not called where there is nothing to do or a check fails. Without stages nothing is written, not even a lock.
    """
    interrupts.safe_point()
    checked = check(config, out)
    interrupts.safe_point()
    works = bool(checked.run.stages)
    if works:
        out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as guards:
        if works:  # a second start of the same run waits, and then finds it finished
            guards.enter_context(locked(out / ".lock"))
            guards.enter_context(explain_full_disk(out, checked.run.cache))
        interrupts.safe_point()
        previous = finished(config, checked.run, out)
        left = unattacked(previous, config, out) if previous is not None else []
        if previous is not None and works and not left:
            log.info("finished before, skipped: %s", out)
            checkpoints.remove_all(out / CHECKPOINTS)  # it may have been killed before it could do that
            return previous
        replaced = checked.run.overwrite and (out / results.NAME).exists()
        cached = [*scores.cached_folders(checked.run)]
        job = Job(config=config, run=checked.run, out=out, reasons=checked.reasons, notes=checked.notes, cached=cached)
        if previous is None and not replaced:  # else the checkpoint goes too
            _check_engine(job)
        for text in (*checked.run.task.notes, *checked.notes):
            note(text)
        if previous is None and (other := finished_elsewhere(config, checked.run, out)):
            note(REPEATS.format(other))
        if not works:
            log.info("checked, nothing to run (stages=[])%s: %s", "; finished before" if previous else "", out)
            return None
        begin(disk.run_sentence(checked.need, out, checked.run.cache))
        if previous is not None:
            log.info("finished before, but for %s: %s", ", ".join(f"attack={name}" for name in left), out)
            job = prepare.prepare(replace(job, run=_with_attacks(job.run, left)))  # its models may be gone
        else:
            earlier = None if replaced or checked.run.overwrite else results.read(out)
            _clear(checked.run, out, replaced)
            job = _run_stages(job, group)
            now = results.read(out)
            if earlier is not None and earlier.attacks and now is not None and not now.attacks:
                results.write(out, carried_over(now, earlier))
        for stage in LAST_STAGES:
            if stage.wanted(job.run):
                job = stage.function(job)
        return results.read(out)


def _run_stages(job: Job, group: WorkerGroup | None) -> Job:
    """Carry out the stages of `job`: those that hold the model by `group`, or in processes of their own."""
    for stage in STAGES:
        if stage.wanted(job.run):
            start = time.perf_counter()
            job = stage.function(job)
            job = replace(job, seconds={**job.seconds, stage.name: time.perf_counter() - start})
    if not any(stage.wanted(job.run) for stage in RANK_STAGES):
        return job
    _check_engine(job)
    decided = fingerprint(job.config, job.run)
    if any(folder.name != decided for folder in (job.out / CHECKPOINTS).glob("*")):
        log.info("%s holds checkpoints of other settings, data or version: not used", job.out / CHECKPOINTS)
    plan = {name: value for name, value in vars(job).items() if name != "run"} | {"fingerprint": decided}
    plan["hashes"] = dict(job.run.task.hashes)
    compute, logs = job.run.compute, job.out / "ranks" / "unlearn"
    if group is not None:
        group.run_on_all(worker, plan, compute=vars(compute), logs=logs)
    else:
        launch(worker, plan, processes=compute.processes, threads=compute.threads, logs=logs, alone=compute.alone)
    return job


def worker(rank: int, plan: dict[str, Any]) -> None:
    """One rank's share: the stages that hold the model, in order; `plan`: a Job's fields and its data's hashes."""
    run, out, plan = build(plan["config"]), plan["out"], dict(plan)
    check_unchanged(plan.pop("hashes"), run.task)
    with explain_full_disk(out, clear=lambda: checkpoints.remove_unmarked(out / CHECKPOINTS)):
        device = start_process(run.compute, rank, seed=run.seed, attention_kernel=run.model.attention)
        if not texts.are_here(run):  # else they have been checked
            texts.check(run, run.parts if run.unlearns else ())
        wandb_log = WandbLog(run, plan["config"], out, out / LOSSES) if rank == 0 else None
        job = RankJob(**plan, run=run, device=device, wandb_log=wandb_log)
        for stage in RANK_STAGES:
            if stage.wanted(run):
                job = stage.function(job)
        if wandb_log is not None:
            wandb_log.finish()  # where no stage has results
        end_process()


def _clear(run: Run, out: Path, replaced: bool) -> None:
    """Remove what a run that does not go on would leave beside its own: old numbers never stand beside a new model.

    `replaced`: whether finished results are there, to be replaced.
    """
    for rest in out.glob(f".{results.NAME}.*"):  # of a run that was killed while it wrote
        rest.unlink()
    if replaced:
        (out / results.NAME).unlink()
    if replaced or run.resume == "restart":
        checkpoints.remove_all(out / CHECKPOINTS)
    if run.overwrite or run.resume == "restart":
        for name in (RECORDS, ATTACKS):
            shutil.rmtree(out / name, ignore_errors=True)
        if run.unlearns:  # else model.path may well be this folder's
            shutil.rmtree(out / MODEL, ignore_errors=True)
            for name in (LOSSES, TRAJECTORY):
                (out / name).unlink(missing_ok=True)


def _check_engine(job: Job) -> None:
    """Raises UsageError if this run's checkpoint is of another engine, or unsafe to read, unless `resume` allows it."""
    compute = job.run.compute
    engine = checkpoints.engine_of(compute.name, compute.processes, compute.deepspeed)
    found = checkpoints.newest_marked(job.out / CHECKPOINTS / fingerprint(job.config, job.run))
    if found and job.run.resume == "exact" and (reason := checkpoints.obstacle(job.out, found, engine)):
        raise UsageError(reason)


def finished(config: Config, run: Run, out: Path) -> Results | None:
    """The results in `out` if they are this configuration's. Raises UsageError if they are another's."""
    previous = None if run.overwrite else results.read(out)
    if previous is None:
        return None
    if differing := _differing(previous, config, prepared_models.data_hashes(run)):
        raise UsageError(
            f"{out} holds finished results of another configuration ({', '.join(differing[:6])} differ): "
            f"type overwrite=true to replace them, or name=<another name>"
        )
    if _system_prompts(config) and "input_based" not in previous.metrics:
        return None  # its model stands; the metrics are taken anew, with that row
    more = config["retrained"]["seeds"] > previous.config["retrained"]["seeds"]
    is_older = not previous.samples  # written before there was that option: it stands as it is
    if more and not is_older and any(map(prepared_models.number_of, prepared_models.checkpoints(run))):
        return None
    return previous


def _with_attacks(run: Run, names: Sequence[str]) -> Run:
    """`run` with these of its attacks only."""
    of = {name: run.attack_metrics[name] for name in names}
    return replace(run, attacks={name: run.attacks[name] for name in names}, attack_metrics=of)


def unattacked(previous: Results, config: Config, out: Path) -> list[str]:
    """The attacks of `config` that `previous` results, in `out`, do not have, or have with other options or records."""
    stated = previous.sha256.get("attacks", {})
    wanted = config["attack"] if "attack" in config["stages"] else {}

    def is_here(name: str) -> bool:
        there = {key.removeprefix(f"{name}/"): digest for key, digest in stated.items() if key.startswith(f"{name}/")}
        same = previous.config["attack"].get(name) == wanted[name]
        return name in previous.attacks and same and hashes(out / ATTACKS / name, "*") == there

    return [name for name in wanted if not is_here(name)]


def finished_elsewhere(config: Config, run: Run, out: Path) -> Path | None:
    """A folder beside `out`, or elsewhere in runs/, whose finished results are those of this configuration and seed."""
    hashes = prepared_models.data_hashes(run)
    inside = f"{out.name}/{results.NAME}" if out.name.startswith(results.REQUEST) else results.NAME
    for path in sorted({*out.parent.glob(f"*/{results.NAME}"), *Path("runs").absolute().glob(f"*/*/{inside}")}):
        with suppress(UsageError):  # broken, which matters to whoever reads that folder
            previous = results.read(path.parent) if path.parent != out else None
            same = previous is not None and previous.choices == vars(run.choices)
            if previous is not None and same and not _differing(previous, config, hashes):
                return Path(os.path.relpath(path.parent))
    return None


def _differing(previous: Results, config: Config, hashes: Mapping[str, str]) -> list[str]:
    """The options and data in which `previous` results differ from those of `config` with data of these `hashes`."""
    before = [(trial["lr"], trial["gamma"]) for trial in previous.trials]
    found = differences(compared(previous.config, before), compared(config, tried(config)))
    prompts, wanted = _system_prompts(previous.config), _system_prompts(config)
    found += ["task.system_prompt"] if prompts and wanted and prompts != wanted else []
    then = previous.data_hashes
    changed = [name for name in hashes if then.get(name) != hashes[name] and (name in then or name not in ADDED_DATA)]
    if prepared_models.TRAINING in changed:
        version = then.get(prepared_models.TRAINING, "3 or earlier")
        found.insert(0, f"{prepared_models.TRAINING}: {version} before, {prepared_models.VERSION} now")
    return found + [f"data {name}" for name in changed if name != prepared_models.TRAINING]


def _system_prompts(config: Config) -> tuple[str, str] | None:
    """What decides the prompts of the input-based baseline; None where it is not measured."""
    given = config["task"]["system_prompt"] if config.get("input_based") else None
    return None if given is None else (given, config["model"]["template"]["system"])
