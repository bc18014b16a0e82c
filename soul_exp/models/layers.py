"""Inside a model: parameters by role, logits at answer positions, outputs of layers, layers that are recomputed.

B sequences, S tokens, T answer positions, H hidden size, V vocabulary.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from soul_exp import compat
from soul_exp.errors import UsageError


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers, first to last; empty for an architecture that does not mark them."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def layer_of(layers: Sequence[nn.Module], number: int | None) -> nn.Module:
    """Layer `number` of `layers`, from 0; None: as deep as RMU's, layer 7 of 32. Raises UsageError if there is none."""
    if not layers:
        raise UsageError("this loss reads a layer's output, but this architecture marks none: choose another loss")
    if number is None:
        number = 7 * len(layers) // 32
    if number >= len(layers):
        raise UsageError(f"loss.layer={number}: the model has {len(layers)} layers, counted from 0: choose one of them")
    return layers[number]


def has_dropout(model: nn.Module) -> bool:
    """Whether `model` draws random numbers in training mode: dropout, dropped layers, noise of a router."""
    for module in model.modules():
        rates = {"drop": module.p} if compat.is_dropout(module) else vars(module)
        named = [rate for name, rate in rates.items() if "drop" in name or "jitter" in name]
        if any(isinstance(rate, float) and rate > 0 for rate in named):
            return True
    return False


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a text may have where `model` keeps a table of positions; None: it computes them for any length.

    The table is an embedding of its own, which may begin with rows that no token has (OPT, RoBERTa), or the angles of
    GPT-J and CodeGen; MPT's biases are made for its maximum length.
    """
    config = model.config.get_text_config()
    if config.model_type == "mpt":
        return int(config.max_seq_len)
    limit = getattr(config, "max_position_embeddings", None)
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    of_tokens = {id(part) for end in ends for part in end.modules()}  # within an adapter too
    parts = [part for part in model.modules() if isinstance(part, nn.Embedding) and id(part) not in of_tokens]
    rows = [part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1) for part in parts]
    rows += [buffer.shape[0] for name, buffer in model.named_buffers() if name.endswith("embed_positions")]
    return next((min(limit, count) for count in rows if limit is not None and abs(count - limit) <= 2), None)


class AnswerReader:
    """Runs a model so that its output head is applied at answer positions only: prompts produce no logits.

    A hook on the output head selects the hidden states, so that every architecture and every wrapper (DDP, DeepSpeed)
    works unchanged. `hidden` [B, T, H] is the last input of the head, `layers` are the decoder's.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise UsageError(f"{type(model).__name__} has no output head: give a causal language model")
        self.head: nn.Module = head
        self.layers = layers_of(model)
        self.hidden: Tensor | None = None
        self._positions: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._select)

    def close(self) -> None:
        """Remove the hook from the model."""
        self._hook.remove()

    def __call__(self, forward: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """[B, T, V] logits of `forward` (the model, its wrapper, a function that calls it) at `batch["positions"]`."""
        self._positions = batch["positions"]
        try:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            return forward(**inputs, use_cache=False).logits
        finally:
            self._positions = None

    def with_layer(self, forward: nn.Module, batch: Mapping[str, Tensor], layer: int | None) -> tuple[Tensor, Tensor]:
        """The same logits, and the output [B, T, H] of a decoder layer (`layer_of`) there, both in one graph."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            found.append(_at_positions(states, batch["positions"]))

        hook = layer_of(self.layers, layer).register_forward_hook(keep)
        try:
            logits = self(forward, batch)
        finally:
            hook.remove()
        return logits, found[-1]

    def _select(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._positions is None:  # generation reads the head as usual
            return None
        selected = _at_positions(args[0], self._positions)
        self.hidden = selected.detach()  # detached: it must not keep the step's graph alive
        return (selected, *args[1:])


def _at_positions(states: Tensor, positions: Tensor) -> Tensor:
    """[B, T, H] of `states` [B, S, H] at `positions` [B, T]."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """In the block, layers keep only their inputs and recompute the rest in the backward pass, in either mode.

    The numbers are equal to the last bit. transformers' own option is off in evaluation mode, in which curvature is
    computed. Raises UsageError if the architecture has no such layers.
    """
    layers = layers_of(model)
    if not layers:
        found = f"train.gradient_checkpointing=true: {type(model).__name__} has no layers that can be recomputed"
        raise UsageError(f"{found}, set it false")
    with exchanged_forward(layers, lambda layer, forward: functools.partial(_recompute, forward)):
        yield


@contextmanager
def exchanged_forward(
    layers: Sequence[nn.Module], exchange: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """In the block, `exchange(layer, forward)` runs in place of the forward pass of each of `layers`."""
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = exchange(layer, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _recompute(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=False)


def parameter_groups(model: Any, decayed: Collection[str]) -> list[dict[str, Any]]:
    """The trained parameters of `model` in groups by role; weight decay is 0 for all but those named in `decayed`.

    The role is "embedding" for every embedding, positions included, and the output head; "hidden" for the matrices of
    other linear layers; "other" for the rest, such as norms, biases, fused experts, and what a module holds by itself.
    """
    modules = list(model.modules())
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    ends += [part for part in modules if isinstance(getattr(part, "base_layer", part), nn.Embedding)]  # or its adapter
    embeddings = {id(p) for part in ends for p in part.parameters()}
    matrices = {id(part.weight) for part in modules if isinstance(part, nn.Linear | Conv1D)}
    roles = {"hidden": "hidden", "embedding": "embedding", "decayed": "other", "other": "other"}
    groups: dict[str, dict[str, Any]] = {name: {"params": [], "role": role} for name, role in roles.items()}
    groups["other"]["weight_decay"] = 0.0
    for name, p in model.named_parameters():
        if p.requires_grad:
            role = "embedding" if id(p) in embeddings else "hidden" if id(p) in matrices else "decayed"
            groups[role if name in decayed else "other"]["params"].append(p)
    return [group for group in groups.values() if group["params"]]
