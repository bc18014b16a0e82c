"""Whether the weights of an unlearning run, their gradients and the optimizer's states fit into the memory."""

import functools
import math
import os
import shutil
import subprocess
from typing import Any

from soul_exp.artifacts import attack_cache, prepared_models, scores
from soul_exp.checks.optimizer import num_weights
from soul_exp.errors import UsageError, counted
from soul_exp.models.checkpoint import is_local
from soul_exp.optim.elementwise import Elementwise
from soul_exp.run import Run
from soul_exp.stages.prepare import at_once, unprepared

GB = 1e9
ROUNDING = {"kahan": 2, "master": 4}  # bytes a weight that a rounding keeps beside bfloat16 weights; the states too


def check_memory(run: Run) -> None:
    """Raises UsageError, with the sum, if what a rank holds at least cannot fit into its memory."""
    weights = _count(run)
    if weights is None or not run.unlearns or run.adapter is not None:
        return
    of_weight = 2 if run.model.dtype == "bfloat16" else 4
    of_state = 4 if run.rounding == "master" or run.compute.deepspeed else of_weight
    of_rounding = 4 if run.compute.deepspeed and of_weight == 2 else ROUNDING.get(run.rounding, 0)
    kind = _elementwise(run)
    precise = len(kind.precise) if kind and of_state == 2 else 0  # states that are fp32 all the same
    states = (len(kind.states) if kind else 0) * of_state + 2 * precise + of_rounding
    stage, ranks = run.compute.zero_stage or 0, run.compute.processes
    gradients = of_weight if kind else 0  # an optimizer unknown here may take none
    watched = run.save == "best" or run.evaluation.every is not None
    copies = 2 if watched and any(probe.generate for probe in scores.validation_probes(run).values()) else 1
    # bytes a weight, and the stage of ZeRO that divides them
    shares = [(of_weight * copies, 3), (gradients, 2), (states, 1)]
    needed = sum(weights * size / (ranks if stage >= divided else 1) for size, divided in shares)
    offloads = run.compute.deepspeed and "offload_optimizer" in run.compute.deepspeed["zero_optimization"]
    available = _available(run.compute.device)
    if needed <= available or offloads:
        return
    divided = f", divided over {ranks} ranks by ZeRO-{stage}" if stage else ""
    original = ", evaluate.every=null and save=final, which load no original beside it" if copies > 1 else ""
    raise UsageError(
        f"compute={run.choices.compute} with precision={run.choices.precision} and optimizer={run.choices.optimizer} "
        f"needs {needed / GB:.0f} GB of memory and has {available / GB:.0f}: {weights / 1e9:.2f} billion weights x "
        f"({of_weight * copies} bytes of weight + {gradients} of gradient + {states} of optimizer states){divided}: "
        f"choose precision=bf16, adapter=lora, or compute=zero3 with more compute.processes{original}"
    )


def check_prepare_memory(run: Run) -> None:
    """Raises UsageError if the models that prepare holds at once cannot fit, in training with gradient and two states.

    A model that was given, or is in the cache, only answers. On a CPU it does so while the others are trained.
    """
    weights, of_weight = _count(run), 2 if run.model.dtype == "bfloat16" else 4
    if weights is None or "prepare" not in run.stages:
        return
    roles = sorted(unprepared(run), key=lambda role: prepared_models.exists(run, role))  # those to train first
    held = roles[: at_once(run, run.compute.device, roles)]
    answer = [role for role in held if prepared_models.exists(run, role)]
    train = held[: len(held) - len(answer)]
    needed, available = (4 * len(train) + len(answer)) * of_weight * weights, _available(run.compute.device)
    if needed > available:
        of_training = ("trains", train, f"{4 * of_weight} bytes of weight, gradient and two states")
        parts = [part for part in (of_training, ("evaluates", answer, f"{of_weight} bytes of weight")) if part[1]]
        does = " and ".join(f"{verb} {' and '.join(names)}" for verb, names, _ in parts)
        sums = " + ".join(f"{size} x {counted(len(names), 'model')}" for _, names, size in parts)
        give = "give checkpoints (retrained.path=DIR; of task=custom and detox task.trained_before=true), or "
        raise UsageError(
            f"prepare {does}{' side by side' * (len(held) > 1)}, which needs {needed / GB:.0f} GB of "
            f"memory and has {available / GB:.0f}: {weights / 1e9:.2f} billion weights x ({sums}): "
            f"{give * bool(train)}choose precision=bf16"
        )


def check_attack_memory(run: Run) -> None:
    """Raises UsageError if the complete model that an attack holds cannot fit into the memory of one device."""
    weights, of_weight = _count(run), 2 if run.model.dtype == "bfloat16" else 4
    if weights is None or "attack" not in run.stages:
        return
    side_by_side = attack_cache.at_once(run) if run.compute.device == "cpu" else 1
    available = _available(run.compute.device)
    for name, attack in run.attacks.items():
        needed = weights * attack.memory(of_weight) * side_by_side
        if needed > available:
            rounds = of_weight == 2 and attack.memory(of_weight) > 10
            advice = f"type attack.{name}.rounding=stochastic, " if rounds else ""
            raise UsageError(
                f"attack={name} needs {needed / GB:.0f} GB of memory on one device, where models are complete, and has "
                f"{available / GB:.0f}: {advice}leave it out, or type stages=[attack] model.path=DIR on a larger one"
            )


def _count(run: Run) -> int | None:
    """How many weights the model has, counted or as its entry in conf/model/ states for the hub's; None: unknown."""
    if run.model.num_weights is not None and run.model.path and not is_local(run.model.path):
        return run.model.num_weights
    counted = num_weights(run)
    return counted.all if counted else None


def _elementwise(run: Run) -> type[Elementwise] | None:
    """The class of the optimizer, if it is one that declares the numbers which it keeps for each weight."""
    kind: Any = run.make_optimizer
    while isinstance(kind, functools.partial):
        kind = kind.func
    return kind if isinstance(kind, type) and issubclass(kind, Elementwise) else None


def _available(device: str) -> float:
    """The bytes of this machine, or of its largest GPU as the driver's program says: torch would occupy the GPU."""
    if device == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    program = shutil.which("nvidia-smi")
    if program is None:
        return math.inf
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    sizes = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return max((float(size) * 2**20 for size in sizes if size.isdecimal()), default=math.inf)
