"""Outputs of the frozen start model on the rows that training will visit: computed once, so that no second model stays.

B sequences, T answer positions of the longest, T_i of row i, H hidden size, V vocabulary.
"""

import copy
from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from soul_exp import compat
from soul_exp.data import Encoded, pad
from soul_exp.distributed import zero3
from soul_exp.distributed.ranks import in_batches
from soul_exp.errors import UsageError
from soul_exp.losses import Scored
from soul_exp.models import lora
from soul_exp.models.layers import AnswerReader
from soul_exp.training.stream import Stream

BATCH = 32  # sequences in a forward pass


@dataclass
class Reference:
    """For each part and wording: the summed answer NLL (nats), the head's inputs, and the outputs of the loss's layer.

    The head's inputs are H numbers per token in place of the V that they give exactly through the one frozen `head`.
    """

    nll: dict[str, Tensor] = field(default_factory=dict)  # part -> [number of wordings]; nan where not visited
    states: dict[str, dict[str, dict[int, Tensor]]] = field(default_factory=dict)  # name -> part -> wording -> [T_i, H]
    head: nn.Module | None = None

    def outputs(self, rows: Mapping[str, Tensor], width: int) -> dict[str, Mapping[str, Tensor]]:
        """What a term may name: part -> [B], [B, T, V] or [B, T, H] for the wordings `rows`, T being `width`.

        The last two, whose inputs are padded with 0, are computed when a part is looked up.
        """

        @torch.no_grad()
        def value(name: str, part: str) -> Tensor:
            states = pad_sequence([self.states[name][part][int(row)] for row in rows[part]], batch_first=True)
            states = F.pad(states, (0, 0, 0, width - states.shape[1])).to(rows[part].device)
            if name == "reference_hidden":
                return states
            assert self.head is not None
            return self.head(states)

        found: dict[str, Mapping[str, Tensor]] = {
            name: _LazyMapping({part: partial(value, name, part) for part in rows if part in kept})
            for name, kept in self.states.items()
        }
        nll = {part: self.nll[part].to(at.device)[at] for part, at in rows.items() if part in self.nll}
        return {"reference_nll": nll, **found}


class _LazyMapping(UserDict[str, Any]):
    """Functions, which are called when their value is looked up: a term pays only for the parts that it reads."""

    def __getitem__(self, part: str) -> Tensor:
        return self.data[part]()


@torch.no_grad()
def compute_reference(
    model: PreTrainedModel,
    reader: AnswerReader,
    stream: Stream,
    wanted: Iterable[str],
    parts: Iterable[str],
    pad_id: int,
    layer: int | None = None,
) -> Reference:
    """The outputs `wanted` for every wording of `parts` that `stream` visits.

    They are "reference_nll", "reference_logits" and, of the decoder layer `layer`, "reference_hidden".
    """
    wanted, parts, reference = set(wanted), list(parts), Reference()
    if not wanted:
        return reference
    device = next(model.parameters()).device

    def outputs_of(rows: Sequence[Encoded], numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        """Of each row the summed NLL and, where wanted, [T_i, H] inputs of the head and outputs of the layer."""
        batch = {key: value.to(device) for key, value in pad([rows[i] for i in numbers], pad_id).items()}
        states: dict[str, Tensor] = {}
        if "reference_hidden" in wanted:
            logits, states["reference_hidden"] = reader.with_layer(model, batch, layer)
        else:
            logits = reader(model, batch)
        if "reference_logits" in wanted:
            assert reader.hidden is not None
            states["reference_logits"] = reader.hidden
        scored = Scored(logits, batch["labels"])
        nll = scored.nll.float().cpu()
        return [
            {"reference_nll": nll[i], **{name: each[i, :count].cpu() for name, each in states.items()}}
            for i, count in enumerate(scored.num_tokens.tolist())
        ]

    with zero3.evaluating(model):
        if "reference_logits" in wanted:
            first = stream.encoded[parts[0]][stream.order[parts[0]][0]]
            batch = {key: value.to(device) for key, value in pad([first], pad_id).items()}
            reference.head = FrozenHead(model, reader, batch)
        for part in parts:
            encoded, visited = stream.encoded[part], np.unique(stream.order[part])
            rows = [encoded[row] for row in visited]
            lengths, lockstep = [len(row.ids) for row in rows], zero3.is_sharded(model)
            found = in_batches(lengths, partial(outputs_of, rows), BATCH, lockstep=lockstep)
            table = torch.full((len(encoded),), float("nan"))
            table[torch.from_numpy(visited)] = torch.stack([outputs["reference_nll"] for outputs in found])
            reference.nll[part] = table
            for name in wanted - {"reference_nll"}:
                kept = {int(row): each[name].to(device) for row, each in zip(visited, found, strict=True)}
                reference.states.setdefault(name, {})[part] = kept
    return reference


class FrozenHead(nn.Module):
    """[B, T, V] logits from [B, T, H] inputs of the output head, with all that the model does to logits after it.

    The model's own forward pass computes them, so that a scale, a soft cap or masked tokens of any family are kept: in
    a shallow copy of the model, a copy of the head reads the given inputs, and the modules that run before the head
    return their outputs on `batch`. Raises UsageError if the logits on `batch` then differ from those of the model.
    """

    def __init__(self, model: PreTrainedModel, reader: AnswerReader, batch: Mapping[str, Tensor]) -> None:
        super().__init__()
        causal = lora.bare(model)
        logits, returned = _before_the_head(causal, model, reader, batch)
        self._states = read = reader.hidden
        self.head = _copy(reader.head)
        self.head.register_forward_pre_hook(lambda module, args: (self._states, *args[1:]))
        (path,) = (name for name, module in causal.named_modules() if module is reader.head)
        copied = _exchanged(causal, {**returned, path: self.head})
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        self._forward = partial(copied, **inputs, use_cache=False)  # no submodule: its weights are those being trained
        assert read is not None
        found, expected = self(torch.cat([read, read])), torch.cat([logits, logits])
        rounding = max(1e-4, 8 * torch.finfo(expected.dtype).eps)
        near = rounding * float(expected.abs().float().median())  # not the maximum: masked tokens have -inf
        if found.shape != expected.shape or not torch.allclose(found, expected, rounding, near, equal_nan=True):
            problem = f"the logits of {type(causal).__name__} cannot be computed from the inputs of its output head"
            raise UsageError(f"{problem}: choose a loss and a retain term other than kl, kl_forget and undial")

    def forward(self, states: Tensor) -> Tensor:
        self._states = states
        return self._forward().logits


def _before_the_head(
    causal: nn.Module, model: nn.Module, reader: AnswerReader, batch: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, nn.Module]]:
    """The logits on `batch`, and by path a substitute for each outermost module that ends before the head begins."""
    outputs: dict[str, Any] = {}
    reader.hidden = None  # set where the head begins

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if reader.hidden is None:
            outputs[name] = output

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in causal.named_modules() if name]
    try:
        logits = reader(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    outer = [name for name in outputs if not any(name.startswith(f"{other}.") for other in outputs)]
    modules = dict(causal.named_modules())
    return logits, {name: _returning(modules[name], outputs[name]) for name in outer}


def _returning(module: nn.Module, output: Any) -> nn.Module:
    """A copy of `module` that returns `output` for any input."""
    copied = _exchanged(module, {})
    copied.forward = lambda *args, **options: output
    return copied


def _exchanged(module: nn.Module, others: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy of `module` without hooks, with `others` at their paths below it; all else is shared."""
    copied = compat.shallow_copy(module)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, other in others.items():
        name, _, rest = path.partition(".")
        below.setdefault(name, {})[rest] = other
    for name, inner in below.items():
        copied.add_module(name, inner[""] if "" in inner else _exchanged(module.get_submodule(name), inner))
    return copied


def _copy(head: nn.Module) -> nn.Module:
    """An output head with the same weights, gathered, that is not trained and has no hooks."""
    with zero3.gathered(list(head.parameters())):
        weights = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in head.parameters()}
        copied = copy.deepcopy(head, dict(weights))
    compat.remove_forward_hooks(copied)
    return copied
