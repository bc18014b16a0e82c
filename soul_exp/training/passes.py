"""An optimizer step about to be taken, and the passes before it that need no curvature.

A pass runs before the step's own gradient is taken, on the step's own micro-batches, with no gradient pending, and
leaves weights (except in `ascend`), momentum, schedule and order of data as they were. All ranks call it together.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from soul_exp.distributed import ranks, zero3
from soul_exp.losses import Scored
from soul_exp.models.layers import AnswerReader
from soul_exp.training.capabilities import Ascent, CurvaturePass, Probe

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


def ascend(step: Step, optimizer: Ascent) -> None:
    """Give a sharpness-aware optimizer the gradient of the whole step, all micro-batches and ranks, to ascend along."""

    def share(micro_batch: Batch) -> Tensor:
        return step.loss(step.model, micro_batch) / (len(step.micro_batches) * step.num_ranks)

    step.backward([partial(share, micro_batch) for micro_batch in step.micro_batches])
    optimizer.ascend()


def probe_loss(step: Step, optimizer: Probe) -> Tensor:
    """The mean of the losses that a zeroth-order optimizer has measured for its step, without a backward pass."""

    @torch.no_grad()
    def loss() -> Tensor:
        return _mean([step.loss(step.model, micro_batch) for micro_batch in step.micro_batches])

    with zero3.evaluating(step.module):
        return torch.as_tensor(optimizer.estimate(loss))


def retain_nll(step: Step) -> Tensor:
    """The mean NLL per token of the step's retain rows, in nats; dropout off, no gradient."""
    with zero3.evaluating(step.module), torch.no_grad():
        batches = [step.cut_to(micro_batch, ["retain"]) for micro_batch in step.micro_batches]
        scored = [Scored(step.reader(step.model, batch), batch["labels"]) for batch in batches]
        return _mean([rows.mean_nll.mean() for rows in scored], torch.float64)


def _mean(values: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The mean over all micro-batches and ranks, `values` being this rank's."""
    return ranks.sum_over_ranks(torch.stack(values).to(dtype).mean()) / ranks.num_ranks()


def gradient_conflict(step: Step) -> dict[str, float]:
    """Norms of the gradients of the forget and the retain term in this step, and the cosine between them, -1 to 1.

    Before gamma and clipping; costs a forward and two backward passes. Below 0 descending one term ascends the other.
    """
    params = step.params
    sums = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2)]
    share = 1 / (len(step.micro_batches) * step.num_ranks)
    with zero3.evaluating(step.module):
        for micro_batch in step.micro_batches:
            terms = [term for term in step.terms(step.module, micro_batch) if term is not None]
            for totals, term in zip(sums, terms, strict=False):  # without a retain term its sums stay 0
                again = term is not terms[-1]
                gradients = torch.autograd.grad(share * term, params, retain_graph=again, materialize_grads=True)
                for total, gradient in zip(totals, gradients, strict=True):
                    total += gradient
    for total in (*sums[0], *sums[1]):
        ranks.sum_over_ranks(total)
    forget, retain = (torch.stack([(a * a).sum() for a in side]).sum().sqrt() for side in sums)
    inner = torch.stack([(a * b).sum() for a, b in zip(*sums, strict=True)]).sum()
    found = {"forget_gradient_norm": float(forget)}
    if len(terms) > 1:
        found["retain_gradient_norm"] = float(retain)
    if float(forget) > 0 and float(retain) > 0:  # a saturated term has no direction
        found["gradient_cosine"] = float(inner / (forget * retain))
    return found
