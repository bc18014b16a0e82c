"""Whether an optimizer can run on the engine and at the precision of its run."""

from dataclasses import dataclass

import torch

from soul_exp.errors import UsageError, built
from soul_exp.optim.kernels import ROUNDINGS
from soul_exp.run import HESSIAN_PARTS, Run, settings_of
from soul_exp.training.capabilities import capabilities, is_elementwise


def check_optimizer(run: Run) -> None:
    """Raises UsageError if the optimizer rejects its numbers or cannot run on its engine."""
    name, compute = run.choices.optimizer, run.compute
    dtype = torch.float32 if compute.deepspeed else getattr(torch, run.model.dtype)
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype))], "role": role} for role in ("hidden", "other")
    ]
    made = built(lambda: run.make_optimizer(groups), "optimizer")
    if not isinstance(made, torch.optim.Optimizer):
        raise UsageError(f"optimizer={name}: found {type(made).__name__}, expected a torch.optim.Optimizer")
    requested = capabilities(made)
    if compute.deepspeed:
        if not is_elementwise(made):
            raise UsageError(
                f"optimizer={name} does not work element by element, as ZeRO's shards need: choose compute=cpu or gpu"
            )
        if run.schedule.log_gradients:
            raise UsageError("train.log_gradients=true needs complete gradients, which ZeRO does not keep: type false")
        if requested.curvature and requested.curvature.estimator == "hutchinson" and compute.zero_stage == 3:
            raise UsageError("optimizer.estimator=hutchinson differentiates twice, which ZeRO-3 cannot: choose gnb")
    rows = requested.curvature and requested.curvature.curvature_rows
    if rows and rows > run.schedule.batch_size:
        raise UsageError(
            f"optimizer.curvature_rows={rows}: expected at most train.batch_size={run.schedule.batch_size}"
        )
    if requested.row_gradients is None:
        return
    settings = settings_of(run.make_optimizer)
    if compute.processes > 1:
        raise UsageError(f"optimizer={name} takes its one step in one process: set compute.processes=1")
    available = sum(len(run.task.parts[part].rows) for part in HESSIAN_PARTS.get(settings["hessian"], ()))
    if settings["num_samples"] > available:
        raise UsageError(
            f"optimizer.num_samples={settings['num_samples']} is more than the {available} rows that "
            f"optimizer.hessian={settings['hessian']} has: expected at most that many"
        )
    counted = num_weights(run)
    if counted:  # whether what it stores fits its own limit
        weights = torch.nn.Parameter(torch.empty(counted.trained, device="meta"))
        built(lambda: run.make_optimizer([weights]), "optimizer")


@dataclass(frozen=True)
class Counted:
    """How many weights a model has, an adapter's included, and how many of them are trained."""

    all: int
    trained: int


def num_weights(run: Run) -> Counted | None:
    """Of a model that can be described without a download, counted without storage; else None."""
    model = run.model.described()
    if model is None:
        return None
    if run.adapter is not None:
        with torch.device("meta"):
            model = run.adapter.wrapped(model, seed=0)
    params = list(model.parameters())
    return Counted(sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad))


def check_precision(run: Run) -> None:
    """Raises UsageError if dtype and rounding are unknown, or not those that the engine keeps."""
    precision, deepspeed, dtype = run.choices.precision, run.compute.deepspeed, run.model.dtype
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"model.dtype={dtype}: expected float32 or bfloat16, choose precision=")
    if run.rounding not in ROUNDINGS:
        raise UsageError(f"precision.rounding={run.rounding} is unknown: choose one of {', '.join(ROUNDINGS)}")
    if deepspeed:
        if dtype == "bfloat16" and run.rounding != "master":
            raise UsageError(
                f"precision={precision} keeps no fp32 weights, but DeepSpeed's ZeRO does: choose precision=fp32 or "
                f"bf16_master, or compute=cpu or gpu"
            )
        if (dtype == "bfloat16") != bool(deepspeed.get("bf16", {}).get("enabled")):
            raise UsageError(f"precision={precision} and compute.deepspeed.bf16.enabled disagree: set neither or both")
