"""Configuration to objects, once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import hydra.utils
import torch

from soul_exp.losses import Objective
from soul_exp.tasks.task import Task
from soul_exp.training.curvature import CURVATURE_PARTS, SAMPLED

HESSIAN_PARTS = {"retain": ("retain",), "all": ("forget", "retain")}  # whose rows an influence step's Hessian is of


def build_optimizer(config: Mapping[str, Any]) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer of `config` at its precision, still to be given its parameters."""
    made = hydra.utils.instantiate(config["optimizer"], _convert_="all")
    rounding = config["precision"]["rounding"]
    if rounding == "nearest" or config["compute"]["deepspeed"]:  # ZeRO gives it fp32 shards and rounds by itself
        return made
    noise = {"seed": config["seed"]} if rounding == "stochastic" else {}
    return functools.partial(made, rounding=rounding, **noise)


def parts_of_run(objective: Objective, optimizer: Any, task: Task) -> tuple[str, ...]:
    """The parts that a run reads: the loss's, the curvature's where the optimizer wants one, and always `retain`.

    Without a retain term, and where the task has such rows, only its NLL is measured (Unlearner.log).
    """
    retain = task.parts.get("retain")
    measured = ("retain",) if objective.retain_function is None and retain is not None and retain.rows else ()
    return tuple(dict.fromkeys((*objective.parts, *_parts_of_curvature(optimizer), *measured)))


def _parts_of_curvature(optimizer: Any) -> tuple[str, ...]:
    settings = _settings(optimizer)
    if settings.get("hessian") in HESSIAN_PARTS:
        return ("forget", "retain")  # the ratio of their sizes scales the step
    if isinstance(settings.get("base"), functools.partial):
        return _parts_of_curvature(settings["base"])
    return CURVATURE_PARTS[settings.get("curvature_on") or "retain"] if settings.get("estimator") in SAMPLED else ()


def _settings(optimizer: Any) -> dict[str, Any]:
    """The keyword arguments that `optimizer`, a partial, is going to be built with, defaults of its class included."""
    parameters = inspect.signature(optimizer).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def build_task(config: Mapping[str, Any]) -> Task:
    """The task that `config["task"]` describes; its `metrics` and its `system_prompt` are read elsewhere."""
    fields = {key: value for key, value in config["task"].items() if key not in ("metrics", "system_prompt")}
    task: Task = hydra.utils.instantiate(fields, _convert_="all")
    return task
