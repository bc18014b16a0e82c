"""A model's answers to a task's probes: likelihoods and free answers, batched by length, divided over the ranks.

Beyond rounding in the last digits, numbers depend on neither batch size nor number of ranks.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from soul_exp.data import Encoded, Item, pad, without_end
from soul_exp.distributed import zero3
from soul_exp.distributed.ranks import in_batches
from soul_exp.errors import UsageError
from soul_exp.losses import Scored
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.text import pieces, rouge_l_recall
from soul_exp.models import lora
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.layers import max_positions
from soul_exp.tasks.task import Probe

CUT_TOKENS = 2  # new tokens per token of the answer, where the text is cut by words


def evaluate_probes(
    lm: LanguageModel, probes: Mapping[str, Probe], *, batch_size: int, max_new_tokens: int, label: str = "evaluate"
) -> dict[str, Answers]:
    """The model's answers to every probe; every rank does its share and gets them all."""
    probes = {name: replace(probe, items=without_end(probe.items, lm.tokenizer)) for name, probe in probes.items()}
    items = [item for probe in probes.values() for item in scored_items(probe)]
    free = [(item, probe.cut) for probe in probes.values() if probe.generate for item in probe.items]
    with evaluating(lm):
        scores = likelihoods(lm, items, batch_size=batch_size, label=f"{label}: likelihoods")
        texts = generations(
            lm, [item for item, _ in free], batch_size=batch_size, max_new_tokens=max_new_tokens,
            cut=[cut for _, cut in free], label=f"{label}: answers",
        )  # fmt: skip
    left = iter(scores), iter(texts)  # each probe takes its own
    return {name: _answers(probe, *left) for name, probe in probes.items()}


@dataclass(frozen=True)
class TokenScores:
    """The n tokens of one answer and its end token, each given the prompt and the tokens before it."""

    logp: np.ndarray  # [n + 1] log-probability in nats
    right: np.ndarray  # [n + 1] whether the token is the most likely one

    @property
    def nll(self) -> float:
        """Negative log-likelihood in nats per token, the end token included."""
        return float(-self.logp.mean(dtype=np.float64))


def likelihoods(lm: LanguageModel, items: Sequence[Item], *, batch_size: int, label: str = "") -> list[TokenScores]:
    """The token scores of the answer of each item."""
    encoded = lm.encode(items)
    device = next(lm.model.parameters()).device

    @torch.no_grad()
    def score(rows: Sequence[int]) -> list[TokenScores]:
        batch = {key: value.to(device) for key, value in pad([encoded[i] for i in rows], lm.pad_id).items()}
        scored = Scored(lm.reader(lm.model, batch), batch["labels"])
        right = scored.logits.argmax(-1) == scored.labels
        lines = zip(scored.logp, right, scored.mask, strict=True)
        return [TokenScores(logp[mask].cpu().numpy(), hits[mask].cpu().numpy()) for logp, hits, mask in lines]

    lengths = [len(row.ids) for row in encoded]
    return in_batches(lengths, score, batch_size, label=label, lockstep=zero3.is_sharded(lm.model))


def generations(
    lm: LanguageModel, items: Sequence[Item], *, batch_size: int, max_new_tokens: int,
    cut: Sequence[bool] | None = None, label: str = "",
) -> list[str]:  # fmt: skip
    """The greedy answer to each item's prompt, at most `max_new_tokens` tokens, without special tokens.

    Where `cut` is true, the text has at most as many words as the item's answer; it may have CUT_TOKENS times its
    tokens, because rarer words have more.
    """
    encoded = lm.encode(items)
    cut = cut if cut is not None else [False] * len(items)
    limits = [num_new_tokens(row, is_cut, max_new_tokens) for row, is_cut in zip(encoded, cut, strict=True)]
    if (last := beyond(encoded, limits, max_positions(lm.model))) is not None:
        found = f"the prompt {items[last].prompt[:60]!r} and {limits[last]} new tokens"
        raise UsageError(f"{found} are more than the model has positions: ask for fewer, or shorten it")
    device, sharded = next(lm.model.parameters()).device, zero3.is_sharded(lm.model)

    @torch.no_grad()
    def answer(numbers: Sequence[int]) -> list[str]:
        rows = [encoded[i] for i in numbers]
        # padded on the left: every answer begins in the same column
        left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        ids = left([torch.tensor(row.ids[: row.num_prompt]) for row in rows], padding_value=lm.pad_id)
        mask = left([torch.ones(row.num_prompt, dtype=torch.long) for row in rows])
        generate: Any = lm.model.generate  # its stub has a Tensor's type
        out = generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(limits[i] for i in numbers),
            synced_gpus=sharded,  # all ranks run every layer together, until the last answer of any rank ends
        )
        new = [line[: limits[i]] for i, line in zip(numbers, out[:, ids.shape[1] :], strict=True)]
        texts = lm.tokenizer.batch_decode(new, skip_special_tokens=True)
        words = [len(pieces(items[i].answer)) if cut[i] else None for i in numbers]
        cuts = zip(texts, words, strict=True)
        return [text.strip() if most is None else "".join(pieces(text)[:most]).lstrip() for text, most in cuts]

    # whatever the checkpoint's settings are, of which only the end tokens stay; settings passed to `generate` are not
    # enough: it takes the unset ones from the model's
    model: Any = lora.bare(lm.model)
    given = model.generation_config
    greedy = {"do_sample": False, "num_beams": 1, "pad_token_id": lm.pad_id}
    model.generation_config = GenerationConfig(**greedy, eos_token_id=given.eos_token_id)
    try:
        return in_batches([row.num_prompt for row in encoded], answer, batch_size, label=label, lockstep=sharded)
    finally:
        model.generation_config = given


def num_new_tokens(row: Encoded, cut: bool, max_new_tokens: int) -> int:
    """The most tokens that the free answer to the prompt of `row` may have."""
    return min(max_new_tokens, CUT_TOKENS * (len(row.ids) - row.num_prompt)) if cut else max_new_tokens


def beyond(rows: Sequence[Encoded], limits: Sequence[int], positions: int | None) -> int | None:
    """Of `rows`, with `limits` on new tokens, the number of the one that ends last, if that is beyond `positions`."""
    ends = [row.num_prompt + limit - 1 for row, limit in zip(rows, limits, strict=True)]  # the last is not read
    return ends.index(max(ends)) if positions is not None and ends and max(ends) > positions else None


def scored_items(probe: Probe) -> list[Item]:
    """The items whose likelihood a probe needs, in the order in which `_answers` takes their scores."""
    return [*probe.items, *(probe.paraphrases or ()), *(item for row in probe.wrong or () for item in row)]


def _answers(probe: Probe, scores: Iterator[TokenScores], texts: Iterator[str]) -> Answers:
    own = [next(scores) for _ in probe.items]
    answers = [item.answer for item in probe.items]
    free = [next(texts) for _ in probe.items] if probe.generate else None
    return Answers(
        nll=np.array([row.nll for row in own]),
        logp=[row.logp[:-1] for row in own],  # without the end token
        right=[row.right[:-1] for row in own],
        paraphrase_nll=np.array([next(scores).nll for _ in probe.paraphrases]) if probe.paraphrases else None,
        wrong_nll=np.array([[next(scores).nll for _ in row] for row in probe.wrong]) if probe.wrong else None,
        rouge_l=rouge_l_recall(free, answers, ascii_only=probe.ascii_only) if free is not None else None,
        question=[item.prompt for item in probe.items],
        answer=answers,
        entities=probe.entities,
        generation=free,
    )


def evaluating(lm: LanguageModel) -> AbstractContextManager[None]:
    """In the block, the model is in evaluation mode and can be run, sharded or not."""
    return zero3.evaluating(lm.model)
