"""Texts with a label, toxic or not, as prompts and answers; and their cut into parts that have no text in common.

The cut is by a hash of the text, so it depends on neither order nor number of rows, and texts that differ in case or
white space only are never in two parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from soul_exp.data import Item, seed_of
from soul_exp.errors import UsageError
from soul_exp.tasks.sources import hub
from soul_exp.tasks.sources.rows import csv_rows
from soul_exp.tasks.toxicity import Labelled

HUB, HUB_REVISION = "PKU-Alignment/PKU-SafeRLHF", "c04a25eb44ac0be2a714c16e072122466bc6d416"
RTP, RTP_REVISION = "allenai/real-toxicity-prompts", "d3a6507562064c4f37cdf267bdc2faa7b0873173"
COLUMNS = ("text", "is_toxic")
LABELS = {"Toxic": True, "Not Toxic": False}
MIN_ANSWER_WORDS = 3  # of a comment that is cut into prompt and answer
# Percent of the texts that go to each part, toxic and not.
SHARES = {
    True: {"forget": 48, "prompts": 15, "train": 25, "test": 12},
    False: {"polite": 30, "train": 45, "test": 25},
}


@dataclass(frozen=True)
class Example:
    """A text with its label, and the prompt and answer that it makes; None if it is too short to make one."""

    text: str  # what a scorer is trained or tested on
    key: str  # what the cut is made by: equal keys stay together
    toxic: bool
    item: Item | None


Cut = dict[str, list[Example]]


def cut(examples: Iterable[Example]) -> Cut:
    """Each key's first example in one part, chosen by a hash of the key: equal keys are never in two parts."""
    parts: Cut = {part: [] for shares in SHARES.values() for part in shares}
    seen: dict[str, str] = {}
    for example in examples:
        key = normalised(example.key)
        if key in seen:
            continue
        number, upto = seed_of("detox", key) % 100, 0
        for part, share in SHARES[example.toxic].items():
            upto += share
            if number < upto:
                seen[key] = part
                parts[part].append(example)
                break
    return parts


def normalised(text: str) -> str:
    """`text` in lower case, its runs of white space one blank each."""
    return " ".join(text.lower().split())


# ---- PKU-SafeRLHF: a prompt with two responses, each safe or not.


def pairs(source: str, revision: str | None, limit: int) -> list[Example]:
    """Each response of the first `limit` rows of PKU-SafeRLHF ("hub" or a folder); it is toxic if it is not safe.

    Raises UsageError, naming the row. All toxic ones come first: of a prompt that has both, that one counts.
    """
    columns = ("prompt", *(f"response_{i}" for i in (0, 1)), *(f"is_response_{i}_safe" for i in (0, 1)))
    rows = hub.read(
        HUB if source == "hub" else source, None, columns, revision=revision or HUB_REVISION, split="train",
        limit=limit, option="task.source=hub" if source == "hub" else "task.source",
        advice="give task.source=<folder with its files> or task.source=embedded",
    )  # fmt: skip
    examples = []
    for number, row in enumerate(rows, start=1):
        for i in (0, 1):
            prompt, answer, safe = row["prompt"], row[f"response_{i}"], row[f"is_response_{i}_safe"]
            if not (isinstance(prompt, str) and isinstance(answer, str) and isinstance(safe, bool)):
                raise UsageError(
                    f"task.source={source}, row {number}: response {i} is {str(answer)[:40]!r}, safe {safe!r}: "
                    f"expected a text and true or false"
                )
            if prompt.strip() and has_word(answer):
                examples.append(Example(answer, prompt, not safe, Item(prompt.strip(), answer.strip())))
    return sorted(examples, key=lambda example: not example.toxic)


# ---- A file of comments.


def comments(path: Path, lead_words: int, answer_words: int) -> Iterator[Example]:
    """The rows of a CSV file: the first words of a comment are its prompt. Raises UsageError, naming the line."""
    for text, toxic in _rows(path):
        words = text.split()
        item = continued(words[: lead_words + answer_words], lead_words)
        long_enough = len(words) >= lead_words + MIN_ANSWER_WORDS and has_word(item.answer)
        yield Example(text, text, toxic, item if long_enough else None)


def continued(words: Sequence[str], num_prompt: int) -> Item:
    """Running text: the first `num_prompt` words are the prompt, the others the answer."""
    return Item(" ".join(words[:num_prompt]), " " + " ".join(words[num_prompt:]), raw=True)


def has_word(text: str) -> bool:
    """Whether there is a word of a-z or 0-9 in it, as ROUGE needs."""
    return re.search("[a-z0-9]", text.lower()) is not None


def _rows(path: Path) -> Iterator[Labelled]:
    """The text and the label of each row. Raises UsageError, naming the line on which the row begins."""
    where = f"task.source={path}"
    if not path.is_file():
        raise UsageError(f"{where} does not exist: give embedded, hub, a folder or a CSV file")

    def check(header: Sequence[str]) -> None:
        absent = [column for column in COLUMNS if column not in header]
        if absent:
            raise UsageError(f"{where} lacks the column(s) {', '.join(absent)}: expected {', '.join(COLUMNS)}")

    for place, record in csv_rows(path, where, check):
        text, label = (record[column] or "" for column in COLUMNS)
        if label not in LABELS or not text.strip():
            raise UsageError(
                f"{where}, {place}: text {text[:40]!r}, is_toxic {label!r}: expected a text, and Toxic or Not Toxic"
            )
        yield text, LABELS[label]


# ---- RealToxicityPrompts.


def web_prompts(source: str, count: int) -> list[Item]:
    """The first `count` prompts of RealToxicityPrompts ("hub" or a folder) and what followed them, as raw text."""
    columns = ("prompt", "continuation")
    rows = hub.read(
        RTP if source == "hub" else source, None, columns, revision=RTP_REVISION, split="train", limit=2 * count,
        option="task.rtp=hub" if source == "hub" else "task.rtp", advice="type task.rtp=embedded",
    )  # fmt: skip
    found = []
    for number, row in enumerate(rows, start=1):
        texts = [(row[column] or {}).get("text") if isinstance(row[column], dict) else None for column in columns]
        if not all(isinstance(text, str) for text in texts):
            raise UsageError(f"task.rtp={source}, row {number}: found no prompt.text and continuation.text")
        prompt, after = (str(text).strip() for text in texts)
        if prompt and has_word(after):
            found.append(Item(prompt, " " + after, raw=True))
    if len(found) < count:
        raise UsageError(f"task.rtp={source} gives {len(found)} prompts, expected {count}: lower task.num_rtp_prompts")
    return found[:count]
