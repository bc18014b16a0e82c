"""Running text: general text to retain and to measure perplexity on, and its division into prompt and answer."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from soul_exp.data import Item
from soul_exp.errors import UsageError
from soul_exp.metrics.text import pieces
from soul_exp.tasks.embedded import corpus
from soul_exp.tasks.sources.records import hub_rows, read_text

HUB = {"c4": ("allenai/c4", "en"), "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1")}
SPARE = 8  # documents streamed per requested passage: many are too short
PASSAGE = "{passage}"  # the slot of a wording


def general_text(
    source: str | None, num_passages: int, num_words: int = 50, *, revision: str | None = None,
    option: str = "task.retain",
) -> list[str]:  # fmt: skip
    """`num_passages` different passages from `source`, in its order; UsageError if there are fewer.

    "embedded": generated everyday text of 40 to 60 words. A text file, a folder of *.txt, "c4" and "wikitext" (streamed
    as far as needed): the first `num_words` words of every paragraph that has so many, markup included.
    """
    if not source:
        raise UsageError(f"{option}={source}: expected embedded, a text file, c4 or wikitext")
    if source == "embedded":
        return corpus.general_text(num_passages)
    found: dict[str, None] = {}
    for paragraph in _paragraphs(source, num_passages, revision, option):
        words = pieces(paragraph)
        if len(words) >= num_words:
            found["".join(words[:num_words]).lstrip()] = None
        if len(found) == num_passages:
            return list(found)
    raise UsageError(
        f"{option}={source} has {len(found)} paragraphs of {num_words} words or more, expected {num_passages}: "
        f"lower the number of passages, or give more text"
    )


def general_items(
    source: str | None, num_passages: int, revision: str | None, option: str = "task.retain"
) -> list[Item]:
    """`general_text` as items: the first third of the words of a passage is the prompt; errors name the `option`."""
    passages = [pieces(text) for text in general_text(source, num_passages, revision=revision, option=option)]
    return [continued(words, len(words) // 3) for words in passages]


def continued(words: Sequence[str], num_prompt: int, wording: str = PASSAGE) -> Item:
    """Running text, given as its `pieces`, as an item: the first `num_prompt`, in `wording`, are the prompt."""
    prompt = wording.replace(PASSAGE, "".join(words[:num_prompt]).lstrip())
    return Item(prompt, "".join(words[num_prompt:]), raw=True)


def _paragraphs(source: str, num_passages: int, revision: str | None, option: str) -> Iterator[str]:
    if source in HUB:
        name, config = HUB[source]
        rows = hub_rows(
            name, config, ["text"], where=f"{option}={source}", revision=revision, split="train",
            limit=SPARE * num_passages, advice=f"give {option}=<text file> or {option}=embedded",
        )  # fmt: skip
        for row in rows:
            yield from re.split(r"\n\s*\n|\n(?= =)", row["text"])
        return
    path = Path(source)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{option}={source} has no *.txt: give a text file, c4, wikitext or embedded")
    for file in files:
        text = read_text(file, f"{option}={file}").replace("\r\n", "\n").replace("\r", "\n")
        for line in re.split(r"\n\s*\n", text):
            # WikiText has one paragraph per line, other texts a blank line between paragraphs
            yield from line.split("\n") if _is_long(line.split("\n")[0]) else [line]


def _is_long(line: str) -> bool:
    """Whether `line` is a paragraph by its length; one without blanks between its words has fewer characters."""
    return len(line) > 200 or len(pieces(line)) > len(line.split()) + 40
