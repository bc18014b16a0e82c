"""How long a training lasts, how many rows it reads in a step, and when it counts as diverged."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from soul_exp.errors import UsageError

LABELS = {"loss": "loss", "forget_loss": "forget loss", "retain_loss": "retain loss", "retain_nll": "retain NLL"}


@dataclass(frozen=True)
class Schedule:
    """Length and sizes of a training; every count is in optimizer steps, every size in rows of each part."""

    epochs: float  # passes over the leading part
    batch_size: int  # rows of each part in a step, over all processes and micro-batches
    micro_batch_size: int | None = None  # rows of each part in a forward pass of one process; None: no accumulation
    lr_scheduler: str = "linear"
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    max_steps: int | None = None  # stop there, whatever `epochs` is
    logging_steps: int = 5
    save_steps: int | None = None  # a multiple of logging_steps; None: no checkpoints
    diverged_at: float | None = None  # limit of the retain loss, as a multiple of max(its start, diverged_floor)
    diverged_floor: float = 0.1  # nats per token: a memorised retain set starts near 0
    log_gradients: bool = False  # norms and cosine of both terms' gradients; costs one more step each time
    gradient_checkpointing: bool = False  # less memory, one more forward pass; changes no number
    dropout: bool = False  # the model's own; a trained adapter has its own

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps on a leading part of `num_rows` rows."""
        return self.max_steps or max(1, round(self.epochs * num_rows / self.batch_size))

    def in_one_step(self, num_rows: int) -> Self:
        """The schedule of a method that takes one step: all `num_rows` rows, the full learning rate, no clipping."""
        most = min(self.micro_batch_size or self.batch_size, num_rows)
        return replace(
            self,
            batch_size=num_rows,
            micro_batch_size=next(size for size in range(most, 0, -1) if num_rows % size == 0),
            lr_scheduler="constant",
            lr_scheduler_kwargs=None,
            warmup_ratio=0.0,
            max_grad_norm=0.0,
            max_steps=1,
        )

    def accumulation(self, processes: int) -> int:
        """Micro-batches of each process in a step. Raises UsageError if the sizes do not divide."""
        micro = self.micro_batch_size or self.batch_size // processes
        if not micro or self.batch_size % (micro * processes):
            raise UsageError(
                f"train.batch_size={self.batch_size} is not a multiple of {processes} process(es) x "
                f"train.micro_batch_size={micro}: change one of them"
            )
        return self.batch_size // (micro * processes)

    def divergence(
        self, logs: Mapping[str, float], history: Sequence[Mapping[str, Any]], when: str, num_nonfinite: int = 0
    ) -> str | None:
        """Why a training whose last numbers are `logs` has diverged; None if it has not.

        `num_nonfinite` counts gradient coordinates that are not finite, `history` is what was logged before.
        """
        lost = next((key for key in LABELS if not math.isfinite(logs.get(key, 0.0))), None)
        if lost:
            return f"the {LABELS[lost]} is {logs[lost]} {when}"
        if num_nonfinite:
            return f"{num_nonfinite} gradient coordinates are not finite {when}"
        limit, floor = self.diverged_at, self.diverged_floor
        for key in ("retain_loss", "retain_nll") if limit is not None else ():
            start = next((entry[key] for entry in history if key in entry), None)
            if key in logs and start is not None and not logs[key] <= limit * max(start, floor):
                most = f"{limit:g} x max({start:.3g} at the start, {floor:g})"
                return f"the {LABELS[key]} is {logs[key]:.3g} {when}, above {most}"
        return None
