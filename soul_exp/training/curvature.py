"""What optimizers ask of a step: curvature, row gradients and more. B rows, T answer positions, V vocabulary."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from soul_exp import compat
from soul_exp.data import pad, seed_of, some_rows
from soul_exp.distributed import ranks, zero3
from soul_exp.losses import IGNORED, Scored
from soul_exp.losses.scored import precise
from soul_exp.training.capabilities import Capabilities, CurvaturePass, RowGradients
from soul_exp.training.passes import Batch, Step, ascend, probe_loss
from soul_exp.training.stream import Stream

SAMPLED = ("gnb", "hutchinson")  # estimators whose estimate is computed here
CURVATURE_PARTS = {"retain": ("retain",), "forget": ("forget",), "both": ("forget", "retain")}


def before_step(step: Step, requested: Capabilities, stream: Stream, pad_id: int) -> Tensor | None:
    """Make all passes that the optimizer requests; returns the loss that it measured in place of a gradient, if so."""
    if requested.row_gradients is not None:
        collect_row_gradients(step, requested.row_gradients, stream, pad_id)
    due = requested.curvature
    begins = step.number == stream.start  # where the optimizer has no curvature yet, as after resume=weights
    if due is not None and due.estimator in SAMPLED and (begins or step.number % due.interval == 0):
        refresh_curvature(step, due)
    if requested.ascent is not None:
        ascend(step, requested.ascent)
    if requested.probe is not None and requested.probe.zeroth:
        return probe_loss(step, requested.probe)
    return None


def passes_per_step(requested: Capabilities, num_steps: int, batch_size: int, num_parts: int) -> dict[str, float]:
    """Mean "forward" and "backward" passes of a step through the model; empty for no steps.

    Of the step's gradient, 1 and 1, and of what `before_step` adds: a function of what the optimizer requests, so that
    an interrupted training has the same. The unit is the rows that the loss reads in a step, `batch_size` of each of
    its `num_parts` parts. Left out: passes for logs, validation and the reference, the recomputation of gradient
    checkpointing, and rows that a rank reads without effect to stay in step.
    """
    if not num_steps:
        return {}
    losses = [requested.probe.num_losses(step) for step in range(num_steps)] if requested.probe else [0] * num_steps
    gradients = losses.count(0) + (num_steps if requested.ascent else 0)
    unit = batch_size * num_parts
    forward, backward = (gradients + sum(losses)) * unit, gradients * unit  # rows in all steps
    if requested.row_gradients:
        forward, backward = (rows + num_steps * requested.row_gradients.num_samples for rows in (forward, backward))
    if (due := requested.curvature) and due.estimator in SAMPLED:
        rows = len(CURVATURE_PARTS[due.curvature_on or "retain"]) * min(due.curvature_rows or batch_size, batch_size)
        rows *= math.ceil(num_steps / due.interval)
        forward, backward = forward + rows, backward + rows * (2 if due.estimator == "hutchinson" else 1)
    return {"forward": forward / (num_steps * unit), "backward": backward / (num_steps * unit)}


def summary(optimizer: CurvaturePass, batch_size: int) -> str | None:
    """One line for the log: which curvature passes a run makes; None if it makes none."""
    if optimizer.estimator not in SAMPLED:
        return None
    rows = min(optimizer.curvature_rows or batch_size, batch_size)
    twice = ", through attention that can be differentiated twice" if optimizer.estimator == "hutchinson" else ""
    parts = " and ".join(CURVATURE_PARTS[optimizer.curvature_on or "retain"])
    return f"{optimizer.estimator} curvature of {rows} {parts} rows every {optimizer.interval} steps{twice}"


def refresh_curvature(step: Step, optimizer: CurvaturePass) -> None:
    """Hand `optimizer` one estimate of the diagonal curvature of the NLL of `curvature_on`, never of the run's loss.

    The NLL is `mean(l_i / n_i)` over the rows of a part (l_i the summed NLL, n_i the tokens of answer i), the parts'
    sum if there are two; `curvature_rows` of each are drawn from the step's. Dropout off, no clipping.
    """
    parts = CURVATURE_PARTS[optimizer.curvature_on or "retain"]
    with zero3.evaluating(step.module):
        batches, num_rows = _batches(step, parts, optimizer.curvature_rows)
        if optimizer.estimator == "gnb":
            step.backward([partial(sampled_loss, step, batch, parts, num_rows) for batch in batches])
        else:
            estimates = hutchinson(step, batches, parts, num_rows)
            if step.engine is None:
                for p, estimate in zip(step.params, estimates, strict=True):
                    p.grad = estimate
            else:  # ZeRO takes gradients from a backward pass only: this loss has the estimates for its gradient
                linear = torch.stack([(p * c).sum() for p, c in zip(step.params, estimates, strict=True)]).sum()
                step.backward([lambda: linear / step.num_ranks])
    step.hand_over_curvature(optimizer)


def _batches(step: Step, parts: Sequence[str], max_rows: int | None) -> tuple[list[Batch], int]:
    """This rank's micro-batches cut to `parts` and to the rows that the pass reads, and the number of those in all.

    Rows are drawn, because they stand by length in a step. Micro-batch i of rank r is number `i num_ranks + r` of the
    step, so that they do not depend on the split. `places` [B] are the rows' positions in the step.
    """
    available = len(step.micro_batches) * step.num_ranks * step.num_rows
    wanted = min(max_rows or available, available)
    drawn = np.random.default_rng(seed_of("curvature rows", step.seed, step.number)).permutation(available)[:wanted]
    batches = []
    for i, micro_batch in enumerate(step.micro_batches):
        start = (i * step.num_ranks + step.rank) * step.num_rows
        rows = [row for row in range(step.num_rows) if start + row in drawn]
        if not rows and step.num_ranks == 1:
            continue
        batch = step.cut_to(micro_batch, parts)
        batch = {**batch, "places": torch.arange(start, start + step.num_rows).repeat(len(parts))}
        if 0 < len(rows) < step.num_rows:
            batch = some_rows(batch, torch.tensor([k * step.num_rows + row for k in range(len(parts)) for row in rows]))
        if not rows:  # ranks run the same number of backward passes: this one adds nothing
            batch = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
        batches.append(batch)
    return batches, wanted


def sampled_loss(step: Step, batch: Batch, parts: Sequence[str], num_rows: int) -> Tensor:
    """`sum_t sqrt(w_t) CE(z_t, y_t)`, y_t sampled from the model: the square of its gradient is the gnb estimate.

    `w_t = 1 / (S n_i)` is label t's weight in the mean over the S = `num_rows` sequences of its part, so the expected
    square is the exact diagonal of the Gauss-Newton matrix of that mean. Source: Liu et al. 2023, algorithm 2.
    """
    logits = precise(step.reader(step.model, batch))
    sampled = Scored(logits, sampled_labels(logits.detach(), batch, parts, (step.seed, step.number)))
    num_tokens = sampled.num_tokens.clamp(min=1)[:, None]
    return (-sampled.logp * (1 / (num_rows * num_tokens)).sqrt()).sum()


def sampled_labels(logits: Tensor, batch: Batch, parts: Sequence[str], key: tuple[int, int]) -> Tensor:
    """[B, T] labels drawn from softmax(`logits` [B, T, V]) by random numbers that `key`, part and place fix.

    -100 where padded. By place, not by row: cross terms of equal rows' gradients vanish only if each draws for itself.
    """
    uniform = torch.zeros(logits.shape[:2], dtype=logits.dtype)
    size, counts = len(logits) // len(parts), (batch["labels"] != IGNORED).sum(1).tolist()
    for i, (place, count) in enumerate(zip(batch["places"].tolist(), counts, strict=True)):
        generator = torch.Generator().manual_seed(seed_of("gnb", *key, parts[i // size], place))
        uniform[i, :count] = torch.rand(count, generator=generator)
    cumulative = logits.softmax(-1).cumsum(-1)
    wanted = uniform.to(logits.device)[..., None] * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
    return torch.where(batch["labels"] != IGNORED, drawn, IGNORED)


def hutchinson(step: Step, batches: Sequence[Batch], parts: Sequence[str], num_rows: int) -> list[Tensor]:
    """`u * (H u)` for each parameter, H the Hessian of the NLL and u ~ N(0, I), equal for all micro-batches and ranks.

    Its expectation over u is the diagonal of H. It takes two backward passes for each micro-batch, through an attention
    that can be differentiated twice. Source: Hutchinson 1989; Liu et al. 2023, algorithm 1.
    """
    params = step.params
    directions = []
    for i, p in enumerate(params):
        generator = torch.Generator(p.device).manual_seed(seed_of("hutchinson", step.seed, step.number, i))
        directions.append(torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype))
    products = [torch.zeros_like(p) for p in params]
    with twice_differentiable_attention(step.module):
        for batch in batches:
            scored = Scored(step.reader(step.module, batch), batch["labels"])
            mean_nll = (scored.nll / scored.num_tokens.clamp(min=1)).sum() / num_rows
            gradients = torch.autograd.grad(mean_nll, params, create_graph=True, materialize_grads=True)
            along = sum((g * u).sum() for g, u in zip(gradients, directions, strict=True))
            assert isinstance(along, Tensor)
            rows = torch.autograd.grad(along, params, materialize_grads=True)
            for product, row in zip(products, rows, strict=True):
                product += row
    for product in products:
        ranks.sum_over_ranks(product)
    return [u * product for u, product in zip(directions, products, strict=True)]


@contextlib.contextmanager
def twice_differentiable_attention(module: Any) -> Iterator[None]:
    """In the block, attention can be differentiated twice, which the fast kernels cannot."""
    kernel = compat.attention_of(module)
    with contextlib.ExitStack() as stack:
        if kernel == "sdpa":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        elif kernel not in (None, "eager"):
            module.set_attn_implementation("eager")
            stack.callback(module.set_attn_implementation, kernel)
        yield


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
    with zero3.evaluating(step.module):
        for place, (part, encoded) in enumerate(rows[i] for i in drawn):
            batch = {key: value.to(device) for key, value in pad([encoded], pad_id).items()}
            batch["places"] = torch.tensor([place])
            if optimizer.estimator == "gnb":
                sampled_loss(step, batch, [part], 1).backward()
            else:
                Scored(step.reader(step.module, batch), batch["labels"]).mean_nll.sum().backward()
            optimizer.add_sample()
