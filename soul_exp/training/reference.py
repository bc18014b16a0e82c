"""What the frozen start model says of the rows that training will visit, computed once, so that no second model stays.

B sequences, T answer positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
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

BATCH = 32  # sequences a forward pass


@dataclass
class Reference:
    """Per part and wording: summed answer NLL, and the last hidden states at answer positions with one frozen head.

    Where a loss reads a layer, that layer's output too. Hidden states are H numbers a token where full distributions
    would be V, and give those exactly.
    """

    nll: dict[str, Tensor] = field(default_factory=dict)  # part -> [number of wordings]; unvisited ones are nan
    hidden: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # part -> wording -> [T_i, H]
    head: nn.Module | None = None
    states: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # as `hidden`, the output of the loss's layer

    def nll_of(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """part -> [B] for the wordings `rows`."""
        return {part: table.to(rows[part].device)[rows[part]] for part, table in self.nll.items() if part in rows}

    def logits_of(self, rows: Mapping[str, Tensor], width: int) -> Mapping[str, Tensor]:
        """part -> [B, T, V] for the wordings `rows`, padded to `width` positions; computed when a part is asked for."""

        @torch.no_grad()
        def logits(states: Mapping[int, Tensor], rows: Tensor) -> Tensor:
            assert self.head is not None
            return self.head(_padded(states, rows, width))

        return _Late({part: partial(logits, self.hidden[part], rows[part]) for part in rows if part in self.hidden})

    def states_of(self, rows: Mapping[str, Tensor], width: int) -> Mapping[str, Tensor]:
        """part -> [B, T, H], the layer's output for the wordings `rows`, padded with 0 to `width` positions."""
        return _Late(
            {part: partial(_padded, self.states[part], rows[part], width) for part in rows if part in self.states}
        )


@dataclass(frozen=True)
class _Late(Mapping[str, Tensor]):
    """What is computed when it is looked up: a term pays for the parts that it reads only."""

    made: Mapping[str, Callable[[], Tensor]]

    def __getitem__(self, part: str) -> Tensor:
        return self.made[part]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


def _padded(states: Mapping[int, Tensor], rows: Tensor, width: int) -> Tensor:
    chosen = [states[int(row)] for row in rows]
    padded = chosen[0].new_zeros(len(chosen), width, chosen[0].shape[-1])
    for i, state in enumerate(chosen):
        padded[i, : len(state)] = state
    return padded.to(rows.device)


class Frozen(NamedTuple):
    """What is kept of one row: summed NLL and, where wanted, what the head read and the layer put out, [T_i, H]."""

    nll: Tensor
    hidden: Tensor | None
    states: Tensor | None


@torch.no_grad()
def freeze(
    model: PreTrainedModel,
    reader: AnswerReader,
    stream: Stream,
    wanted: Iterable[str],
    parts: Iterable[str],
    pad_id: int,
    layer: int | None = None,
) -> Reference:
    """The `wanted` of every wording of `parts` that `stream` visits.

    "reference_nll", "reference_logits" or, of the decoder layer `layer`, "reference_hidden".
    """
    wanted, parts, reference = set(wanted), list(parts), Reference()
    if not wanted:
        return reference
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    with zero3.gathering(model):
        if "reference_logits" in wanted:
            first = stream.encoded[parts[0]][stream.order[parts[0]][0]]
            batch = {key: value.to(device) for key, value in pad([first], pad_id).items()}
            reference.head = FrozenHead(model, reader, batch)
        for part in parts:
            encoded, visited = stream.encoded[part], np.unique(stream.order[part])

            def read(
                numbers: Sequence[int], encoded: Sequence[Encoded] = encoded, visited: np.ndarray = visited
            ) -> list[Frozen]:
                rows = [encoded[visited[i]] for i in numbers]
                batch = {key: value.to(device) for key, value in pad(rows, pad_id).items()}
                if "reference_hidden" in wanted:
                    logits, states = reader.with_layer(model, batch, layer)
                else:
                    logits, states = reader(model, batch), None
                scored = Scored(logits, batch["labels"])
                nll, hidden = scored.nll.float().cpu(), reader.hidden if "reference_logits" in wanted else None
                return [
                    Frozen(
                        nll[i],
                        None if hidden is None else hidden[i, :count].cpu(),
                        None if states is None else states[i, :count].cpu(),
                    )
                    for i, count in enumerate(scored.num_tokens.tolist())
                ]

            lengths = [len(encoded[row].ids) for row in visited]
            found = in_batches(lengths, read, BATCH, lockstep=zero3.is_sharded(model))
            table = torch.full((len(encoded),), float("nan"))
            table[torch.from_numpy(visited)] = torch.stack([row.nll for row in found])
            reference.nll[part] = table
            for kept, values in (
                (reference.hidden, [row.hidden for row in found]),
                (reference.states, [row.states for row in found]),
            ):
                pairs = zip(visited, values, strict=True)
                by_row = {int(row): value.to(device) for row, value in pairs if value is not None}
                if by_row:
                    kept[part] = by_row
    model.train(was_training)
    return reference


class FrozenHead(nn.Module):
    """[B, T, V] logits of [B, T, H] states that the head read, with all that the model does to logits behind its head.

    The model's own forward pass computes them, so that a scale, a soft cap or masked tokens of any family are kept:
    in a shallow copy, a copy of the head reads the given states, and the modules that ran before the head return what
    they returned on `batch`. Raises UsageError if that gives other logits than the model on `batch`.
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
        if not _equal(self(torch.cat([read, read])), torch.cat([logits, logits])):
            raise UsageError(
                f"the logits of {type(causal).__name__} cannot be computed again from what its output head read: "
                f"choose a loss and a retain term other than kl, kl_forget and undial"
            )

    def forward(self, states: Tensor) -> Tensor:
        self._states = states
        logits: Tensor = self._forward().logits
        return logits


def _before_the_head(
    causal: nn.Module, model: nn.Module, reader: AnswerReader, batch: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, nn.Module]]:
    """The logits on `batch`, and by path what stands for each outermost module that ended before the head began."""
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
    """A shallow copy of `module`, without hooks, with `others` at their paths below it; the rest is shared."""
    copied = compat.shallow_copy(module)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, other in others.items():
        name, _, rest = path.partition(".")
        below.setdefault(name, {})[rest] = other
    for name, inner in below.items():
        copied.add_module(name, inner[""] if "" in inner else _exchanged(module.get_submodule(name), inner))
    return copied


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Whether two [B, T, V] logits are equal but for the rounding of their dtype."""
    rounding = max(1e-4, 8 * torch.finfo(expected.dtype).eps)
    near = rounding * float(expected.abs().float().median())  # not the maximum: masked tokens have -inf
    return found.shape == expected.shape and torch.allclose(found, expected, rounding, near, equal_nan=True)


def _copy(head: nn.Module) -> nn.Module:
    """An output head with the same weights, whole, that nothing trains and no hook reads."""
    with zero3.gathered(list(head.parameters())):
        weights = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in head.parameters()}
        copied = copy.deepcopy(head, dict(weights))
    compat.remove_forward_hooks(copied)
    return copied
