"""What an attack is, and what it is tried on."""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from soul_exp.data import Item, Template
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import evaluating, likelihoods
from soul_exp.evaluation.records import as_recorded
from soul_exp.metrics.answers import Answers, Scores
from soul_exp.models.language_model import LanguageModel
from soul_exp.ranges import as_typed
from soul_exp.tasks.task import Task

SAME = "name a checkpoint of the original's architecture and tokenizer, or leave the attack out"
FORGET = "forget"  # the probe whose answers tell what a model knows
Found = Mapping[str, Answers | Scores]  # point -> what the attacked model answers there


@dataclass(frozen=True)
class Target:
    """A model under attack. `load` and `original` read a complete model onto the device, each time anew."""

    load: Callable[[], LanguageModel]
    original: Callable[[], LanguageModel]
    task: Task
    device: str
    batch_size: int  # rows of a forward pass that only evaluates
    label: str

    def knowledge(self, lm: LanguageModel, label: str = "") -> Answers:
        """What `lm` knows of the forget probe: the likelihood of its answers, and which of their tokens it predicts."""
        probe = self.task.probes[FORGET]
        with evaluating(lm):
            rows = likelihoods(lm, probe.items, batch_size=self.batch_size, label=label)
        given: dict[str, Any] = {"nll": [row.nll for row in rows], "right": [row.right[:-1] for row in rows]}
        return as_recorded(Answers(**given, unit=probe.units))


class Attack(abc.ABC):
    """A dataclass whose fields are the options of conf/attack/NAME.yaml, but for its metrics.

    Its branches are units of work: each is tried on a fresh model, cached by itself, and taken by any rank.
    """

    grid: ClassVar[str] = ""  # the option whose values are the branches
    reads_original: ClassVar[bool] = False  # whether the points depend on the original's weights
    takes_adapter: ClassVar[bool] = True  # whether a model may be attacked whose adapter is not merged

    def check(self, option: str, first: Any = None) -> None:
        """Raises ValueError unless `option` has different values, the first of them `first`; after 0 they increase."""
        given = list(getattr(self, option))
        increases = first != 0 or given == sorted(given)
        if not given or len({*given}) < len(given) or not increases or (first is not None and given[0] != first):
            start = f", the first of them {first}" if first is not None else ""
            kind = "increasing numbers" if first == 0 else "different values"
            raise ValueError(f"{option}={as_typed(given)}: expected {kind}{start}")

    def branches(self) -> dict[str, Any]:
        """Name -> value of each branch."""
        return {str(value): value for value in getattr(self, self.grid)}

    def named_points(self) -> Sequence[str] | None:
        """The points of each branch that its options name; None: the model or the branch decides them."""
        return None

    def identity(self, branch: str) -> dict[str, Any]:
        """The options that decide the points of `branch`."""
        options = {key: value for key, value in vars(self).items() if key != self.grid}
        return {**options, "branch": self.branches()[branch], "attack": type(self).__qualname__}

    @abc.abstractmethod
    def reads(self) -> Sequence[str]:
        """The keys of `Task.hashes` of the rows that it reads."""

    def memory(self, of_weight: int) -> int:
        """The bytes for each weight of a model of `of_weight` bytes that it holds on the device at least."""
        return of_weight

    def content(self, task: Task) -> Any:
        """What else decides its points, beside what `reads` names; plain data."""
        return None

    def missing(self, task: Task) -> str | None:
        """Why it is not available for `task`, or None."""
        return None if FORGET in task.probes else f"task={task.name} has no probe {FORGET!r}"

    def rows_read(self, task: Task, template: Template) -> list[Item]:
        """The rows that the models have to read, beside those of the task."""
        return []

    @abc.abstractmethod
    def points(self, target: Target, branch: str) -> Found:
        """What `target` answers at each point of `branch`."""


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Name -> shape of each of its floating-point weights; one that is tied to another counts once."""
    return {name: list(p.shape) for name, p in model.named_parameters() if p.is_floating_point()}


def check_same_shapes(own: Mapping[str, list[int]], original: Mapping[str, list[int]], label: str) -> None:
    """Raises UsageError unless a model, named `label`, and the original have weights of the same names and shapes."""
    for name in dict.fromkeys([*original, *own]):
        if own.get(name) != original.get(name):
            found, expected = (shapes.get(name, "absent") for shapes in (own, original))
            raise UsageError(f"{label}: {name} is {found}, and {expected} in the original: {SAME}")
