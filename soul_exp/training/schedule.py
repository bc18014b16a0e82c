"""How long a training lasts, and in what portions it sees its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from soul_exp.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """How long and in what portions to train; every count is of optimizer steps, every size of rows of each part."""

    epochs: float  # passes over the leading part
    batch_size: int  # rows of each part a step, over all processes and accumulation
    micro_batch_size: int | None = None  # rows of each part a forward pass of one process; None: no accumulation
    lr_scheduler: str = "linear"
    lr_scheduler_kwargs: Mapping[str, Any] | None = None
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    max_steps: int | None = None  # stop there, whatever `epochs` says
    logging_steps: int = 5
    save_steps: int | None = None  # None: no checkpoints
    diverged_at: float | None = None  # retain loss, as a multiple of max(its start, diverged_floor)
    diverged_floor: float = 0.1  # nats a token: a memorised retain set starts near 0
    log_gradients: bool = False  # norms and cosine of both terms' gradients, at the price of a step more each time
    gradient_checkpointing: bool = False  # less memory, a forward pass more; changes no number
    dropout: bool = False  # the model's own; an adapter that is trained has one of its own

    def __post_init__(self) -> None:
        if self.save_steps and self.save_steps % self.logging_steps:  # else a resumed run logs another window
            raise UsageError(
                f"train.save_steps={self.save_steps} is not a multiple of train.logging_steps={self.logging_steps}: "
                f"change one of them"
            )

    def num_steps(self, num_rows: int) -> int:
        return self.max_steps or max(1, round(self.epochs * num_rows / self.batch_size))

    def in_one_step(self, num_rows: int) -> Schedule:
        """All `num_rows` rows in a single step at the full rate, unclipped: what a static method takes."""
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
        """Micro-batches a process and step; raises UsageError if the sizes do not divide."""
        micro = self.micro_batch_size or self.batch_size // processes
        if not micro or self.batch_size % (micro * processes):
            raise UsageError(
                f"train.batch_size={self.batch_size} is not a multiple of {processes} process(es) x "
                f"train.micro_batch_size={micro}: change one of them"
            )
        return self.batch_size // (micro * processes)
