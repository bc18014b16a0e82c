"""Fine-tuning: does a model learn what it forgot faster than one that never knew it?"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from transformers import TrainerCallback

from soul_exp.attacks.attack import FORGET, Attack, Found, Target
from soul_exp.data import Item, Part, Template
from soul_exp.errors import UsageError
from soul_exp.metrics.answers import Answers, Scores
from soul_exp.metrics.robustness import SPLITS
from soul_exp.models.language_model import LanguageModel
from soul_exp.optim import AdamW
from soul_exp.ranges import ANY_COUNT, COUNT, FILLED_OR_NULL, POSITIVE, SEED, Choice
from soul_exp.tasks.sources.text import HUB, general_items
from soul_exp.tasks.task import Probe, Task
from soul_exp.training.schedule import Schedule
from soul_exp.training.train import FINE_TUNING, train

BETAS = (0.9, 0.999)
BELOW_FP32 = ("master", "kahan", "stochastic")  # roundings that lose no small update
VALIDATION = f"validation_{FORGET}"  # its rows are unlearned too
T = TypeVar("T")
ROWS = ("forget", "related", "unrelated")


@dataclass(frozen=True, kw_only=True)
class Relearn(Attack):
    """AdamW without decay, at a constant learning rate, on the NLL of answer tokens, without dropout and clipping.

    The points of a learning rate are numbers of steps. All models see the same `rows` in the same order: "forget" (what
    was forgotten), "related" (rows of the same source in neither training nor any probe) or "unrelated" (general text
    of `source`, `num_unrelated` passages in no training and no probe). Sources: arXiv 2506.12618, 2502.05374; the
    control, arXiv 2506.00688.
    """

    rows: Annotated[str, Choice(ROWS)]
    lr: Sequence[Annotated[float, POSITIVE]]
    steps: Sequence[Annotated[int, ANY_COUNT]]  # from 0 on, the model as it is
    batch_size: Annotated[int, COUNT] = 4
    seed: Annotated[int, SEED] = 0
    rounding: Annotated[str, Choice(BELOW_FP32)] = "master"  # of bf16 weights
    source: Annotated[str | None, FILLED_OR_NULL] = "embedded"
    num_unrelated: Annotated[int, COUNT] = 100

    grid = "lr"

    def __post_init__(self) -> None:
        self.check("lr")
        self.check("steps", first=0)

    def reads(self) -> Sequence[str]:
        return (f"probe.{FORGET}", {"forget": "part.forget", "related": "rows.related"}.get(self.rows, "rows.target"))

    def missing(self, task: Task) -> str | None:
        if (why := super().missing(task)) is not None:
            return why
        if self.rows == "related" and not task.related:
            return task.missing.get("related", f"task={task.name} has no related rows")
        if self.rows == "unrelated" and self.source in HUB:  # read when the work begins
            return None
        return self._too_few(self.training_rows(task))

    def content(self, task: Task) -> Any:
        return [(item.prompt, item.answer, item.raw) for item in self.training_rows(task)]

    def named_points(self) -> Sequence[str]:
        return [str(step) for step in self.steps]

    def _too_few(self, rows: Sequence[Item]) -> str | None:
        found = f"{len(rows)} rows to tune on are fewer than batch_size={self.batch_size}: lower it"
        return found if len(rows) < self.batch_size else None

    def memory(self, of_weight: int) -> int:
        if of_weight == 4:
            return 16  # weight, gradient, both moments
        return 4 + {"master": 12, "kahan": 8, "stochastic": 6}[self.rounding]  # the second moment in fp32

    def training_rows(self, task: Task) -> list[Item]:
        """The rows that `points` trains on."""
        if self.rows == "forget":
            return [row[0] for row in task.parts["forget"].rows]
        if self.rows == "related":
            return list(task.related)
        read = [*task.target_rows, *(item for probe in task.probes.values() for item in probe.items)]
        known = {item.answer for item in read if item.raw}
        general = general_items(self.source, len(known) + self.num_unrelated, None, "source")
        return [item for item in general if item.answer not in known][: self.num_unrelated]

    def rows_read(self, task: Task, template: Template) -> list[Item]:
        return [] if self.rows == "unrelated" and self.source in HUB else self.training_rows(task)

    def points(self, target: Target, branch: str) -> Found:
        lm = target.load()
        found = self.tuned(target, lm, branch, self.training_rows(target.task), lambda: target.knowledge(lm))
        return {str(step): answers for step, answers in found.items()}

    def tuned(
        self, target: Target, lm: LanguageModel, branch: str, rows: Sequence[Item], knowledge: Callable[[], T]
    ) -> dict[int, T]:
        """Step -> what `knowledge` says there of `lm`, which is trained on `rows` at the learning rate of `branch`."""
        if why := self._too_few(rows):
            raise UsageError(f"{target.label}: {why}")
        watch = _Watch(self.steps, knowledge)
        # to the nearest, bf16 weights would lose the updates at these rates
        rounding = "nearest" if lm.model.dtype == torch.float32 else self.rounding
        with tempfile.TemporaryDirectory() as folder:
            train(
                lm.model,
                lm.reader,
                {"train": (Part.of(rows), lm.encode(rows))},
                objective=FINE_TUNING,
                make_optimizer=functools.partial(
                    AdamW, lr=self.branches()[branch], betas=BETAS, weight_decay=0.0, rounding=rounding, seed=self.seed
                ),
                schedule=Schedule(
                    epochs=1, batch_size=self.batch_size, lr_scheduler="constant", warmup_ratio=0.0, max_grad_norm=0.0,
                    max_steps=max(self.steps),
                ),
                seed=self.seed,
                pad_id=lm.pad_id,
                folder=Path(folder),
                label=target.label,
                device=target.device,
                callbacks=[watch],
                compute="attack",
            )  # fmt: skip
        for step in self.steps:  # of a training that diverged
            watch.at(step)
        return {step: watch.found[step] for step in self.steps}


@dataclass(frozen=True, kw_only=True)
class RetrainOnPart(Relearn):
    """Fine-tuning on one half of the forgotten units, measured on both; then the other way round.

    The halves are every other unit (author, passage, item) of the forget probe, in its order; the rows tuned on are
    all questions of the forget probes, the validation part included. Source: arXiv 2410.08827.
    """

    rows: Annotated[str, Choice(("forget",))] = "forget"

    def reads(self) -> Sequence[str]:
        return (f"probe.{FORGET}", f"probe.{VALIDATION}")

    def missing(self, task: Task) -> str | None:
        if (why := Attack.missing(self, task)) is not None:
            return why
        if len({*units_of(task.probes[FORGET])}) < 2:
            return f"all rows of the probe {FORGET} are of one {task.unit}, and it tunes on one half of them"
        halves = map(self._too_few, (rows for rows, _ in self.halves(task)))
        return next(filter(None, halves), None)

    def named_points(self) -> Sequence[str]:
        return [f"{name}-{half}-{step}" for name in SPLITS for step in self.steps for half in ("tuned", "left")]

    def content(self, task: Task) -> Any:
        return [[(item.prompt, item.answer) for item in rows] for rows, _ in self.halves(task)]

    def halves(self, task: Task) -> list[tuple[list[Item], np.ndarray]]:
        """The rows to tune on, and which items of the forget probe are of their units, [N]; of both ways round."""
        probe = task.probes[FORGET]
        units = list(dict.fromkeys(units_of(probe)))
        known = [each for each in (probe, task.probes.get(VALIDATION)) if each is not None]
        rows = [(item, unit) for each in known for item, unit in zip(each.items, units_of(each), strict=True)]
        return [
            ([item for item, unit in rows if unit in tuned], np.isin(units_of(probe), tuned))
            for tuned in (units[::2], units[1::2])
        ]

    def points(self, target: Target, branch: str) -> Found:
        found: dict[str, Answers | Scores] = {}
        for name, (rows, inside) in zip(SPLITS, self.halves(target.task), strict=True):
            lm = target.load()
            for step, answers in self.tuned(target, lm, branch, rows, lambda lm=lm: target.knowledge(lm)).items():  # type: ignore[misc]
                found[f"{name}-tuned-{step}"] = answers.take(np.flatnonzero(inside))
                found[f"{name}-left-{step}"] = answers.take(np.flatnonzero(~inside))
        return found


def units_of(probe: Probe) -> list[str]:
    """The unit of each item, its number where it is one of its own."""
    return list(probe.units) if probe.units is not None else [str(number) for number in range(len(probe.items))]


class _Watch(TrainerCallback):
    """What `knowledge` says after each of `steps` steps."""

    def __init__(self, steps: Sequence[int], knowledge: Callable[[], Any]) -> None:
        self.steps, self.knowledge, self.found = steps, knowledge, dict[int, Any]()

    def at(self, step: int) -> None:
        if step in self.steps and step not in self.found:
            self.found[step] = self.knowledge()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at(state.global_step)
