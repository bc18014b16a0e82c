"""The stage that attacks: may what was forgotten come back? Every compared model is attacked in the same way."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import Timeout

from soul_exp import results
from soul_exp.artifacts import attack_cache, measures
from soul_exp.artifacts.answer_cache import write_answers
from soul_exp.artifacts.scores import versions
from soul_exp.build import Config, build
from soul_exp.distributed.processes import launch
from soul_exp.errors import UsageError, counted
from soul_exp.files import complete_folder, hashes
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.run import Run
from soul_exp.stages.evaluate import WEIGHTS
from soul_exp.stages.process import start_process
from soul_exp.stages.stage import ATTACKS, LOSSES, MODEL, Job, check_unchanged
from soul_exp.stages.wandb_log import WandbLog

log = logging.getLogger(__name__)

Work = tuple[str, str, str]  # attack, branch, model


def attack(job: Job) -> Job:
    """Carry out the branches of all attacks that the cache lacks, and add what they found to the results of `job`."""
    run, start = job.run, time.perf_counter()
    previous = results.read(job.out)
    assert previous is not None
    lost = run.unlearns and "evaluate" in run.stages and not previous.samples  # its weights are not finite
    left_out = ("unlearned", results.UNMERGED) if lost else ()
    found = {name: attack_cache.attacked(run, name, unlearned_of(run, job.out)) for name in run.attacks}
    models = {name: {key: at for key, at in each.items() if key not in left_out} for name, each in found.items()}
    for each in models.values():
        _check_unchanged_models(previous, each)
    branches = [(name, branch) for name, made in run.attacks.items() for branch in made.branches()]
    parts = [(name, branch, model) for name, branch in branches for model in models[name]]
    folders = {part: attack_cache.folder_of(run, *part, models[part[0]][part[2]]) for part in parts}
    work = [part for part, folder in folders.items() if not attack_cache.is_made(folder)]
    if work:
        launch(
            worker, job.config, job.out, dict(run.task.hashes), work,
            processes=min(attack_cache.at_once(run), len(work)), threads=run.compute.threads,
            logs=job.out / "ranks" / "attack", alone=True,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    log.info("attack: %s (%d in the cache) in %.0f s", counted(len(parts), "part"), len(parts) - len(work), seconds)
    added = with_attacks(previous, job, {name: attack_cache.read(run, name, models[name]) for name in run.attacks})
    if lost:
        names = [name for metrics in run.attack_metrics.values() for name in metrics]
        null = dict.fromkeys(names, f"diverged: {previous.reason}")
        unlearned = {**added.metrics["unlearned"], **dict.fromkeys(names)}
        added = replace(added, metrics={**added.metrics, "unlearned": unlearned}, reasons={**added.reasons, **null})
    added = replace(added, seconds={**added.seconds, "attack": added.seconds.get("attack", 0.0) + seconds})
    results.write(job.out, added)
    WandbLog(run, job.config, job.out, job.out / LOSSES).finish(added)
    return job


def _check_unchanged_models(previous: results.Results, models: Mapping[str, Checkpoint]) -> None:
    """Raises UsageError unless the weights of `models` are those that the `previous` results are of."""
    for model, checkpoint in models.items():
        then = previous.sha256["models"].get(model)
        if then and hashes(Path(checkpoint.path), WEIGHTS) != then:
            raise UsageError(
                f"{checkpoint.path} has other weights than the {model} model that this run evaluated: put them back, "
                f"or type overwrite=true to run it anew"
            )


def carried_over(new: results.Results, earlier: results.Results) -> results.Results:
    """`new` results of the same models with what attacks added to the `earlier` ones."""
    names = results.attack_of(earlier)

    def of_attacks(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key.rpartition(".")[2] in names}

    found = measures.AttackMeasures(
        metrics={model: of_attacks(values) for model, values in earlier.metrics.items()},
        reasons=of_attacks(earlier.reasons),
        intervals={model: of_attacks(values) for model, values in earlier.intervals.items()},
        no_interval=of_attacks(earlier.no_interval),
        attacks=earlier.attacks,
        unit_values=earlier.unit_values,
    )
    return replace(
        measures.with_attacks(new, found),
        config={**new.config, "attack": {**earlier.config["attack"], **new.config["attack"]}},
        metric_versions={**new.metric_versions, **of_attacks(earlier.metric_versions)},
        sha256={**new.sha256, **{key: value for key, value in earlier.sha256.items() if key.startswith("attack")}},
        seconds={**new.seconds, "attack": earlier.seconds.get("attack", 0.0)},
    )


def unlearned_of(run: Run, out: Path) -> Checkpoint:
    """Where the model is that a run in `out` unlearns or measures."""
    return Checkpoint(str(out / MODEL)) if run.unlearns else run.model.checkpoint


def worker(rank: int, config: Config, out: Path, data: Mapping[str, str], work: Sequence[Work]) -> None:
    """One process's share: first the branches that no other works on, then those that another left undone."""
    run = build(config)
    check_unchanged(data, run.task)
    compute = replace(run.compute, processes=1, deepspeed=None)  # of each process its own models, complete
    device = start_process(compute, rank, seed=run.seed, attention_kernel=run.model.attention)
    models = {name: attack_cache.attacked(run, name, unlearned_of(run, out)) for name in run.attacks}
    for wait in (False, True):
        for number, (name, branch, model) in enumerate(work, start=1):
            label = f"attack {number} of {len(work)}: {name} {branch}, {model}"
            with contextlib.suppress(Timeout):
                attack_cache.make(run, name, branch, model, models[name][model], device=device, label=label, wait=wait)


def with_attacks(previous: results.Results, job: Job, records: Mapping[str, attack_cache.Records]) -> results.Results:
    """`previous` with what `records` say of each attack, which are written here: numbers come from nothing else."""
    run = job.run
    for name, by_model in records.items():
        with complete_folder(job.out / ATTACKS / name) as partial:
            for model, branches in by_model.items():
                for branch, points in branches.items():
                    write_answers(partial / model / branch, points)
    added = {
        key: value for metrics in run.attack_metrics.values() for key, value in versions(metrics, run.task).items()
    }
    return replace(
        measures.with_attacks(previous, measures.attack_measures(run.attack_metrics, records, run.seed)),
        config={**previous.config, "attack": {**previous.config["attack"], **job.config["attack"]}},
        metric_versions={**previous.metric_versions, **added},
        sha256={
            **previous.sha256,
            "attacks": hashes(job.out / ATTACKS, "*"),
            "attack_code": {**previous.sha256.get("attack_code", {}), **dict.fromkeys(records, results.source_hash())},
        },
    )
