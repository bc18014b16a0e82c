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

from soul_exp import adapters, attention, binding, disk, examine, models, recipes, rehearsal, suite
from soul_exp.adapters import Lora
from soul_exp.answers import SUITE, Answers, read_retrained
from soul_exp.disk import Need
from soul_exp.errors import UsageError, built
from soul_exp.layers import layer_of, layers_of, recomputing
from soul_exp.losses import Objective
from soul_exp.measure import FORGET_QUALITY, RETAIN
from soul_exp.optimizers import build_optimizer, check_optimizer, check_precision, parts_of_run
from soul_exp.options import check_options
from soul_exp.schedule import Schedule
from soul_exp.tasks.task import Task
from soul_exp.world import found

STAGES = ("prepare", "unlearn", "evaluate")
RESUME = ("exact", "weights", "restart")
UNLEARNED = "unlearned.json"  # beside the weights of a model that a run of ours unlearned
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
    task = built(lambda: recipes.build_task(config), "task")
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
    suite.check(config["utility_suite"], config["utility_data"])
    schedule: Schedule = built(lambda: Schedule(**config["train"]), "train")
    schedule.accumulation(config["compute"]["processes"])
    _check_models(config, task)
    needed = disk.need(config, task)
    disk.check_run(needed, out, Path(config["cache"]))
    records = _read_records(config, task)
    metrics = {
        name: built(functools.partial(hydra.utils.instantiate, entry), f"task.metrics.{name}")
        for name, entry in config["task"]["metrics"].items()
    }
    reasons = _reasons(config, task, metrics, records)
    _check_input_based(config, task)
    if config["save"] == "best":
        _check_best(config, metrics, reasons)
    return Checked(task, metrics, reasons, records, needed)


def _check_best(
    config: Mapping[str, Any], metrics: Mapping[str, Callable[..., float]], reasons: Mapping[str, str]
) -> None:
    """Whether the weights of a training can be judged on its way."""
    if "unlearn" in config["stages"] and not config["train"]["save_steps"]:
        raise UsageError("save=best judges the weights of every checkpoint: set train.save_steps, or save=final")
    for name in (FORGET_QUALITY, RETAIN):
        if name not in metrics:
            raise UsageError(
                f"save=best judges by {name}, which task={config['choices']['task']} does not report: choose save=final"
            )
        if name in reasons:
            raise UsageError(f"save=best judges by {name}, which cannot be had: {reasons[name]}")
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
    target = recipes.checkpoints(config, task).get("target")
    unanswered = target is None or examine.answers_of(config, task, target, recipes.instruction(config)) is None
    if config["stages"] and "prepare" not in config["stages"] and unanswered:
        raise UsageError(f"stages={config['stages']} with input_based=true: prepare measures it, add prepare to stages")


def _check_parts(config: Mapping[str, Any], task: Task, objective: Objective, optimizer: Any) -> None:
    for part in parts_of_run(objective, optimizer):
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
        model = models.described(config["model"])
        if model is not None:
            layer_of(layers_of(model), objective.layer)


def _has_wandb_key() -> bool:
    netrc = Path("~/.netrc").expanduser()
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text())


def _check_compute(compute: Mapping[str, Any], tunes: bool) -> None:
    world = found()
    wanted = world.devices if world and not tunes else compute["processes"]  # trials start all processes here
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
        models.check_folder(Path(path), "model.path", own_tokenizer=config["model"].get("tokenizer") in (None, path))
        if adapters.is_adapter(path) and config["stages"] != ["evaluate"]:
            raise UsageError(
                f"model.path={path} is an adapter, which can only be measured: type stages=[evaluate], or start from a "
                f"checkpoint that a run with adapter.merge=true saved"
            )
    again = config["train"]["gradient_checkpointing"]
    if (adapter is None and not again) or not (path or config["model"]["scratch"]):
        return
    model = models.described(config["model"])
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
    if retrained["path"] and retrained["records"]:
        raise UsageError("retrained.path and retrained.records are both given: keep one")
    if retrained["path"] and _is_local(retrained["path"]):
        models.check_folder(Path(retrained["path"]), "retrained.path", own_tokenizer=not model.get("tokenizer"))
    if "unlearn" in stages and "prepare" not in stages:
        made = "target" in recipes.needed(config, task)
        if made and not recipes.is_ready(Path(recipes.checkpoints(config, task)["target"].path)):
            raise UsageError(f"stages={stages}: the target model is not in the cache yet, add prepare to stages")
    if stages == ["evaluate"] and not model["path"]:
        raise UsageError("stages=[evaluate] measures a checkpoint: name it with model.path=<folder or hub name>")


def _is_local(path: str) -> bool:
    """Whether `path` means a folder: it exists, or is written as only a path is."""
    beside = Path(path).parent != Path(".") and Path(path).parent.is_dir()
    return Path(path).exists() or beside or path.startswith((".", "/", "~"))


def _read_records(config: Mapping[str, Any], task: Task) -> Mapping[str, Answers] | None:
    path = config["retrained"]["records"]
    if not path:
        return None
    try:
        records = read_retrained(Path(path))
    except FileNotFoundError as error:
        raise UsageError(f"retrained.records={path} does not exist: give records/ of a run or a TOFU log") from error
    except ValueError as error:
        raise UsageError(f"retrained.records: {error}") from error
    for name, given in records.items():
        if name not in task.probes:
            continue
        asked = [item.prompt for item in task.probes[name].items]
        if Path(path).is_dir() and len(given) != len(asked):
            raise UsageError(
                f"retrained.records={path} holds {len(given)} answers to {name}, the task asks {len(asked)} questions: "
                f"give the records of the same task"
            )
        for number, (question, prompt) in enumerate(zip(given.question or (), asked, strict=False), start=1):
            if prompt not in question:
                raise UsageError(
                    f"retrained.records={path}: answer {number} of {name} is to {question[:60]!r}, the task asks "
                    f"{prompt[:60]!r}: give the records of the same task"
                )
    return records


def _reasons(
    config: Mapping[str, Any],
    task: Task,
    metrics: Mapping[str, Callable[..., float]],
    records: Mapping[str, Answers] | None,
) -> dict[str, str]:
    missing = dict(task.missing)
    if recipes.published_target(config) is not None:
        missing["holdout"] = "the published target was trained on every author, so none is unseen"
    elif _is_unknown_checkpoint(config) and config["task"].get("num_holdout_authors", 0) is None:
        missing["holdout"] = "whether model.path saw the holdout is unknown: set task.num_holdout_authors if it did not"
    if records is None and not has_retrained(config, task):
        missing["retrained"] = _no_retrained(config, task)
    if config["utility_suite"] == suite.NONE:
        missing[SUITE] = "utility_suite=none asks nothing of general utility: type utility_suite=embedded or paper"
    reasons = {}
    for name, metric in metrics.items():
        names = binding.names(metric)
        for wanted in names:
            if wanted in missing:
                reasons[name] = missing[wanted]
            elif wanted not in (*task.probes, "retrained", SUITE):
                raise UsageError(
                    f"the metric {name} asks for the probe {wanted!r}, but task={config['choices']['task']} offers "
                    f"{', '.join(task.probes)}: remove task.metrics.{name}"
                )
        lack = rehearsal.lacking(metric, task.probes) if name not in reasons else None
        if lack:
            reasons[name] = missing.get(".".join(lack), f"the probe {lack[0]} records no {lack[1]}")
        if records is not None and name not in reasons:
            absent = [wanted for wanted in names if wanted not in records and wanted != "retrained"]
            if absent:  # no model has a metric that compares with them, the others have one that does not
                key = name if "retrained" in names else f"retrained.{name}"
                reasons[key] = f"retrained.records holds no answers to {absent[0]}"
            else:
                _try(metric, records, name)
    return reasons


def _no_retrained(config: Mapping[str, Any], task: Task) -> str:
    if recipes.is_given(config, task):
        return (
            "no retrained model, as model.path is the target as it is: give retrained.path or retrained.records, or "
            "have both trained here with task.trained_before=false"
        )
    prepared = "" if "prepare" in config["stages"] else "add prepare to stages, or "
    return f"no retrained model: {prepared}give retrained.path or retrained.records"


def _try(metric: Callable[..., float], records: Mapping[str, Answers], name: str) -> None:
    """Compute `metric` of the given answers now, so that answers that it cannot read stop the run before it starts."""
    try:
        binding.call(metric, {**records, "retrained": records})
    except ValueError as error:
        raise UsageError(f"retrained.records: the metric {name} cannot be computed from them: {error}") from error


def has_retrained(config: Mapping[str, Any], task: Task) -> bool:
    """Whether this run will have the retrained model's answers: from a checkpoint, made by prepare, or made before."""
    places = recipes.checkpoints(config, task)
    if "retrained" not in places:
        return False
    return bool(
        config["retrained"]["path"]
        or "prepare" in config["stages"]
        or not config["stages"]
        or recipes.is_ready(Path(places["retrained"].path))
    )


def _is_unknown_checkpoint(config: Mapping[str, Any]) -> bool:
    path = config["model"]["path"]
    ours = path and any((Path(path) / name).is_file() for name in (recipes.DONE, UNLEARNED))
    return config["stages"] == ["evaluate"] and not ours


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
