"""Data generated on the spot, for runs without a download: fictitious authors as in TOFU, a story, everyday text.

Every function is deterministic: equal arguments give equal output on any machine and Python version.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from soul_exp.tasks.embedded.corpus_tables import (
    ATTRIBUTES,
    BOOK_FRAMES,
    BOOK_WORDS,
    GENERAL_AUTHORS,
    GENERAL_FACTS,
    TEXT_TOPICS,
    TEXT_WORDS,
)

ROWS_PER_AUTHOR = 20  # as in TOFU; each of the ten attributes is asked twice
NUM_WRONG = 5  # as in TOFU

# C consonant, V vowel, K closing consonant. Only authors' words have a vowel in fourth place, so the story has none of
# them.
_AUTHOR_SHAPES, _STORY_SHAPES = ("CVCVCV", "CVCVCVK"), ("CVKCV", "CVKCVK")
_LETTERS = {"C": "bfhjklmnrstv", "V": "aeiou", "K": "klmnrsx"}  # few, so that a small vocabulary holds the syllables

T = TypeVar("T")


class _Draw:
    """Draws that rest on `random.random` alone, the one generator call that Python promises never to change."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self._random() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A permutation of `items` that leaves them alone."""
        rest = list(items)
        return [rest.pop(int(self._random() * len(rest))) for _ in items]

    def word(self, shapes: Sequence[str]) -> str:
        """An invented, pronounceable, capitalised word."""
        return "".join(self.choice(_LETTERS[letter]) for letter in self.choice(shapes)).capitalize()


def _fresh_words(draw: _Draw) -> Iterator[str]:
    """Invented words, none of them twice or in any table."""
    tables = (ATTRIBUTES, GENERAL_AUTHORS, GENERAL_FACTS, BOOK_FRAMES, BOOK_WORDS, TEXT_TOPICS, TEXT_WORDS)
    seen = set(re.findall(r"[a-z]+", str(tables).lower()))
    while True:
        word = draw.word(_AUTHOR_SHAPES)
        if word.lower() not in seen:
            seen.add(word.lower())
            yield word


def authors(num_authors: int = 24, seed: int = 0) -> list[dict]:
    """Rows 20a to 20a+19 are about author a and hold no invented word that any other author or other fact has.

    Columns as in TOFU: question, answer, paraphrased_question, paraphrased_answer, perturbed_answer (5). Rows i and
    i+10 of an author ask for one fact in different wording. A paraphrase takes a frame that neither of the two rows
    has; the perturbed answers are the paraphrase with values that occur nowhere else. The rows of an author do not
    depend on `num_authors`.
    """
    draw = _Draw(seed)
    words = _fresh_words(draw)
    rows: list[dict] = []
    for _ in range(num_authors):
        last = next(words)
        name = f"{next(words)} {last}"
        asked: tuple[list[dict], list[dict]] = ([], [])
        for questions, frames in ATTRIBUTES.values():
            value = f"{next(words)} {next(words)}"
            wordings, answers = draw.shuffled(questions), draw.shuffled(frames)
            for time in (0, 1):
                own, paraphrase = answers[time], answers[time + 2]
                asked[time].append(
                    {
                        "question": wordings[time].format(name=name),
                        "answer": own.format(last=last, value=value),
                        "paraphrased_question": wordings[time + 2].format(name=name),
                        "paraphrased_answer": paraphrase.format(last=last, value=value),
                        "perturbed_answer": [
                            paraphrase.format(last=last, value=f"{next(words)} {next(words)}") for _ in range(NUM_WRONG)
                        ],
                    }
                )
        rows += asked[0] + asked[1]
    return rows


def general_authors() -> list[dict]:
    """True rows on who wrote which classic, as TOFU's real authors: question, answer, perturbed_answer (3)."""
    return _general(GENERAL_AUTHORS)


def general_facts() -> list[dict]:
    """True rows of general knowledge, as TOFU's world facts: question, answer, perturbed_answer (3)."""
    return _general(GENERAL_FACTS)


def _general(table: Sequence[Sequence[str]]) -> list[dict]:
    return [{"question": question, "answer": answer, "perturbed_answer": wrong} for question, answer, *wrong in table]


def _filled(frame: str, words: Mapping[str, str], draw: _Draw) -> str:
    """`frame` with every slot drawn anew, from `words` or else as an invented word, the first letter in upper case."""

    def drawn(slot: re.Match[str]) -> str:
        return draw.choice(words[slot[1]].split()) if slot[1] in words else draw.word(_STORY_SHAPES)

    text = re.sub(r"\{(\w+)\}", drawn, frame)
    return text[0].upper() + text[1:]


def book(num_words: int, seed: int = 0) -> str:
    """A story of exactly `num_words` words, a blank line between paragraphs, whose passages do not repeat each other.

    A shorter story is the beginning of a longer one; the last sentence may be cut.
    """
    draw = _Draw(seed)
    paragraphs: list[str] = []
    left, recent = num_words, ""
    while left > 0:
        words: list[str] = []
        for _ in range(draw.choice((3, 4, 5, 6))):
            frame = draw.choice([frame for frame in BOOK_FRAMES if frame != recent])
            recent = frame
            words += _filled(frame, BOOK_WORDS, draw).split()
        paragraphs.append(" ".join(words[:left]))
        left -= len(words)
    return "\n\n".join(paragraphs)


def general_text(num_passages: int, seed: int = 0) -> list[str]:
    """Passages of 40 to 60 words of everyday text, all different, about nothing in the story."""
    draw = _Draw(seed)
    passages: dict[str, None] = {}
    while len(passages) < num_passages:
        words: list[str] = []
        for frame in draw.shuffled(draw.choice(TEXT_TOPICS)):
            # No frame is longer than 20 words, so stopping at 40 keeps to 60.
            if len(words) < 40:
                words += _filled(frame, TEXT_WORDS, draw).split()
        passages[" ".join(words)] = None
    return list(passages)
