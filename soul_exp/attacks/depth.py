"""UDS: is what was forgotten gone from a model's states, block by block, or do only its outputs hide it?

B items of a batch, S tokens, T answer positions, P predicting positions of a batch, H hidden size, L blocks.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soul_exp.attacks.attack import FORGET, SAME, Attack, Found, Target, check_same_shapes, shapes_of
from soul_exp.data import Encoded, Item, pad
from soul_exp.distributed.ranks import in_batches
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import evaluating, token_statistics
from soul_exp.evaluation.records import as_recorded
from soul_exp.losses import IGNORED
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.depth import BLOCKS, RETAIN
from soul_exp.models.language_model import LanguageModel
from soul_exp.tasks.task import Task

TOKENS = "tokens"  # a point: which tokens were read


@dataclass(frozen=True, kw_only=True)
class Depth(Attack):
    """The original answers with the output of one block after the other exchanged for the attacked model's.

    Exchanged are the hidden states at the positions that predict the entities of an answer, whose tokens alone are
    scored; of a task without entities, all tokens of the answer. Source: UDS, arXiv 2605.24614.
    """

    grid = "branch"  # no option
    reads_original = True
    takes_adapter = False  # its blocks are those of the original

    def branches(self) -> dict[str, Any]:
        return {name: name for name in (FORGET, RETAIN)}

    def reads(self) -> Sequence[str]:
        return [f"probe.{name}" for name in self.branches()]

    def missing(self, task: Task) -> str | None:
        absent = [name for name in self.branches() if name not in task.probes]
        return f"task={task.name} has no probe {absent[0]!r}" if absent else None

    def points(self, target: Target, branch: str) -> Found:
        probe, size = target.task.probes[branch], target.batch_size
        lm = target.load()
        rows, shapes = lm.encode(probe.items), shapes_of(lm.model)
        read = scored_tokens(lm, probe.items, rows, probe.entities)
        lengths = [len(row.ids) for row in rows]
        batched = functools.partial(in_batches, lengths, size=size, label=target.label, lockstep=False)
        if not lm.reader.layers:
            raise UsageError(f"{target.label}: {type(lm.model).__name__} marks no blocks: leave the attack out")
        with evaluating(lm):
            states = batched(work=functools.partial(_states, lm, rows, read))
        del lm  # one model at a time on the device
        original = target.original()
        check_same_shapes(shapes, shapes_of(original.model), target.label)
        if rows != original.encode(probe.items):
            raise UsageError(f"{target.label}: the model reads other tokens than the original: {SAME}")
        with evaluating(original):
            found = batched(work=functools.partial(_exchanged, original, rows, read, states))
        units = probe.units or [f"{branch} {number}" for number in range(len(rows))]
        nll, logp, exchanged = (np.array([row[i] for row in found]) for i in range(3))
        answers = as_recorded(Answers(nll=nll, entity_logp=logp, exchanged_logp=exchanged, unit=units))
        counts = {"items": sum(each.any() for each in read), "all_items": len(read), "num": sum(map(np.sum, read))}
        kind = "answer" if probe.entities is None else "entity"
        return {BLOCKS: answers, TOKENS: {kind: {name: float(value) for name, value in counts.items()}}}


def scored_tokens(
    lm: LanguageModel, items: Sequence[Item], rows: Sequence[Encoded], entities: Sequence[Sequence[str]] | None
) -> list[np.ndarray]:
    """Of the tokens of each answer, without the end token, which hold a character of one of its entities.

    All of them where there are no `entities`. An entity counts at every place where it stands in the answer, in upper
    or lower case. Raises UsageError for a tokenizer that does not tell which characters a token holds.
    """
    lengths = [len(row.ids) - row.num_prompt - 1 for row in rows]
    if entities is None:
        return [np.ones(length, dtype=bool) for length in lengths]
    if not lm.tokenizer.is_fast:
        raise UsageError(
            f"{type(lm.tokenizer).__name__} does not tell which characters a token holds, by which the tokens of an "
            f"entity are found: name a tokenizer with a tokenizer.json as model.tokenizer, or leave the attack out"
        )
    texts = [lm.template.texts(item) for item in items]
    encoded = lm.tokenizer([prompt + answer for prompt, answer in texts], return_offsets_mapping=True)
    found = []
    for row, (prompt, answer), names, length, ids, offsets in zip(
        rows, texts, entities, lengths, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        own = list(row.ids[row.num_prompt : -1])
        starts = [start for start in range(len(ids) - length, 0, -1) if ids[start : start + length] == own]
        if not starts:
            raise UsageError(f"the tokens of the answer {answer[:60]!r} are not those of its text: rephrase it")
        spans = offsets[starts[0] : starts[0] + length]
        held = [match.span() for name in names for match in re.finditer(re.escape(name), answer, re.IGNORECASE)]
        held = [(start + len(prompt), end + len(prompt)) for start, end in held]
        found.append(np.array([any(a < end and start < b for start, end in held) for a, b in spans], dtype=bool))
    return found


def _batch(
    lm: LanguageModel, rows: Sequence[Encoded], read: Sequence[np.ndarray], some: Sequence[int]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The batch of the rows `some`, which of its answer positions are read [B, T], and the indices [2, P] of these."""
    device = next(lm.model.parameters()).device
    batch = {key: value.to(device) for key, value in pad([rows[i] for i in some], lm.pad_id).items()}
    is_read = torch.zeros(batch["labels"].shape, dtype=torch.bool)
    for line, i in enumerate(some):
        is_read[line, : len(read[i])] = torch.from_numpy(read[i])
    is_read = is_read.to(device)
    return batch, is_read, torch.stack([is_read.nonzero()[:, 0], batch["positions"][is_read]])


@torch.no_grad()
def _states(
    lm: LanguageModel, rows: Sequence[Encoded], read: Sequence[np.ndarray], some: Sequence[int]
) -> list[Tensor]:
    """Of each of the rows `some`, the output of every block at the positions that are read, [L, n, H], on the CPU."""
    batch, _, (lines, places) = _batch(lm, rows, read, some)
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: found.append(_hidden(output)[lines, places].cpu()))
        for layer in lm.reader.layers
    ]
    try:
        lm.reader(lm.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return list(torch.stack(found).split([int(read[i].sum()) for i in some], dim=1))


@torch.no_grad()
def _exchanged(
    lm: LanguageModel, rows: Sequence[Encoded], read: Sequence[np.ndarray], states: Sequence[Tensor],
    some: Sequence[int],
) -> list[tuple[float, float, list[float]]]:  # fmt: skip
    """Of each of the rows `some`: NLL, mean log-probability of the tokens read, and that with each block exchanged."""
    batch, is_read, (lines, places) = _batch(lm, rows, read, some)
    others = torch.cat([states[i] for i in some], dim=1).to(lm.model.device)  # [L, P, H]

    def logp() -> Tensor:
        """[B, T] log-probability of each answer token, and of the end token; 0 beyond."""
        logits = lm.reader(lm.model, batch)
        found = token_statistics(logits, batch["labels"])[0]
        return found.new_zeros(is_read.shape).masked_scatter(batch["labels"] != IGNORED, found)

    def mean_of_read(values: Tensor) -> Tensor:
        return torch.where(is_read, values, 0).sum(1, dtype=torch.float64) / is_read.sum(1)  # nan where none is read

    whole, exchanged = logp(), []
    for layer, new in zip(lm.reader.layers, others, strict=True):

        def put(module: Any, args: Any, output: Any, new: Tensor = new) -> Any:
            changed = _hidden(output).clone()
            changed[lines, places] = new.to(changed.dtype)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        hook = layer.register_forward_hook(put)
        try:
            exchanged.append(mean_of_read(logp()))
        finally:
            hook.remove()
    nll = -whole.sum(1, dtype=torch.float64) / (batch["labels"] != IGNORED).sum(1)
    columns = nll.tolist(), mean_of_read(whole).tolist(), torch.stack(exchanged, 1).tolist()
    return list(zip(*columns, strict=True))


def _hidden(output: Any) -> Tensor:
    """The hidden states [B, S, H] of what a block returns."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
