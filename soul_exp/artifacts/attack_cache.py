"""What attacks found out about a model, cached by what decides it: sweeps share the original and the retrained one."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soul_exp.artifacts import answer_cache, prepared_models
from soul_exp.artifacts.answer_cache import Measured, identity_of, read_answers, write_answers
from soul_exp.artifacts.code import code_hash
from soul_exp.attacks import Target
from soul_exp.data import content_hash
from soul_exp.distributed import zero3
from soul_exp.errors import UsageError
from soul_exp.files import is_intact, locked, remove, shared_folder
from soul_exp.models import loading, lora
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import LanguageModel
from soul_exp.results import COMPARED, UNMERGED
from soul_exp.run import Run
from soul_exp.training.checkpoints import COMPLETE

log = logging.getLogger(__name__)

PARALLEL = 2  # of models from scratch, on the smallest machine's two cores
CODE = (  # all that may decide a point
    *(*answer_cache.CODE, "attacks/*.py", "losses/*.py", "metrics/*.py", "optim/*.py", "optim/kernels/*.py"),
    *("optim/kernels/*.c", "tasks/*.py", "tasks/embedded/*.py", "tasks/sources/*.py", "training/*.py"),
)
Records = Mapping[str, Mapping[str, Measured]]  # model, a key of `attacked` -> branch -> point -> what it answers


def attacked(run: Run, attack: str, unlearned: Checkpoint) -> dict[str, Checkpoint]:
    """Key of each compared model that has weights and answers without a system prompt -> where these are.

    An unlearned adapter is attacked merged and, where the attack takes that, unmerged too.
    """
    weights = prepared_models.checkpoints(run)
    is_apart = run.attacks[attack].takes_adapter and lora.is_adapter(unlearned.path)
    apart = {UNMERGED: unlearned} if is_apart else {}
    return apart | {
        each.key: unlearned if each.role is None else weights[each.role]
        for each in COMPARED
        if not each.with_system_prompt and (each.role is None or prepared_models.exists(run, each.role))
    }


def at_once(run: Run) -> int:
    """How many processes attack side by side; each holds complete models, of one thread on a CPU."""
    small = run.compute.device == "cpu" and run.model.scratch is not None and not run.model.path
    return max(run.compute.processes, PARALLEL if small else 1)


def folder_of(run: Run, attack: str, branch: str, model: str, checkpoint: Checkpoint) -> Path:
    """The cache folder of the points of one branch of an attack on the `model`, a key of `attacked`."""
    made, hashes = run.attacks[attack], run.task.hashes
    key: dict[str, Any] = {"code": code_hash(CODE), **identity_of(run, checkpoint), "attack": made.identity(branch)}
    if model == UNMERGED:
        key["merged"] = False
    key["rows"] = {name: hashes.get(name) for name in made.reads()}
    key["content"] = made.content(run.task)
    key["units"] = {name: probe.units for name, probe in run.task.probes.items() if f"probe.{name}" in made.reads()}
    if made.reads_original and (original := prepared_models.checkpoints(run).get("target")):
        key["original"] = original.identity()
    return run.cache / "attacks" / content_hash(key)


def is_made(folder: Path) -> bool:
    return folder.is_dir() and is_intact(folder / COMPLETE)


def make(
    run: Run, attack: str, branch: str, model: str, checkpoint: Checkpoint, *, device: str, label: str, wait: bool
) -> None:
    """Carry out one branch on the model in `checkpoint`, unless the cache has it, or another process makes it.

    Raises filelock.Timeout for the latter, unless it should `wait`.
    """
    folder = folder_of(run, attack, branch, model, checkpoint)
    shared_folder(folder.parent)
    with locked(Path(f"{folder}.lock"), timeout=-1 if wait else 0):
        if is_made(folder):
            return
        remove(folder)  # it is damaged, or not there
        original = prepared_models.checkpoints(run).get("target")

        def load(from_: Checkpoint | None) -> LanguageModel:
            assert from_ is not None
            lm = prepared_models.load(run.model, from_)
            if lora.is_adapter(from_.path) and model != UNMERGED:
                lm = lm.with_model(lora.merged(lm.model))
            if name := zero3.nonfinite_weight(lm.model):
                raise UsageError(f"{from_.path} has weights that are not finite numbers ({name}): nothing to attack")
            lora.train_adapter(lm.model)
            loading.move(lm.model, device)
            return lm

        target = Target(
            load=lambda: load(checkpoint), original=lambda: load(original), task=run.task, device=device,
            batch_size=run.evaluation.batch_size, label=label,
        )  # fmt: skip
        write_answers(folder, run.attacks[attack].points(target, branch))


def read(run: Run, attack: str, models: Mapping[str, Checkpoint]) -> dict[str, dict[str, Measured]]:
    """The points of `attack` on each of `models`, all of which are in the cache."""
    branches = run.attacks[attack].branches()
    return {
        model: {branch: read_answers(folder_of(run, attack, branch, model, at)) for branch in branches}
        for model, at in models.items()
    }
