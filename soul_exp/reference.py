"""What the frozen start model says of the rows that training will visit, computed once, so that no second model stays.

B sequences, T answer positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from soul_exp import shards
from soul_exp.data import Encoded, Stream, pad
from soul_exp.losses import Scored
from soul_exp.models import AnswerReader
from soul_exp.ranks import in_batches

BATCH = 32  # sequences a forward pass


@dataclass
class Reference:
    """Per part and wording: summed answer NLL, and the last hidden states at answer positions with one frozen head.

    Hidden states are H numbers a token where full distributions would be V, and give those exactly.
    """

    nll: dict[str, Tensor] = field(default_factory=dict)  # part -> [number of wordings]; unvisited ones are nan
    hidden: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # part -> wording -> [T_i, H]
    head: nn.Module | None = None

    def nll_of(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """part -> [B] for the wordings `rows`."""
        return {part: table.to(rows[part].device)[rows[part]] for part, table in self.nll.items() if part in rows}

    @torch.no_grad()
    def logits_of(self, rows: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
        """part -> [B, T, V] for the wordings `rows`, padded to `width` positions."""
        out = {}
        for part, states in self.hidden.items():
            if part in rows:
                chosen = [states[int(row)] for row in rows[part]]
                padded = chosen[0].new_zeros(len(chosen), width, chosen[0].shape[-1])
                for i, state in enumerate(chosen):
                    padded[i, : len(state)] = state
                assert self.head is not None
                out[part] = self.head(padded.to(rows[part].device))
        return out


@torch.no_grad()
def freeze(
    model: PreTrainedModel,
    reader: AnswerReader,
    stream: Stream,
    wanted: Iterable[str],
    parts: Iterable[str],
    pad_id: int,
) -> Reference:
    """The `wanted` ("reference_nll", "reference_logits") of every wording of `parts` that `stream` visits."""
    wanted, reference = set(wanted), Reference()
    if not wanted:
        return reference
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    with shards.gathering(model):
        for part in parts:
            encoded, visited = stream.encoded[part], np.unique(stream.order[part])

            def read(
                numbers: Sequence[int], encoded: Sequence[Encoded] = encoded, visited: np.ndarray = visited
            ) -> list[tuple[Tensor, Tensor | None]]:
                rows = [encoded[visited[i]] for i in numbers]
                batch = {key: value.to(device) for key, value in pad(rows, pad_id).items()}
                scored = Scored(reader(model, batch), batch["labels"])
                nll, hidden = scored.nll.float().cpu(), reader.hidden
                if "reference_logits" not in wanted:
                    return [(value, None) for value in nll]
                assert hidden is not None
                counts = scored.num_tokens.tolist()
                return [(nll[i], hidden[i, : int(count)].cpu()) for i, count in enumerate(counts)]

            lengths = [len(encoded[row].ids) for row in visited]
            found = in_batches(lengths, read, BATCH, lockstep=shards.is_sharded(model))
            table = torch.full((len(encoded),), float("nan"))
            table[torch.from_numpy(visited)] = torch.stack([nll for nll, _ in found])
            reference.nll[part] = table
            states = {
                int(row): state.to(device) for row, (_, state) in zip(visited, found, strict=True) if state is not None
            }
            if states:
                reference.hidden[part] = states
    if "reference_logits" in wanted:
        reference.head = _copy(reader.head)
    model.train(was_training)
    return reference


def _copy(head: nn.Module) -> nn.Module:
    """An output head with the same weights, whole, that nothing trains and no hook reads."""
    with shards.whole(list(head.parameters())):
        weights = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in head.parameters()}
        copied = copy.deepcopy(head, dict(weights))
    for module in copied.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return copied
