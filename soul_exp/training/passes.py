"""What an optimizer asks of a step beyond the gradient of its loss: curvature, a climb, a probe, single rows.

Each pass runs before the step's own gradient is taken, on the step's own micro-batches, with no gradient pending, and
leaves weights, momentum, schedule and order of data as they were. B rows, T answer positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from soul_exp import compat
from soul_exp.data import pad, seed_of, some_rows
from soul_exp.losses import IGNORED, Scored
from soul_exp.models.layers import AnswerReader
from soul_exp.training.stream import Stream

Batch = dict[str, Tensor]
SAMPLED = ("gnb", "hutchinson")  # estimators whose estimate comes from a pass of ours, every optimizer.interval steps
CURVATURE_PARTS = {"retain": ("retain",), "forget": ("forget",), "both": ("forget", "retain")}


@dataclass(frozen=True)
class Step:
    """An optimizer step about to be taken: its micro-batches, and how the model is run on them."""

    number: int  # steps taken before this one
    samples: Sequence[Batch]  # this rank's micro-batches
    num_rows: int  # rows of each part in a micro-batch
    model: Any  # as the engine has wrapped it
    module: nn.Module  # bare
    engine: Any | None  # DeepSpeed's
    reader: AnswerReader
    optimizer: Any
    rows_of: Callable[[Batch, Sequence[str]], Batch]  # a micro-batch cut down to some parts, on the device
    loss: Callable[[nn.Module, Batch], Tensor]  # the run's loss of a micro-batch, a mean over its rows
    terms: Callable[[nn.Module, Batch], tuple[Tensor, Tensor | None]]  # its forget and retain term
    seed: int
    rank: int
    world: int

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    def backward(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Leave the gradient of the sum of `losses`, over all ranks, where the engine keeps gradients."""
        for i, loss in enumerate(losses):
            last = i == len(losses) - 1
            with contextlib.nullcontext() if last or self.engine or self.world == 1 else self.model.no_sync():
                value = self.world * loss()  # engines average over ranks, and a sum is wanted
                if self.engine is None:
                    value.backward()
                else:
                    self.engine.set_gradient_accumulation_boundary(last)
                    self.engine.backward(value, scale_wrt_gas=False)

    def refresh(self) -> None:
        """Let the optimizer take the pending gradient for its curvature pass's, unclipped."""
        with self.optimizer.refreshing():
            if self.engine is None:
                self.optimizer.step()
                self.optimizer.zero_grad()
                return
            # not engine.step(), which advances counters and schedule
            clip, self.engine.optimizer.clip_grad = self.engine.optimizer.clip_grad, 0.0
            try:
                self.engine.optimizer.step()
                self.engine.optimizer.zero_grad()
            finally:
                self.engine.optimizer.clip_grad = clip


# --- curvature ----------------------------------------------------------------------------------------------------


def curvature_is_due(optimizer: Any, number: int) -> bool:
    """Whether step `number` (from 0) begins with a curvature pass: the first one, then every `interval` steps."""
    return _takes_passes(optimizer) and number % optimizer.interval == 0


def announced(optimizer: Any, batch_size: int) -> str | None:
    """One line for the log: what curvature passes a run will make; None if it makes none."""
    if not _takes_passes(optimizer):
        return None
    rows = min(optimizer.curvature_rows or batch_size, batch_size)
    twice = ", through attention that can be differentiated twice" if optimizer.estimator == "hutchinson" else ""
    parts = " and ".join(CURVATURE_PARTS[optimizer.curvature_on])
    return f"{optimizer.estimator} curvature of {rows} {parts} rows every {optimizer.interval} steps{twice}"


def _takes_passes(optimizer: Any) -> bool:
    return hasattr(optimizer, "refreshing") and optimizer.estimator in SAMPLED


def refresh_curvature(step: Step) -> None:
    """One estimate of the diagonal curvature of the NLL of `optimizer.curvature_on`, handed to the optimizer.

    The NLL is `mean(l_i / n_i)` over the rows of a part, the parts' sum if there are two; it never is the loss of the
    run. `optimizer.curvature_rows` rows of each part, drawn from the step's, or all. Dropout off, no clipping.
    """
    parts = CURVATURE_PARTS[step.optimizer.curvature_on]
    with step.evaluating():
        batches, num_rows = _curvature_batches(step, parts)
        if step.optimizer.estimator == "gnb":
            step.backward([partial(sampled_loss, step, batch, parts, num_rows) for batch in batches])
        else:
            estimates = hutchinson(step, batches, parts, num_rows)
            if step.engine is None:
                for p, estimate in zip(step.params, estimates, strict=True):
                    p.grad = estimate
            else:  # ZeRO takes gradients from a backward pass only: this loss has the estimates for its gradient
                linear = torch.stack([(p * c).sum() for p, c in zip(step.params, estimates, strict=True)]).sum()
                step.backward([lambda: linear / step.world])
    step.refresh()


def _curvature_batches(step: Step, parts: Sequence[str]) -> tuple[list[Batch], int]:
    """This rank's micro-batches cut down to `parts` and to the rows that the pass reads, and how many those are in all.

    Of a sub-batch the rows are drawn, not the first: rows stand by length in a step. Micro-batch i of rank r is number
    `i world + r` of the step, so that they do not depend on the split. `places` [B] are the rows' places in the step.
    """
    available = len(step.samples) * step.world * step.num_rows
    wanted = min(step.optimizer.curvature_rows or available, available)
    drawn = np.random.default_rng(seed_of("curvature rows", step.seed, step.number)).permutation(available)[:wanted]
    batches = []
    for i, sample in enumerate(step.samples):
        start = (i * step.world + step.rank) * step.num_rows
        rows = [row for row in range(step.num_rows) if start + row in drawn]
        if not rows and step.world == 1:
            continue
        batch = step.rows_of(sample, parts)
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
    logits = step.reader(step.model, batch)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = sampled_labels(logits.detach(), batch, parts, (step.seed, step.number))
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    ce = ce.view_as(labels)
    num_tokens = (batch["labels"] != IGNORED).sum(1, keepdim=True).clamp(min=1)
    return (ce * (1 / (num_rows * num_tokens)).sqrt()).sum()


def sampled_labels(logits: Tensor, batch: Batch, parts: Sequence[str], key: tuple[int, int]) -> Tensor:
    """[B, T] labels drawn from softmax(`logits`) by numbers keyed by `key`, part and place; -100 where padded.

    Not by row: two copies of a row in a step draw independently, else the cross terms of their gradients stay.
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
    """`u * (H u)` a parameter, H the Hessian of the NLL and u ~ N(0, I), the same u for all micro-batches and ranks.

    Its expectation over u is the diagonal of H. Two backward passes a micro-batch, through an attention that can be
    differentiated twice. Source: Hutchinson 1989; Liu et al. 2023, algorithm 1.
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
    if step.world > 1:
        for product in products:
            dist.all_reduce(product)
    return [u * product for u, product in zip(directions, products, strict=True)]


@contextlib.contextmanager
def twice_differentiable_attention(module: Any) -> Iterator[None]:
    """Attention with a double backward, which the fast kernels lack, for as long as the context lasts."""
    kernel = compat.attention_of(module)
    with contextlib.ExitStack() as stack:
        if kernel == "sdpa":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        elif kernel not in (None, "eager"):
            module.set_attn_implementation("eager")
            stack.callback(module.set_attn_implementation, kernel)
        yield


# --- other optimizers' passes -------------------------------------------------------------------------------------


def climb(step: Step) -> None:
    """Give a sharpness-aware optimizer the whole step's gradient, all micro-batches and ranks, to climb along."""

    def share(sample: Batch) -> Tensor:
        return step.loss(step.model, sample) / (len(step.samples) * step.world)

    step.backward([partial(share, sample) for sample in step.samples])
    step.optimizer.ascend()


def estimate_without_gradient(step: Step) -> Tensor:
    """Let a zeroth-order optimizer probe the whole step's loss, without a backward pass; returns the mean loss seen."""

    @torch.no_grad()
    def loss() -> Tensor:
        mean = torch.stack([step.loss(step.model, sample) for sample in step.samples]).mean()
        if step.world > 1:
            dist.all_reduce(mean)
            mean /= step.world
        return mean

    with step.evaluating():
        return torch.as_tensor(step.optimizer.estimate(loss))


def retain_nll(step: Step) -> Tensor:
    """The mean NLL per token of the step's retain rows, over all micro-batches and ranks; dropout off, no gradient."""
    with step.evaluating(), torch.no_grad():
        batches = [step.rows_of(sample, ["retain"]) for sample in step.samples]
        scored = [Scored(step.reader(step.model, batch), batch["labels"]) for batch in batches]
        mean = torch.stack([rows.mean_nll.mean() for rows in scored]).double().mean()
    if step.world > 1:
        dist.all_reduce(mean)
        mean /= step.world
    return mean


def collect_samples(step: Step, stream: Stream, pad_id: int) -> None:
    """Give an influence optimizer the gradients of the NLL per token of single rows, and its `ratio` N_f / N_r.

    `optimizer.num_samples` rows, drawn without replacement from the retain part or, with `hessian` "all", from both;
    with `estimator` "gnb" of labels sampled from the model, else of their own (the empirical Fisher).
    """
    optimizer, device = step.optimizer, step.params[0].device
    if optimizer.ratio is None:
        optimizer.ratio = stream.num_rows["forget"] / stream.num_rows["retain"]
    sides = ["retain"] if optimizer.hessian == "retain" else ["forget", "retain"]
    rows = [(part, encoded) for part in sides for encoded in stream.encoded[part]]
    drawn = np.random.default_rng(seed_of("influence", step.seed)).permutation(len(rows))[: optimizer.num_samples]
    with step.evaluating():
        for place, (part, encoded) in enumerate(rows[i] for i in drawn):
            batch = {key: value.to(device) for key, value in pad([encoded], pad_id).items()}
            batch["places"] = torch.tensor([place])
            if optimizer.estimator == "gnb":
                sampled_loss(step, batch, [part], 1).backward()
            else:
                Scored(step.reader(step.module, batch), batch["labels"]).mean_nll.sum().backward()
            optimizer.add_sample()


def gradient_conflict(step: Step) -> dict[str, float]:
    """Norms of the forget and the retain term's gradients of this step and the cosine between them, -1 to 1.

    Before gamma and clipping; costs a forward and two backward passes. A cosine below 0 is a conflict: descending one
    term ascends the other.
    """
    params = step.params
    sums = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2)]
    share = 1 / (len(step.samples) * step.world)
    with step.evaluating():
        for sample in step.samples:
            terms = step.terms(step.module, sample)
            for i, term in enumerate(terms):
                if term is None:
                    continue
                again = i + 1 < len(terms) and terms[i + 1] is not None
                gradients = torch.autograd.grad(share * term, params, retain_graph=again, materialize_grads=True)
                for total, gradient in zip(sums[i], gradients, strict=True):
                    total += gradient
    if step.world > 1:
        for total in (*sums[0], *sums[1]):
            dist.all_reduce(total)
    forget, retain = (torch.stack([(a * a).sum() for a in side]).sum().sqrt() for side in sums)
    inner = torch.stack([(a * b).sum() for a, b in zip(*sums, strict=True)]).sum()
    found = {"forget_gradient_norm": float(forget)}
    if terms[1] is not None:
        found["retain_gradient_norm"] = float(retain)
    if float(forget) > 0 and float(retain) > 0:  # a saturated term has no direction
        found["gradient_cosine"] = float(inner / (forget * retain))
    return found
