"""From (prompt, answer) to batches of B sequences, S tokens, T answer positions: templates, token ids, padding."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from soul_exp.errors import UsageError
from soul_exp.losses import IGNORED


@dataclass(frozen=True)
class Item:
    """A prompt and its answer; a `raw` item is running text, to which the model's template does not apply.

    With `mask_of`, another answer to the prompt, the row is attended to only as far as that answer would reach.
    """

    prompt: str
    answer: str
    raw: bool = False
    mask_of: str | None = None


@dataclass(frozen=True)
class Part:
    """Rows to train on; a row has one or more wordings, of which each visit draws one."""

    rows: Sequence[Sequence[Item]]
    follows: str | None = None  # the part whose row i is visited with row i here: a question with its refusal

    @classmethod
    def of(cls, items: Sequence[Item]) -> "Part":
        return cls([(item,) for item in items])


@dataclass(frozen=True)
class Template:
    """How a question and its answer are written, in training and evaluation alike.

    Special tokens are written out (`<|eot_id|>`), but not the one before every text and the one that ends an answer.
    """

    prompt: str = "Question: {question}\nAnswer:"
    answer: str = " {answer}"
    system: str = "{system}\n\nQuestion: {question}\nAnswer:"
    system_prompt: str | None = None  # with one the prompt is written as `system`, otherwise as `prompt`

    def texts(self, item: Item) -> tuple[str, str]:
        """The prompt and the answer as the model reads them; a system prompt comes before running text too."""
        if item.raw:
            return item.prompt if self.system_prompt is None else f"{self.system_prompt}\n\n{item.prompt}", item.answer
        values = {"question": item.prompt, "system": self.system_prompt or ""}
        # in one pass, and not by format: braces in a question are text
        form = self.prompt if self.system_prompt is None else self.system
        prompt = re.sub(r"\{(question|system)\}", lambda slot: values[slot[1]], form)
        return prompt, self.answer.replace("{answer}", item.answer)

    def markers(self) -> list[str]:
        """The special tokens that the template writes out."""
        return list(dict.fromkeys(re.findall(r"<\|[^|<>\s]+\|>", self.prompt + self.answer + self.system)))


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt, answer and end token; the first `num_prompt` are the prompt's.

    Only the first `num_attended` tokens (None: all) are attended to.
    """

    ids: Sequence[int]
    num_prompt: int
    num_attended: int | None = None


def seed_of(*key: object) -> int:
    """A 63-bit seed that depends on every element of `key` and on nothing else (Python's own hash is salted)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def content_hash(value: Any, default: Callable[[Any], Any] = str) -> str:
    """16 hex digits that depend on the JSON form of `value` only; `default` gives that of what JSON does not know."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()[:16]


def encode(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int
) -> list[Encoded]:
    """The token ids of each item. Prompt and answer are tokenised together, as the model reads them.

    Begin token (where the tokenizer has one) and end token come once. Where a token would straddle prompt and answer of
    running text, as in scripts without blanks between words, a token ends there all the same. Raises UsageError if an
    item is longer than `max_length`, if a token straddles question and answer, if nothing precedes the answer, or if
    the end token is in it.
    """
    if not items:
        return []
    items = without_end(items, tokenizer)
    texts = [template.texts(item) for item in items]
    different = list(dict.fromkeys(prompt for prompt, _ in texts))  # a question may have many answers
    known = dict(zip(different, _token_ids(different, tokenizer), strict=True))
    prompts = [known[prompt] for prompt, _ in texts]
    rows = _token_ids([prompt + answer for prompt, answer in texts], tokenizer)
    end, end_id, found = tokenizer.eos_token, tokenizer.eos_token_id, []
    for item, prompt, ids in zip(items, prompts, rows, strict=True):
        if not prompt:
            raise UsageError(
                f"the row {item.answer[:60]!r} has no prompt, and this tokenizer has no token that begins every text: "
                f"make its first words the prompt"
            )
        if ids[: len(prompt)] != prompt and item.raw:
            ids = prompt + _apart(*template.texts(item), tokenizer)
        if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
            raise UsageError(
                f"the tokenizer joins prompt and answer of {item.prompt[:60]!r}: let model.template.prompt end in a "
                f"character, and model.template.answer begin with a blank, that are tokens of their own"
            )
        while ids[-1] == end_id and len(ids) > len(prompt):  # a template may write it too
            ids = ids[:-1]
        if len(ids) + 1 > max_length:
            including = " with the system prompt" if template.system_prompt else ""
            raise UsageError(
                f"the row {item.prompt[:60]!r} has {len(ids) + 1} tokens{including} but the model reads {max_length}: "
                f"shorten it, or raise model.max_length up to what the model was made for"
            )
        if end_id in ids[len(prompt) :]:
            what, advice = f"the answer {item.answer[:60]!r} to {item.prompt[:60]!r}", "remove it, or make two rows"
            if end not in item.answer:
                what, advice = f"model.template.answer={template.answer!r}", "let it end there"
            raise UsageError(f"{what} continues after the end token {end}, where every answer ends: {advice}")
        found.append(Encoded([*ids, end_id], len(prompt)))
    masked = [i for i, item in enumerate(items) if item.mask_of is not None]
    others = [replace(items[i], answer=items[i].mask_of or "", mask_of=None) for i in masked]
    for i, other in zip(masked, encode(others, tokenizer, template, max_length), strict=True):
        found[i] = replace(found[i], num_attended=len(other.ids) - 1)  # without the end token
    return found


def _apart(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of `answer` alone, as they follow a line break; none if one straddles that too."""
    before, row = _token_ids([f"{prompt}\n", f"{prompt}\n{answer}"], tokenizer)
    return row[len(before) :] if row[: len(before)] == before else []


def without_end(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[Item]:
    """`items` without end tokens at the end of their answers: `encode` adds one. UsageError if nothing else is left."""
    end, found = tokenizer.eos_token, []
    for item in items:
        answer = item.answer
        while end and answer.rstrip().endswith(end):
            answer = answer.rstrip().removesuffix(end)
        if not answer.strip() and answer != item.answer:
            raise UsageError(f"the answer to {item.prompt[:60]!r} is the end token {end} and no text: give it one")
        found.append(item if answer == item.answer else replace(item, answer=answer))
    return found


def _token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each text, without an end token that the tokenizer adds, and with at most one begin token."""
    adds_end = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    rows = [row[:-1] if adds_end else row for row in tokenizer(list(texts))["input_ids"]]
    # a template may write the begin token, and the tokenizer add another
    return [row[1:] if len(row) > 1 and row[0] == row[1] == tokenizer.bos_token_id else row for row in rows]


def pad(rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """A right-padded batch: input_ids, attention_mask [B, S]; positions, and labels (the next token or -100) [B, T]."""
    columns = {
        "input_ids": (pad_id, [torch.tensor(row.ids) for row in rows]),
        "attention_mask": (0, [_mask(row) for row in rows]),
        "positions": (0, [torch.arange(row.num_prompt - 1, len(row.ids) - 1) for row in rows]),
        "labels": (IGNORED, [torch.tensor(row.ids[row.num_prompt :]) for row in rows]),
    }
    return {
        name: pad_sequence(lines, batch_first=True, padding_value=value) for name, (value, lines) in columns.items()
    }


def _mask(row: Encoded) -> Tensor:
    mask = torch.ones(len(row.ids), dtype=torch.long)
    if row.num_attended is not None:
        mask[row.num_attended :] = 0
    return mask


def some_rows(batch: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """The rows `index` of a batch, without the padding that only other rows needed."""
    chosen = {key: value[index.to(value.device)] for key, value in batch.items()}
    # the last position predicts the last token; not by the attention mask, which may end before
    length, width = int(chosen["positions"].max()) + 2, int((chosen["labels"] != IGNORED).sum(1).max())
    limits = {"input_ids": length, "attention_mask": length, "positions": width, "labels": width}
    return {key: value[:, : limits[key]] if key in limits else value for key, value in chosen.items()}
