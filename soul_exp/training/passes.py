"""What optimizers ask of a step besides curvature, and what is measured before one: gradients and losses of its rows.

Each pass runs before the step's own gradient is taken, on the step's own micro-batches, with no gradient pending, and
leaves weights (except in `ascend`), momentum, schedule and order of data as they were. All ranks call it together.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from soul_exp.data import pad, seed_of
from soul_exp.distributed import ranks
from soul_exp.losses import Scored
from soul_exp.training import curvature
from soul_exp.training.capabilities import Ascent, Capabilities, Probe, RowGradients
from soul_exp.training.step import Batch, Step
from soul_exp.training.stream import Stream


def before_step(step: Step, asks: Capabilities, stream: Stream, pad_id: int) -> Tensor | None:
    """Make all passes that the optimizer asks for; returns the loss that it measured in place of a gradient, if so."""
    if asks.row_gradients is not None:
        collect_row_gradients(step, asks.row_gradients, stream, pad_id)
    if asks.curvature is not None and curvature.is_due(asks.curvature, step.number):
        curvature.refresh_curvature(step, asks.curvature)
    if asks.ascent is not None:
        ascend(step, asks.ascent)
    if asks.probe is not None and asks.probe.zeroth:
        return probe_loss(step, asks.probe)
    return None


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

    with step.evaluating():
        return torch.as_tensor(optimizer.estimate(loss))


def retain_nll(step: Step) -> Tensor:
    """The mean NLL per token of the step's retain rows, in nats; dropout off, no gradient."""
    with step.evaluating(), torch.no_grad():
        batches = [step.cut_to(micro_batch, ["retain"]) for micro_batch in step.micro_batches]
        scored = [Scored(step.reader(step.model, batch), batch["labels"]) for batch in batches]
        return _mean([rows.mean_nll.mean() for rows in scored], torch.float64)


def _mean(values: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The mean over all micro-batches and ranks, `values` being this rank's."""
    return ranks.sum_over_ranks(torch.stack(values).to(dtype).mean()) / ranks.num_ranks()


def collect_row_gradients(step: Step, optimizer: RowGradients, stream: Stream, pad_id: int) -> None:
    """Give an influence optimizer the gradients of the NLL per token of single rows, and its `ratio` N_f / N_r.

    `optimizer.num_samples` rows, drawn without replacement from the retain part or, with `hessian` "all", from both;
    with `estimator` "gnb" of labels sampled from the model, else of their own (the empirical Fisher).
    """
    device = step.params[0].device
    if optimizer.ratio is None:
        optimizer.ratio = stream.num_rows["forget"] / stream.num_rows["retain"]
    parts = ["retain"] if optimizer.hessian == "retain" else ["forget", "retain"]
    rows = [(part, encoded) for part in parts for encoded in stream.encoded[part]]
    drawn = np.random.default_rng(seed_of("influence", step.seed)).permutation(len(rows))[: optimizer.num_samples]
    with step.evaluating():
        for place, (part, encoded) in enumerate(rows[i] for i in drawn):
            batch = {key: value.to(device) for key, value in pad([encoded], pad_id).items()}
            batch["places"] = torch.tensor([place])
            if optimizer.estimator == "gnb":
                curvature.sampled_loss(step, batch, [part], 1).backward()
            else:
                Scored(step.reader(step.module, batch), batch["labels"]).mean_nll.sum().backward()
            optimizer.add_sample()


def gradient_conflict(step: Step) -> dict[str, float]:
    """Norms of the gradients of the forget and the retain term in this step, and the cosine between them, -1 to 1.

    Before gamma and clipping; costs a forward and two backward passes. A cosine below 0 is a conflict: descending one
    term ascends the other.
    """
    params = step.params
    sums = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2)]
    share = 1 / (len(step.micro_batches) * step.num_ranks)
    with step.evaluating():
        for micro_batch in step.micro_batches:
            terms = step.terms(step.module, micro_batch)
            for i, term in enumerate(terms):
                if term is None:
                    continue
                again = i + 1 < len(terms) and terms[i + 1] is not None
                gradients = torch.autograd.grad(share * term, params, retain_graph=again, materialize_grads=True)
                for total, gradient in zip(sums[i], gradients, strict=True):
                    total += gradient
    for total in (*sums[0], *sums[1]):
        ranks.sum_over_ranks(total)
    forget, retain = (torch.stack([(a * a).sum() for a in side]).sum().sqrt() for side in sums)
    inner = torch.stack([(a * b).sum() for a, b in zip(*sums, strict=True)]).sum()
    found = {"forget_gradient_norm": float(forget)}
    if terms[1] is not None:
        found["retain_gradient_norm"] = float(retain)
    if float(forget) > 0 and float(retain) > 0:  # a saturated term has no direction
        found["gradient_cosine"] = float(inner / (forget * retain))
    return found
