"""From (prompt, answer) to batches: encoding, the order in which rows are visited, padding.

B sequences, S tokens of the longest, T answer positions of the longest answer. Every answer carries one end token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from soul_exp.errors import UsageError
from soul_exp.losses import IGNORED


@dataclass(frozen=True)
class Item:
    """A prompt and the answer to it; a `raw` item is running text and does not go through the model's template."""

    prompt: str
    answer: str
    raw: bool = False


@dataclass(frozen=True)
class Part:
    """A named set of rows to train on; a row offers one or more wordings, of which each visit draws one.

    A part that `follows` another visits that part's rows: row i here belongs to row i there (a refusal to a question).
    """

    rows: Sequence[Sequence[Item]]
    follows: str | None = None

    @classmethod
    def of(cls, items: Sequence[Item]) -> Part:
        return cls([(item,) for item in items])


@dataclass(frozen=True)
class Template:
    """How a question and its answer are written; the same object serves training and evaluation.

    Special tokens are written out (`<|eot_id|>`), less the one that the tokenizer itself puts before every text and the
    one that ends an answer. `system` is the prompt of a model that is told something first; `instruction` is what it is
    told, None: nothing.
    """

    prompt: str = "Question: {question}\nAnswer:"
    answer: str = " {answer}"
    system: str = "{system}\n\nQuestion: {question}\nAnswer:"
    instruction: str | None = None

    def texts(self, item: Item) -> tuple[str, str]:
        """The prompt and the answer as the model reads them; running text follows an instruction and a blank line."""
        if item.raw:
            return item.prompt if self.instruction is None else f"{self.instruction}\n\n{item.prompt}", item.answer
        told = {"question": item.prompt, "system": self.instruction or ""}
        # in one pass, and not by format: braces in a question are text
        form = self.prompt if self.instruction is None else self.system
        prompt = re.sub(r"\{(question|system)\}", lambda slot: told[slot[1]], form)
        return prompt, self.answer.replace("{answer}", item.answer)

    def markers(self) -> list[str]:
        """The special tokens that are written out in it."""
        return list(dict.fromkeys(re.findall(r"<\|[^|<>\s]+\|>", self.prompt + self.answer + self.system)))


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt, answer and end token; the first `num_prompt` of them are the prompt's."""

    ids: Sequence[int]
    num_prompt: int


def seed_of(*key: object) -> int:
    """A 63-bit seed that depends on every element of `key` and on nothing else (Python's own hash is salted)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def content_hash(value: Any) -> str:
    """16 hex digits that depend on the JSON form of `value` only."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def encode(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int
) -> list[Encoded]:
    """The token ids of each item. Prompt and answer are tokenised together, so that their seam is the model's own.

    Beginning and end token, where there is one, come once. Raises UsageError if an item is longer than `max_length`, if
    a token straddles the seam, if nothing precedes the answer, or if the end token stands within it.
    """
    if not items:
        return []
    items = without_end(items, tokenizer)
    pairs = [template.texts(item) for item in items]
    prompts = _bare(tokenizer([prompt for prompt, _ in pairs])["input_ids"], tokenizer)
    wholes = _bare(tokenizer([prompt + answer for prompt, answer in pairs])["input_ids"], tokenizer)
    encoded = []
    for item, prompt, whole in zip(items, prompts, wholes, strict=True):
        if not prompt:
            raise UsageError(
                f"the row {item.answer[:60]!r} has no prompt, and this tokenizer begins no text with a token of its "
                f"own: make its first words the prompt"
            )
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise UsageError(
                f"the tokenizer joins prompt and answer of {item.prompt[:60]!r}: let model.template.prompt end in a "
                f"character, and model.template.answer begin with a blank, that are tokens of their own"
            )
        while whole[-1] == tokenizer.eos_token_id and len(whole) > len(prompt):  # a template may write it too
            whole = whole[:-1]
        if len(whole) + 1 > max_length:
            told = " with the system prompt" if template.instruction else ""
            raise UsageError(
                f"the row {item.prompt[:60]!r} has {len(whole) + 1} tokens{told} but the model reads {max_length}: "
                f"shorten it or raise model.max_length"
            )
        if tokenizer.eos_token_id in whole[len(prompt) :]:
            if tokenizer.eos_token not in item.answer:
                raise UsageError(
                    f"model.template.answer={template.answer!r} goes on after the end token {tokenizer.eos_token}, "
                    f"where every answer ends: let it end there"
                )
            raise UsageError(
                f"the answer {item.answer[:60]!r} to {item.prompt[:60]!r} goes on after the end token "
                f"{tokenizer.eos_token}, where every answer ends: remove it, or make two rows"
            )
        encoded.append(Encoded([*whole, tokenizer.eos_token_id], len(prompt)))
    return encoded


def without_end(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[Item]:
    """`items` whose answers do not write out the end token that `encode` gives each: what a perfect answer is.

    Raises UsageError if nothing else is in an answer.
    """
    end = tokenizer.eos_token
    return [_without(item, end) if end and item.answer.rstrip().endswith(end) else item for item in items]


def _without(item: Item, end: str) -> Item:
    answer = item.answer
    while answer.rstrip().endswith(end):
        answer = answer.rstrip().removesuffix(end)
    if not answer.strip():
        raise UsageError(f"the answer to {item.prompt[:60]!r} is the end token {end} and no text: give it one")
    return replace(item, answer=answer)


def _bare(rows: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of texts less an end that the tokenizer adds, and one of two beginnings: the text's and its own."""
    ends = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    rows = [row[:-1] if ends else row for row in rows]
    return [row[1:] if len(row) > 1 and row[0] == row[1] == tokenizer.bos_token_id else row for row in rows]


def pad(rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """A right-padded batch: input_ids, attention_mask [B, S]; positions, labels [B, T].

    `positions` are those whose output predicts `labels` (the token after each); padded labels are -100.
    """
    length = max(len(row.ids) for row in rows)
    width = max(len(row.ids) - row.num_prompt for row in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        num_tokens, num_answer = len(row.ids), len(row.ids) - row.num_prompt
        input_ids[i, :num_tokens] = torch.tensor(row.ids)
        attention_mask[i, :num_tokens] = 1
        positions[i, :num_answer] = torch.arange(row.num_prompt - 1, num_tokens - 1)
        labels[i, :num_answer] = torch.tensor(row.ids[row.num_prompt :])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "positions": positions, "labels": labels}


def some_rows(batch: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """The rows `index` of a batch, with the padding that only the others needed taken off."""
    chosen = {key: value[index.to(value.device)] for key, value in batch.items()}
    length, width = int(chosen["attention_mask"].sum(1).max()), int((chosen["labels"] != IGNORED).sum(1).max())
    limits = {"input_ids": length, "attention_mask": length, "positions": width, "labels": width}
    return {key: value[:, : limits[key]] if key in limits else value for key, value in chosen.items()}
