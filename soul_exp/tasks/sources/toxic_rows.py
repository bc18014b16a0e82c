"""Texts, toxic or not, as prompts and answers; a hash of each text alone divides them into parts that share none."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from soul_exp.data import Item, seed_of
from soul_exp.errors import UsageError
from soul_exp.metrics.text import pieces, words
from soul_exp.tasks.sources.records import csv_rows, hub_rows, listed
from soul_exp.tasks.sources.text import continued

HUB, HUB_REVISION = "PKU-Alignment/PKU-SafeRLHF", "c04a25eb44ac0be2a714c16e072122466bc6d416"
RTP, RTP_REVISION = "allenai/real-toxicity-prompts", "d3a6507562064c4f37cdf267bdc2faa7b0873173"
COLUMNS = ("text", "is_toxic")
LABELS = {"Toxic": True, "Not Toxic": False}
MIN_ANSWER_WORDS = 3  # of a comment that makes a prompt and an answer
# Percent of the texts in each part, toxic and not.
SHARES = {True: {"forget": 48, "prompts": 15, "train": 25, "test": 12}, False: {"polite": 30, "train": 45, "test": 25}}


@dataclass(frozen=True)
class Example:
    """A text with its label, and the prompt and answer that it makes (None if it is too short)."""

    text: str  # what a scorer is trained or tested on
    key: str  # decides the part: equal keys stay together
    toxic: bool
    item: Item | None


Parts = dict[str, list[Example]]


def divide(examples: Iterable[Example]) -> Parts:
    """The first example of each key, in the part that a hash of the key chooses."""
    parts: Parts = {part: [] for shares in SHARES.values() for part in shares}
    seen: set[str] = set()
    for example in examples:
        key = normalised(example.key)
        if key in seen:
            continue
        seen.add(key)
        part_of = [part for part, share in SHARES[example.toxic].items() for _ in range(share)]  # of each percent
        parts[part_of[seed_of("detox", key) % 100]].append(example)
    return parts


def normalised(text: str) -> str:
    """`text` in lower case, each run of white space one blank."""
    return " ".join(text.lower().split())


def pairs(source: str, revision: str | None, limit: int) -> list[Example]:
    """Each response of the first `limit` rows of PKU-SafeRLHF ("hub" or a folder); toxic means that it is not safe."""
    columns = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
    where = f"task.source={source}"
    rows = hub_rows(
        HUB if source == "hub" else source, None, columns, revision=revision or HUB_REVISION, split="train",
        limit=limit, where=where, advice="give task.source=<folder with its files> or task.source=embedded",
    )  # fmt: skip
    examples = []
    for number, row in enumerate(rows, start=1):
        for i in (0, 1):
            prompt, answer, safe = row["prompt"], row[f"response_{i}"], row[f"is_response_{i}_safe"]
            if not (isinstance(prompt, str) and isinstance(answer, str) and isinstance(safe, bool)):
                raise UsageError(
                    f"{where}, row {number}: response {i} is {str(answer)[:40]!r}, safe {safe!r}: expected a text and "
                    f"true or false"
                )
            if prompt.strip() and words(answer):
                examples.append(Example(answer, prompt, not safe, Item(prompt.strip(), answer.strip())))
    return sorted(examples, key=lambda example: not example.toxic)  # of a prompt that has both, the toxic one counts


def comments(path: Path, lead_words: int, answer_words: int) -> Iterator[Example]:
    """The rows of a CSV file: a comment's first `lead_words` are its prompt. A UsageError names a row's first line."""
    where = f"task.source={path}"

    def check(header: Sequence[str]) -> None:
        absent = [column for column in COLUMNS if column not in header]
        if absent:
            raise UsageError(f"{where}: found the columns {listed(header)}, expected {' and '.join(COLUMNS)}")

    for location, record in csv_rows(path, where, check, "give embedded, hub, a folder or a CSV file"):
        text, label = (record[column] or "" for column in COLUMNS)
        if label not in LABELS or not text.strip():
            raise UsageError(
                f"{where}, {location}: text {text[:40]!r}, is_toxic {label!r}: expected a text, and Toxic or Not Toxic"
            )
        parts = pieces(text)
        item = continued(parts[: lead_words + answer_words], lead_words)
        long_enough = len(parts) >= lead_words + MIN_ANSWER_WORDS and words(item.answer)
        yield Example(text, text, LABELS[label], item if long_enough else None)


def web_prompts(source: str, count: int) -> list[Item]:
    """The first `count` prompts of RealToxicityPrompts ("hub" or a folder), each with its continuation, as raw text."""
    columns, where = ("prompt", "continuation"), f"task.rtp={source}"
    rows = hub_rows(
        RTP if source == "hub" else source, None, columns, revision=RTP_REVISION, split="train", limit=2 * count,
        where=where, advice="type task.rtp=embedded",
    )  # fmt: skip
    found = []
    for number, row in enumerate(rows, start=1):
        texts = [(row[column] or {}).get("text") if isinstance(row[column], dict) else None for column in columns]
        if not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{where}, row {number}: found no prompt.text and continuation.text, expected both")
        prompt, after = (str(text).strip() for text in texts)
        if prompt and words(after):
            found.append(Item(prompt, " " + after, raw=True))
    if len(found) < count:
        raise UsageError(f"{where} gives {len(found)} prompts, expected {count}: lower task.num_rtp_prompts")
    return found[:count]
