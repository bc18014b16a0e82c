"""Everything that can be known before work starts: a sentence an error; why a metric cannot be had."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra.utils
import torch

from soul_exp import build
from soul_exp.artifacts import answer_cache, prepared_models
from soul_exp.artifacts.scores import FORGET_QUALITY, RETAIN
from soul_exp.build import build_optimizer, parts_of_run
from soul_exp.checks import availability, disk
from soul_exp.checks.disk import Need
from soul_exp.checks.optimizer import check_optimizer, check_precision
from soul_exp.checks.options import check_options
from soul_exp.distributed.environment import launch_environment
from soul_exp.errors import UsageError, built
from soul_exp.evaluation import lm_eval_suite
from soul_exp.losses import Objective
from soul_exp.metrics.answers import Answers
from soul_exp.models import attention, checking, loading, lora, scratch, vocabulary
from soul_exp.models.layers import layer_of, layers_of, recomputing
from soul_exp.models.lora import Lora
from soul_exp.tasks.task import Task
from soul_exp.training.schedule import Schedule

STAGES = ("prepare", "unlearn", "evaluate")
RESUME = ("exact", "weights", "restart")
FREE_BYTES = 200 * 2**20  # a tiny run's folder and its prepared models, with room to spare


@dataclass(frozen=True)
class Checked:
    """What the checks built on the way: the task, the metrics to report, and why some of them will be null."""

    task: Task
    metrics: Mapping[str, Callable[..., float]]
    reasons: Mapping[str, str]  # metric -> why it cannot be had
    retrained_records: Mapping[str, Answers] | None  # answers given as a file
    need: Need | None = None  # what the run will write to disk; None: unknown


def check(config: Mapping[str, Any], out: Path) -> Checked:
    """Raises UsageError at the first thing in `config` that cannot work."""
    check_options(config)
    stages = config["stages"]
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise UsageError(f"stages={stages}: {unknown[0]!r} is unknown, choose from [{', '.join(STAGES)}]")
    if config["save"] not in ("final", "best", "none"):
        raise UsageError(f"save={config['save']} is unknown: choose final, best or none")
    if config["resume"] not in RESUME:
        raise UsageError(f"resume={config['resume']} is unknown: choose exact, weights or restart")
    if config["wandb"]["mode"] not in ("offline", "online", "disabled"):
        raise UsageError(f"wandb.mode={config['wandb']['mode']} is unknown: choose offline, online or disabled")
    if config["wandb"]["mode"] == "online" and not _has_wandb_key():
        raise UsageError("wandb.mode=online needs a key: export WANDB_API_KEY=<your key>, or type wandb login once")
    for folder, option in ((out, "the run's folder"), (Path(config["cache"]), "cache")):
        _check_writable(folder, option)
    _check_compute(config["compute"], bool(config["tune"]))
    task = built(lambda: build.build_task(config), "task")
    objective = built(lambda: hydra.utils.instantiate(config["loss"], _convert_="all"), "loss")
    check_precision(config)
    attention.check(config["model"]["attention"], config["compute"]["device"], config["model"]["dtype"])
    _check_layers(config)
    optimizer = built(lambda: build_optimizer(config), "optimizer")
    if not isinstance(objective, Objective):
        raise UsageError(f"loss: found {type(objective).__name__}, expected _target_: soul_exp.losses.Objective")
    check_optimizer(config, task, optimizer)
    _check_parts(config, task, objective, optimizer)
    _check_layer(config, objective)
    lm_eval_suite.check(config["utility_suite"], config["utility_data"])
    schedule: Schedule = built(lambda: Schedule(**config["train"]), "train")
    schedule.accumulation(config["compute"]["processes"])
    _check_models(config, task)
    needed = disk.need(config, task)
    disk.check_run(needed, out, Path(config["cache"]))
    records = availability.read_records(config, task)
    metrics = _metrics(config["task"]["metrics"])
    lost = availability.of(config, task, metrics, records)
    _check_input_based(config, task)
    if config["save"] == "best":
        _check_best(config, metrics, lost)
    return Checked(task, metrics, lost, records, needed)


def _metrics(entries: Any) -> dict[str, Callable[..., float]]:
    """The metrics of `task.metrics`, by name."""
    if not isinstance(entries, Mapping):
        raise UsageError(
            f"task.metrics={entries}: expected names with a _target_ each; for none, type task.metrics={{}}"
        )
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or "_target_" not in entry:
            raise UsageError(
                f"task.metrics.{name}={entry}: expected the _target_ of a function; to report it no more, type "
                f"~task.metrics.{name}"
            )
    found = {
        name: built(functools.partial(hydra.utils.instantiate, entry), f"task.metrics.{name}")
        for name, entry in entries.items()
    }
    for name, metric in found.items():
        if not callable(metric):
            raise UsageError(
                f"task.metrics.{name}: found {type(metric).__name__}, expected a function: write _partial_: true "
                f"beside its _target_"
            )
    return found


def _check_best(
    config: Mapping[str, Any], metrics: Mapping[str, Callable[..., float]], lost: Mapping[str, str]
) -> None:
    """Whether the weights of a training can be judged on its way."""
    if "unlearn" in config["stages"] and not config["train"]["save_steps"]:
        raise UsageError("save=best judges the weights of every checkpoint: set train.save_steps, or save=final")
    for name in (FORGET_QUALITY, RETAIN):
        if name not in metrics:
            raise UsageError(
                f"save=best judges by {name}, which task={config['choices']['task']} does not report: choose save=final"
            )
        if name in lost:
            raise UsageError(f"save=best judges by {name}, which cannot be had: {lost[name]}")
    if config["retrained"]["records"]:
        raise UsageError("save=best needs the retrained model's answers to the validation part: give retrained.path")


def _check_input_based(config: Mapping[str, Any], task: Task) -> None:
    """Whether the target can be measured under a system prompt, where that is asked for."""
    if not config["input_based"]:
        return
    name = config["choices"]["task"]
    if not config["task"].get("system_prompt"):
        raise UsageError(
            f"input_based=true: task={name} states no system prompt, type +task.system_prompt='<text>' or "
            f"input_based=false"
        )
    if not config["model"]["template"].get("system"):
        raise UsageError(
            "input_based=true: the model's template has no form with a system prompt, type "
            "+model.template.system='<text with {system} and {question}>' or input_based=false"
        )
    target = prepared_models.checkpoints(config, task).get("target")
    unanswered = (
        target is None or answer_cache.answers_of(config, task, target, prepared_models.instruction(config)) is None
    )
    if config["stages"] and "prepare" not in config["stages"] and unanswered:
        raise UsageError(f"stages={config['stages']} with input_based=true: prepare measures it, add prepare to stages")


def _check_parts(config: Mapping[str, Any], task: Task, objective: Objective, optimizer: Any) -> None:
    for part in parts_of_run(objective, optimizer, task):
        if part not in task.parts:
            raise UsageError(
                f"loss={config['choices']['loss']} with optimizer={config['choices']['optimizer']} asks for the part "
                f"{part!r}, but task={config['choices']['task']} offers {', '.join(task.parts)}: "
                f"choose another loss or task"
            )
        if not task.parts[part].rows:
            raise UsageError(f"the part {part!r} of task={config['choices']['task']} is empty: give it rows")


def _check_layer(config: Mapping[str, Any], objective: Objective) -> None:
    """Whether the model has the layer that the loss reads; unknown before a download."""
    if objective.reads_hidden and (config["model"]["path"] or config["model"]["scratch"]):
        model = scratch.start_skeleton(config["model"])
        if model is not None:
            layer_of(layers_of(model), objective.layer)


def _has_wandb_key() -> bool:
    netrc = Path("~/.netrc").expanduser()
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text())


def _check_compute(compute: Mapping[str, Any], tunes: bool) -> None:
    environment = launch_environment()
    # trials start all their processes here
    wanted = environment.num_devices if environment and not tunes else compute["processes"]
    if compute["device"] == "cuda" and torch.cuda.device_count() < wanted:
        raise UsageError(
            f"compute asks for {wanted} CUDA device(s), found {torch.cuda.device_count()}: "
            f"choose compute=cpu or fewer compute.processes"
        )
    deepspeed = compute["deepspeed"]
    if not deepspeed:
        return
    stage = (deepspeed.get("zero_optimization") or {}).get("stage")
    if stage not in (1, 2, 3):
        raise UsageError(
            f"compute.deepspeed.zero_optimization.stage={stage}: expected 1, 2 or 3; without dividing anything choose "
            f"compute=ddp"
        )
    for section in ("optimizer", "scheduler"):
        if section in deepspeed:
            raise UsageError(
                f"compute.deepspeed.{section} would put DeepSpeed's in the place of the run's own: remove it, and "
                f"choose {'optimizer=' if section == 'optimizer' else 'train.lr_scheduler='}"
            )
    if (deepspeed.get("fp16") or {}).get("enabled"):
        raise UsageError("compute.deepspeed.fp16 scales the loss, which no curvature here expects: choose precision=")


def _check_layers(config: Mapping[str, Any]) -> None:
    """Whether the adapter fits the model, and whether its layers can be computed again; unknown before a download."""
    adapter: Lora | None = built(lambda: hydra.utils.instantiate(config["adapter"], _convert_="all"), "adapter")
    deepspeed, path = config["compute"]["deepspeed"], config["model"]["path"]
    if adapter is not None and deepspeed and deepspeed["zero_optimization"]["stage"] == 3:
        raise UsageError("an adapter is not trained under ZeRO-3: choose compute=zero2, where the base is kept whole")
    if path and _is_local(path):
        _check_given(path, "model.path", config["model"])
        if lora.is_adapter(path) and config["stages"] != ["evaluate"]:
            raise UsageError(
                f"model.path={path} is an adapter, which can only be measured: type stages=[evaluate], or start from a "
                f"checkpoint that a run with adapter.merge=true saved"
            )
    again = config["train"]["gradient_checkpointing"]
    if (adapter is None and not again) or not (path or config["model"]["scratch"]):
        return
    model = scratch.start_skeleton(config["model"])
    if model is not None and again:
        with recomputing(model):
            pass
    if model is not None and adapter is not None:
        with torch.device("meta"):
            adapter.wrapped(model, seed=0)


def _check_models(config: Mapping[str, Any], task: Task) -> None:
    model, retrained, stages = config["model"], config["retrained"], config["stages"]
    if task.trained_before and not model["path"]:
        raise UsageError(
            "task.trained_before=true takes model.path as the target, but no model.path is given: name a checkpoint, "
            "or type task.trained_before=false to have one trained"
        )
    if not model["path"] and not model["scratch"]:
        raise UsageError("the model has neither model.path nor model.scratch: give a checkpoint folder or hub name")
    if not model["path"]:
        checking.check_architecture(scratch.scratch_config(model["scratch"]), "model.scratch.config")
    if retrained["path"] and retrained["records"]:
        raise UsageError("retrained.path and retrained.records are both given: keep one")
    if retrained["path"] and _is_local(retrained["path"]):
        _check_given(retrained["path"], "retrained.path", model)
    if "unlearn" in stages and "prepare" not in stages:
        made = "target" in prepared_models.needed(config, task)
        if made and not prepared_models.is_ready(Path(prepared_models.checkpoints(config, task)["target"].path)):
            raise UsageError(f"stages={stages}: the target model is not in the cache yet, add prepare to stages")
    if stages == ["evaluate"] and not model["path"]:
        raise UsageError("stages=[evaluate] measures a checkpoint: name it with model.path=<folder or hub name>")


def _check_given(path: str, option: str, model: Mapping[str, Any]) -> None:
    """Whether the folder `path` holds a sound model, for which the tokenizer that it is used with was made."""
    tokenizer = model.get("tokenizer") or path
    checking.check_folder(Path(path), option, own_tokenizer=tokenizer == path)
    if _is_local(tokenizer):
        vocabulary.fit_vocabulary(loading.load_model(path, weights=False), vocabulary.load_tokenizer(tokenizer))


def _is_local(path: str) -> bool:
    """Whether `path` means a folder: it exists, or is written as only a path is."""
    beside = Path(path).parent != Path(".") and Path(path).parent.is_dir()
    return Path(path).exists() or beside or path.startswith((".", "/", "~"))


def _check_writable(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{option} {folder} cannot be written ({error.strerror}): choose another folder") from error
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES:
        raise UsageError(
            f"{option} {folder} has {free / 2**20:.0f} MiB of disk left, expected {FREE_BYTES / 2**20:.0f}: free some"
        )
