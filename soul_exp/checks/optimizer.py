"""The optimizer of a configuration: built at its precision, the parts that it looks at, whether it can run.

The optimizers themselves are in optim/, and know nothing of configurations.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import hydra.utils
import torch

from soul_exp.build import HESSIAN_PARTS, _settings
from soul_exp.errors import UsageError, built
from soul_exp.models import scratch
from soul_exp.models.lora import Lora
from soul_exp.optim.kernels import ROUNDINGS
from soul_exp.tasks.task import Task
from soul_exp.training.capabilities import capabilities, is_elementwise


def check_optimizer(config: Mapping[str, Any], task: Task, optimizer: Any) -> None:
    """Its own checks of its numbers, on two small matrices; and whether its engine can run it."""
    name, compute, train = config["choices"]["optimizer"], config["compute"], config["train"]
    dtype = torch.float32 if compute["deepspeed"] else getattr(torch, config["model"]["dtype"])
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype))], "role": role} for role in ("hidden", "other")
    ]
    made = built(lambda: optimizer(groups), "optimizer")
    if not isinstance(made, torch.optim.Optimizer):
        raise UsageError(f"optimizer={name}: found {type(made).__name__}, expected a torch.optim.Optimizer")
    asks = capabilities(made)
    if compute["deepspeed"]:
        if not is_elementwise(made):
            raise UsageError(
                f"optimizer={name} does not work element by element, as the flat shards of DeepSpeed's ZeRO need: "
                f"choose compute=cpu or gpu"
            )
        if train["log_gradients"]:
            raise UsageError("train.log_gradients=true needs whole gradients, which ZeRO does not keep: set it false")
        twice = asks.curvature is not None and asks.curvature.estimator == "hutchinson"
        if twice and compute["deepspeed"]["zero_optimization"]["stage"] == 3:
            raise UsageError("optimizer.estimator=hutchinson differentiates twice, which ZeRO-3 cannot: choose gnb")
    rows = asks.curvature and asks.curvature.curvature_rows
    if rows and rows > train["batch_size"]:
        raise UsageError(
            f"optimizer.curvature_rows={rows} is more than a step has: expected at most "
            f"train.batch_size={train['batch_size']}"
        )
    if asks.row_gradients is not None:
        _check_static(config, task, optimizer)


def _check_static(config: Mapping[str, Any], task: Task, optimizer: Any) -> None:
    name, settings = config["choices"]["optimizer"], _settings(optimizer)
    if config["compute"]["processes"] > 1:
        raise UsageError(f"optimizer={name} takes its one step in one process: set compute.processes=1")
    available = sum(len(task.parts[part].rows) for part in HESSIAN_PARTS.get(settings["hessian"], ()))
    if settings["num_samples"] > available:
        raise UsageError(
            f"optimizer.num_samples={settings['num_samples']} is more than the {available} rows that "
            f"optimizer.hessian={settings['hessian']} has: expected at most that many"
        )
    counted = num_weights(config)
    if counted:  # whether what it stores fits its own limit
        built(lambda: optimizer([torch.nn.Parameter(torch.empty(counted.trained, device="meta"))]), "optimizer")


@dataclass(frozen=True)
class Counted:
    """How many weights a model has, an adapter's included, and how many of them are trained."""

    all: int
    trained: int


def num_weights(config: Mapping[str, Any]) -> Counted | None:
    """Of a model that can be described without a download, counted without storage; else None."""
    model = scratch.start_skeleton(config["model"])
    if model is None:
        return None
    adapter: Lora | None = hydra.utils.instantiate(config["adapter"], _convert_="all")
    if adapter is not None:
        with torch.device("meta"):
            model = adapter.wrapped(model, seed=0)
    params = list(model.parameters())
    return Counted(sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad))


def check_precision(config: Mapping[str, Any]) -> None:
    precision, compute = config["choices"]["precision"], config["compute"]
    rounding, dtype = config["precision"]["rounding"], config["model"]["dtype"]
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"model.dtype={dtype}: expected float32 or bfloat16, choose precision=")
    if rounding not in ROUNDINGS:
        raise UsageError(f"precision.rounding={rounding} is unknown: choose one of {', '.join(ROUNDINGS)}")
    if compute["deepspeed"]:
        if dtype == "bfloat16" and rounding != "master":
            raise UsageError(
                f"precision={precision} keeps no fp32 weights, but DeepSpeed's ZeRO does: choose precision=fp32 or "
                f"bf16_master, or compute=cpu or gpu"
            )
        if (dtype == "bfloat16") != bool(compute["deepspeed"].get("bf16", {}).get("enabled")):
            raise UsageError(f"precision={precision} and compute.deepspeed.bf16.enabled disagree: set neither or both")
    elif rounding != "nearest":
        plain = built(lambda: hydra.utils.instantiate(config["optimizer"], _convert_="all"), "optimizer")
        if "rounding" not in inspect.signature(plain).parameters:
            raise UsageError(
                f"precision={precision} needs an optimizer that rounds so; optimizer={config['choices']['optimizer']} "
                f"does not: choose precision=fp32 or bf16, or optimizer=adam, lion, signum, sophia or sophia_soul"
            )
