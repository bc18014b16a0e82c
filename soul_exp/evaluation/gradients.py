"""The gradient of each row's NLL by all weights, of which only norms are kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from soul_exp.data import Item, pad
from soul_exp.distributed import zero3
from soul_exp.distributed.ranks import in_batches
from soul_exp.evaluation.durations import stage
from soul_exp.losses import IGNORED, Scored
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.layers import exchanged_forward, layers_of


@stage("gradients")
def gradient_norms(lm: LanguageModel, items: Sequence[Item], *, label: str = "") -> list[tuple[float, float]]:
    """Two norms of the gradient of the NLL per answer token (no end token) of each item, in evaluation mode.

    The L2 norm over all weights, and the mean over weight tensors of the L2 norm of each. Weights are the model's own,
    without an adapter's matrices but with what these add: the gradient is that of the merged model. One row at a time;
    of its gradient one tensor is held at a time. Under ZeRO-3 a layer is gathered while it runs, and it runs twice.
    """
    encoded = lm.encode(items)
    device = next(lm.model.parameters()).device

    def norms(rows: Sequence[int]) -> list[tuple[float, float]]:
        batch = {key: value.to(device) for key, value in pad([encoded[i] for i in rows], lm.pad_id).items()}
        labels = batch["labels"].clone()
        labels[:, -1] = IGNORED
        squares: list[Tensor] = []
        with torch.enable_grad(), _differentiable(lm.model, squares) as forward:
            Scored(lm.reader(forward, batch), labels).mean_nll.sum().backward()
        each = torch.stack(squares)
        return [(float(each.sum().sqrt()), float(each.sqrt().mean()))]

    lengths = [len(row.ids) for row in encoded]
    with zero3.evaluating(lm.model, by_layer=False):  # a row in each call: in lockstep, ranks then gather equally often
        return in_batches(lengths, norms, 1, label=label, lockstep=zero3.is_sharded(lm.model))


@contextmanager
def _differentiable(model: nn.Module, squares: list[Tensor]) -> Iterator[Callable[..., Any]]:
    """`model` to be called, with weights whose squared gradient norms a backward pass appends to `squares`.

    These weights share the memory of the model's own, whose `requires_grad`, `grad` and hooks of an engine do not
    matter. Of divided weights, those outside the layers are gathered in the block, and a layer's while it runs.
    """
    layers = layers_of(model) if zero3.is_sharded(model) else []
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = {name: p for name, p in model.named_parameters() if id(p) not in inside}
    with zero3.gathered(list(outside.values())), exchanged_forward(layers, partial(_run_twice, squares)):
        yield partial(_call, model, _leaves(outside, squares))


def _call(module: nn.Module, weights: dict[str, Tensor], *args: Any, **options: Any) -> Any:
    return functional_call(module, weights, args, options)


def _leaves(params: dict[str, nn.Parameter], squares: list[Tensor]) -> dict[str, Tensor]:
    """The start of a graph for each of `params` but an adapter's own; a gradient that arrives there is not kept."""

    def add(leaf: Tensor) -> None:
        assert leaf.grad is not None
        squares.append(leaf.grad.float().square().sum())
        leaf.grad = None

    # parameters, as a layer may put what is none in the place of its own for good (peft's wrapper of experts)
    leaves: dict[str, Tensor] = {name: nn.Parameter(p.detach()) for name, p in params.items() if ".lora_" not in name}
    for leaf in leaves.values():
        leaf.register_post_accumulate_grad_hook(add)
    return leaves


def _run_twice(squares: list[Tensor], layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of `layer`, whose weights are gathered for it, without a graph, and again for the backward pass."""
    called = _Called(layer, forward)

    def run(*args: Any, **options: Any) -> Any:
        params = dict(called.named_parameters())
        with zero3.gathered(list(params.values())):
            return functional_call(called, _leaves(params, squares), args, options)

    def run_twice(*args: Any, **options: Any) -> Any:
        return checkpoint(partial(run, **options), *args, use_reentrant=True)  # the other way keeps the leaves

    return run_twice


class _Called(nn.Module):
    """Calls `own`, the forward pass of `layer`, whose weights are its."""

    def __init__(self, layer: nn.Module, own: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.own = layer, own

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.own(*args, **options)
