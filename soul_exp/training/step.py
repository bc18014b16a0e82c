"""An optimizer step about to be taken: its micro-batches, and how the engine runs the model on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from soul_exp.models.layers import AnswerReader
from soul_exp.training.capabilities import CurvaturePass

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """The micro-batches of this rank, and the model with what computes losses on them."""

    number: int  # steps taken before this one
    micro_batches: Sequence[Batch]  # this rank's
    num_rows: int  # rows of each part in a micro-batch
    model: Any  # as the engine has wrapped it
    module: nn.Module  # not wrapped
    engine: Any | None  # DeepSpeed's
    reader: AnswerReader
    cut_to: Callable[[Batch, Sequence[str]], Batch]  # a micro-batch with the rows of some parts only, on the device
    loss: Callable[[nn.Module, Batch], Tensor]  # the run's loss of a micro-batch, a mean over its rows
    terms: Callable[[nn.Module, Batch], tuple[Tensor, Tensor | None]]  # its forget and retain term
    seed: int
    rank: int
    num_ranks: int

    @property
    def params(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it dropout is off."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    def backward(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Leave the gradient of the sum of `losses`, over all ranks, where the engine keeps gradients."""
        for i, loss in enumerate(losses):
            last = i == len(losses) - 1
            with contextlib.nullcontext() if last or self.engine or self.num_ranks == 1 else self.model.no_sync():
                value = self.num_ranks * loss()  # engines average over ranks, and a sum is wanted
                if self.engine is None:
                    value.backward()
                else:
                    self.engine.set_gradient_accumulation_boundary(last)
                    self.engine.backward(value, scale_wrt_gas=False)

    def hand_over_curvature(self, optimizer: CurvaturePass) -> None:
        """Let `optimizer` take the pending gradient, unclipped, as that of its curvature pass."""
        with optimizer.refreshing():
            if self.engine is None:
                assert isinstance(optimizer, Optimizer)
                optimizer.step()
                optimizer.zero_grad()
                return
            # not engine.step(), which advances counters and schedule
            clip, self.engine.optimizer.clip_grad = self.engine.optimizer.clip_grad, 0.0
            try:
                self.engine.optimizer.step()
                self.engine.optimizer.zero_grad()
            finally:
                self.engine.optimizer.clip_grad = clip
