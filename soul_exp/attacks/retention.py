"""Matched retention: how much does a model forget once it may lose no more than any other?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from soul_exp.attacks.attack import FORGET, Attack, Found, Target, check_same_shapes, shapes_of
from soul_exp.evaluation.probing import evaluating, likelihoods
from soul_exp.evaluation.records import as_recorded
from soul_exp.losses import precise
from soul_exp.metrics.answers import Answers, Scores
from soul_exp.metrics.retention import CHOSEN, PATH, RETAIN, keeps, point_of
from soul_exp.models.language_model import LanguageModel
from soul_exp.ranges import ANY_COUNT, Number
from soul_exp.tasks.task import Task

GENERAL = ("authors", "facts", "general")  # probes of general knowledge
VALIDATION = tuple(f"validation_{name}" for name in GENERAL)
DIGITS = 8  # of alpha


@dataclass(frozen=True, kw_only=True)
class Retention(Attack):
    """Weights (1 - alpha) original + alpha model, at the largest alpha that keeps a share of what the original retains.

    That is the largest of `num_points` evenly spaced alphas such that it and all smaller ones keep the share `keep` of
    the original's extraction strength on the validation rows to retain, and of its general knowledge, refined by
    `num_bisections` between it and the next. No test row of either has a say where the task has validation rows; of
    general knowledge the probe itself serves where it has none. Source: arXiv 2406.09179.
    """

    keep: Annotated[float, Number(0, 1, above=True)] = 0.95
    num_points: Annotated[int, Number(2, 1001, whole=True)] = 11
    num_bisections: Annotated[int, ANY_COUNT] = 4

    grid = "branch"  # no option: there is one
    reads_original = True
    takes_adapter = False  # its weights are between those of complete models

    def branches(self) -> dict[str, Any]:
        return {PATH: None}

    def reads(self) -> Sequence[str]:
        return [f"probe.{name}" for name in (FORGET, RETAIN, *VALIDATION, *GENERAL)]

    def missing(self, task: Task) -> str | None:
        if (why := super().missing(task)) is not None or RETAIN in task.probes:
            return why
        found = task.missing.get(RETAIN, f"task={task.name} has no probe {RETAIN}")
        return f"it chooses by validation rows, and {found}: type task.validation_fraction=0.25"

    def points(self, target: Target, branch: str) -> Found:
        original = target.original()
        start, shapes = weights_of(original), shapes_of(original.model)
        del original  # one model at a time on the device
        lm = target.load()
        check_same_shapes(shapes_of(lm.model), shapes, target.label)
        end = weights_of(lm)
        found: dict[str, Answers | Scores] = {}
        by = (RETAIN, *general_probes(target.task))

        def visit(alpha: float) -> bool:
            put_between(lm, start, end, alpha)
            for name in (FORGET, *by):
                found[point_of(name, alpha)] = _answers(target, lm, name)
            return keeps(found, alpha, self.keep)

        chosen = largest_kept(visit, self.num_points, self.num_bisections)
        sizes = {name: float(len(target.task.probes[name].items)) for name in by}
        return {**found, CHOSEN: {PATH: {"alpha": chosen, "keep": self.keep}, "by": sizes}}


def general_probes(task: Task) -> list[str]:
    """The probes by which general knowledge is judged: those of validation rows, where there are any."""
    return [name for name in VALIDATION if name in task.probes] or [name for name in GENERAL if name in task.probes]


def largest_kept(visit: Callable[[float], bool], num_points: int, num_bisections: int) -> float:
    """The largest alpha that `visit` accepts, of a grid from 0 to 1 up to the first that it rejects, then bisected."""
    low = 0.0
    visit(low)  # the original, with which all others are compared
    for number in range(1, num_points):
        high = round(number / (num_points - 1), DIGITS)
        if not visit(high):
            break
        low = high
    else:
        return 1.0
    for _ in range(num_bisections):
        middle = round((low + high) / 2, DIGITS)
        low, high = (middle, high) if visit(middle) else (low, middle)
    return low


def weights_of(lm: LanguageModel) -> dict[str, Tensor]:
    """A copy on the CPU of every floating-point weight; one that is tied to another counts once."""
    named = lm.model.named_parameters()
    return {name: p.detach().to("cpu", copy=True) for name, p in named if p.is_floating_point()}


@torch.no_grad()
def put_between(lm: LanguageModel, start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> None:
    """Give `lm` the weights (1 - alpha) start + alpha end, computed in fp32 at least, tied ones included.

    Buffers and integer tensors stay as they are. With alpha 0 or 1 they are those of `start` or `end` exactly.
    """
    for name, weight in lm.model.named_parameters():
        if name in end and alpha in (0, 1):  # exactly, also where the other one is not finite
            weight.copy_(end[name] if alpha else start[name])
        elif name in end:
            weight.copy_((1 - alpha) * precise(start[name]) + alpha * precise(end[name]))


def _answers(target: Target, lm: LanguageModel, name: str) -> Answers:
    """What the metrics read of the answers of `lm` to the probe `name`."""
    probe = target.task.probes[name]
    wrong = [item for row in probe.wrong or () for item in row] if name in (*VALIDATION, *GENERAL) else []
    with evaluating(lm):
        rows = likelihoods(lm, [*probe.items, *wrong], batch_size=target.batch_size, label=target.label)
    own, num = rows[: len(probe.items)], len(probe.items)
    given: dict[str, Any] = {"nll": [row.nll for row in own], "right": [row.right[:-1] for row in own]}
    if wrong:
        given["wrong_nll"] = np.array([row.nll for row in rows[num:]]).reshape(num, -1)
    # units of their own names: questions on authors and on facts are not drawn in pairs
    return as_recorded(Answers(**given, unit=probe.units or [f"{name} {number}" for number in range(num)]))
