"""Running text about nothing that is to be forgotten: what a model is to keep, and what its perplexity is taken on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from soul_exp.errors import UsageError
from soul_exp.tasks.embedded import corpus
from soul_exp.tasks.sources import hub

C4, WIKITEXT = "allenai/c4", "Salesforce/wikitext"
HUB = {"c4": (C4, "en"), "wikitext": (WIKITEXT, "wikitext-2-raw-v1")}
SPARE = 8  # streamed documents a passage that is wanted: many are too short


def general_text(
    source: str | None,
    num_passages: int,
    num_words: int = 50,
    *,
    revision: str | None = None,
    option: str = "task.retain",
) -> list[str]:
    """`num_passages` different passages from `source`, in its order.

    "embedded" gives everyday text that the project makes, 40 to 60 words each, whatever `num_words`; a text file or a
    folder of *.txt, "c4" and "wikitext" (streamed from the hub, no more than is used) the first `num_words` words of
    every paragraph that has so many, markup included. Raises UsageError, beginning with `option`, if there are fewer.
    """
    if not source:
        raise UsageError(f"{option}={source}: give embedded, a text file, c4 or wikitext")
    if source == "embedded":
        return corpus.general_text(num_passages)
    found: dict[str, None] = {}
    for paragraph in _paragraphs(source, num_passages, revision, option):
        words = paragraph.split()
        if len(words) >= num_words:
            found[" ".join(words[:num_words])] = None
        if len(found) == num_passages:
            return list(found)
    raise UsageError(
        f"{option}={source} has {len(found)} paragraphs of {num_words} words or more, expected {num_passages}: ask for "
        f"fewer, or for shorter ones"
    )


def _paragraphs(source: str, num_passages: int, revision: str | None, option: str) -> Iterator[str]:
    if source in HUB:
        place, config = HUB[source]
        rows = hub.read(
            place, config, ["text"], option=f"{option}={source}", revision=revision, split="train",
            limit=SPARE * num_passages, advice=f"give {option}=<text file> or {option}=embedded",
        )  # fmt: skip
        for row in rows:
            yield from re.split(r"\n\s*\n|\n(?= =)", row["text"])
        return
    path = Path(source)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{option}={source} holds no *.txt: give a text file, c4, wikitext or embedded")
    for file in files:
        for line in re.split(r"\n\s*\n", read_text(file, option)):
            # WikiText has a paragraph a line, other texts a blank line between paragraphs
            yield from line.split("\n") if len(line.split("\n")[0]) > 200 else [line]


def read_text(path: Path, option: str) -> str:
    """The text in the file `path`. Raises UsageError, beginning with `option`, if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{option}={path} does not exist: give embedded or a text file") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UsageError(f"{option}={path}, line {line}: not UTF-8 text: convert the file") from error
    except OSError as error:
        raise UsageError(f"{option}={path} cannot be read ({error.strerror}): give embedded or a text file") from error
