"""A training on every engine, in workers that the tests start once: which cases there are, and what they end with."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from conftest import items
from test_trainer import OBJECTIVES, parts
from transformers import TrainerCallback

from soul_exp.artifacts import prepared_models
from soul_exp.data import Item, Template
from soul_exp.distributed import ranks, zero3
from soul_exp.evaluation.probing import evaluate_probes
from soul_exp.models import saving
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.lora import Lora
from soul_exp.optim import AdamW, Muon, Sophia
from soul_exp.run import Compute, ModelSettings
from soul_exp.stages.process import start_process
from soul_exp.tasks.task import Probe
from soul_exp.training.schedule import Schedule
from soul_exp.training.train import train

MODEL = ModelSettings(Template(), max_length=128)
# Clipped, accumulated, with decay, and updates of which most are neither clipped nor zero; eps keeps rounding errors of
# the gradient from being divided by a curvature near 0
SCHEDULE = {"epochs": 1, "batch_size": 4, "micro_batch_size": 1, "max_steps": 4, "warmup_ratio": 0.0}
SCHEDULE |= {"logging_steps": 1, "max_grad_norm": 0.5}
sophia = functools.partial(Sophia, lr=1e-2, rho=300.0, eps=1e-5, weight_decay=0.1, interval=2)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": functools.partial(AdamW, lr=1e-3, eps=1e-4, weight_decay=0.1),
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sophia": sophia,
    "sophia_both": functools.partial(sophia, curvature_on="both", curvature_rows=3),
    "sophia_hutchinson": functools.partial(sophia, rho=3.0, estimator="hutchinson", eps=1e-4),  # h may be of any sign
    "sophia_gradient": functools.partial(sophia, estimator="gradient", interval=2),
    "sophia_soul": functools.partial(sophia, rho=0.04, num_labels=5120, estimator="gradient", interval=1),
}
WRONG = {  # what an engine would make of `sophia` that left a thing out
    "sophia_once": functools.partial(sophia, interval=1000),
    "sophia_blind": functools.partial(sophia, rho=1e-9),
    "sophia_undecayed": functools.partial(sophia, weight_decay=0.0),
}
OPTIMIZERS |= WRONG
ALONE = {"muon": functools.partial(Muon, lr=1e-2)}  # in one process only


@dataclass(frozen=True)
class Case:
    """A loss and an optimizer, by their names above, on an engine: None, or DeepSpeed's configuration."""

    loss: str
    optimizer: str
    deepspeed: Mapping[str, Any] | None = None
    schedule: Mapping[str, Any] | None = None
    adapter: bool | list[str] = False  # on all linear layers, or on those


@dataclass(frozen=True)
class Ended:
    """What a case came to: all weights in one tensor, what was logged, answers of the unlearned model, who ran."""

    weights: torch.Tensor
    logged: list[dict[str, float]]
    answers: list[float]
    texts: list[str]
    divided: bool  # whether this rank held a share of each weight only
    saved: str  # where the weights are, in files of 60 kB


class Logged(TrainerCallback):
    """Keeps what a training logs, on this rank."""

    def __init__(self, logged: list[dict[str, float]]) -> None:
        self.logged = logged

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "forget_loss" in logs:
            self.logged.append(dict(logs))


def run(case: Case, model: Path, folder: Path, processes: int) -> Ended:
    """`case` from the checkpoint in `model`; on every rank the same."""
    AcceleratorState._reset_state()  # else it is the former case's engine
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    lm = prepared_models.load(MODEL, Checkpoint(str(model)), case.deepspeed)
    logged: list[dict[str, float]] = []
    divided = all(p.numel() == 0 for p in lm.model.parameters())
    if case.adapter:
        targets = "all-linear" if case.adapter is True else case.adapter
        lm = lm.with_model(Lora(r=4, alpha=8, dropout=0.0, target_modules=targets, merge=False).wrapped(lm.model, 0))
    parts_of_curvature = ("forget", "retain") if case.optimizer == "sophia_both" else ("retain",)
    names = tuple(dict.fromkeys((*OBJECTIVES[case.loss].parts, *parts_of_curvature)))
    train(
        lm.model,
        lm.reader,
        parts(lm, names),
        objective=OBJECTIVES[case.loss],
        make_optimizer={**OPTIMIZERS, **ALONE}[case.optimizer],
        schedule=Schedule(**{**SCHEDULE, **(case.schedule or {})}),
        seed=0,
        pad_id=lm.pad_id,
        folder=folder / "checkpoints",
        label="unlearn",
        deepspeed=case.deepspeed,
        processes=processes,
        callbacks=[Logged(logged)],
    )
    if not case.adapter:
        saving.save_weights(lm.model, folder / "saved", ranks.is_first(), published=True, max_bytes=60_000)
    return Ended(_gathered(lm), logged, *_answers(lm), divided, str(folder / "saved"))


def _gathered(lm: LanguageModel) -> torch.Tensor:
    flat = []
    for p in lm.model.parameters():
        with zero3.gathered([p]):
            flat.append(p.detach().flatten().clone())
    return torch.cat(flat)


def _answers(lm: LanguageModel) -> tuple[list[float], list[str]]:
    """Likelihoods, those after a prefix and gradient norms; free answers."""
    asked: list[Item] = items(7, start=3)  # an odd number of batches for two ranks
    probes = {"forget": Probe(asked, generate=True), "holdout": Probe(items(2, start=40))}
    found = evaluate_probes(lm, probes, batch_size=3, max_new_tokens=5, prefix=items(2, start=60))["forget"]
    assert found.generation is not None
    fields = ("nll", "gradnorm", "gradnorm_mean", "recall_ll")
    return [float(x) for field in fields for x in found.numbers(field)], list(found.generation)


def work(rank: int, cases: Mapping[str, Case], model: str, folder: str) -> None:
    """Every case by two ranks or more, one after the other; what they end with goes to `folder`."""
    world = int(os.environ["WORLD_SIZE"])
    os.environ["PATH"] = "/nowhere"  # no compiler: DeepSpeed would build an operator that nothing here needs
    compute = Compute("zero2", "cpu", processes=world, threads=1, deepspeed={"zero_optimization": {"stage": 2}})
    start_process(compute, rank, seed=0, attention_kernel="sdpa")
    gc.freeze()  # each training collects: what was imported is not looked through again
    for name, case in cases.items():
        ended = run(case, Path(model), Path(folder) / name, world)
        torch.save(vars(ended), Path(folder) / f"{name}-{rank}.pt")
    ranks.barrier()
    ranks.leave_group()
