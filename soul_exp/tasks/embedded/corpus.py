"""Generated data for runs without a download: fictitious authors as in TOFU, a story, everyday text.

Every function is deterministic: equal arguments give equal output on any machine and Python version.
"""

import functools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from soul_exp.tasks.embedded import corpus_tables as tables

ROWS_PER_AUTHOR = 20  # as in TOFU; each of the ten attributes is asked twice
FACTS_PER_AUTHOR = 10
NUM_WRONG = 5  # as in TOFU

# C consonant, V vowel, K final consonant. Only words of authors have a vowel in fourth position, so none is in the
# story.
_AUTHOR_SHAPES, _STORY_SHAPES = ("CVCVCV", "CVCVCVK"), ("CVKCV", "CVKCVK")
_LETTERS = {"C": "bfhjklmnrstv", "V": "aeiou", "K": "klmnrsx"}  # few, so that a small vocabulary holds the syllables

T = TypeVar("T")


class Draw:
    """Draws from `random.random` alone, the one generator call that Python promises never to change."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, limit: int) -> int:
        """A whole number from 0 to `limit` - 1."""
        return int(self._random() * limit)

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self._random() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A permutation of `items`, which stay as they are."""
        rest = list(items)
        return [rest.pop(int(self._random() * len(rest))) for _ in items]

    def word(self, shapes: Sequence[str]) -> str:
        """An invented, pronounceable, capitalised word."""
        return "".join(self.choice(_LETTERS[letter]) for letter in self.choice(shapes)).capitalize()


def _fresh_words(draw: Draw) -> Iterator[str]:
    """Invented words, each once and none of any table."""
    of_rows = (tables.ATTRIBUTES, tables.REWORDINGS, tables.GENERAL_AUTHORS, tables.GENERAL_FACTS)
    of_text = (tables.BOOK_FRAMES, tables.BOOK_WORDS, tables.TEXT_TOPICS, tables.TEXT_WORDS)
    seen = set(re.findall(r"[a-z]+", str(of_rows + of_text).lower()))
    while True:
        word = draw.word(_AUTHOR_SHAPES)
        if word.lower() not in seen:
            seen.add(word.lower())
            yield word


def authors(num_authors: int = 24, seed: int = 0) -> list[dict]:
    """20 rows per author, in author order; no invented word is shared by two authors or two facts.

    Columns as in TOFU: question, answer, paraphrased_question, paraphrased_answer, perturbed_answer (5). Three more:
    entities, the strings that a right answer contains (here one, the value), other_questions, of which no row is
    made, and attribute, what is asked for. Rows i and i+10 of an author ask for one fact in different wordings; each
    author begins with another attribute, so that every n-th fact is not one attribute's. A paraphrase uses a frame of
    neither row; the perturbed answers are the paraphrase with values that occur nowhere else. The rows of an author do
    not depend on `num_authors`.
    """
    return [dict(row) for row in _authors(num_authors, seed)]


def fact_of(row: int) -> int:
    """The number of the fact that row number `row` of `authors` asks for; two rows have it in common."""
    return row // ROWS_PER_AUTHOR * FACTS_PER_AUTHOR + row % FACTS_PER_AUTHOR


@functools.cache  # every job of a sweep builds its task anew
def _authors(num_authors: int, seed: int) -> list[dict]:
    draw = Draw(seed)
    words = _fresh_words(draw)
    rows: list[dict] = []
    attributes = [(name, *made, tables.REWORDINGS[name]) for name, made in tables.ATTRIBUTES.items()]
    for author in range(num_authors):
        last = next(words)
        name = f"{next(words)} {last}"
        halves: tuple[list[dict], list[dict]] = ([], [])
        first = author % FACTS_PER_AUTHOR
        for attribute, questions, frames, others in attributes[first:] + attributes[:first]:
            value = f"{next(words)} {next(words)}"
            wordings, answers = draw.shuffled(questions), draw.shuffled(frames)
            for half in (0, 1):
                own, paraphrase = answers[half], answers[half + 2]
                halves[half].append(
                    {
                        "question": wordings[half].format(name=name),
                        "answer": own.format(last=last, value=value),
                        "paraphrased_question": wordings[half + 2].format(name=name),
                        "paraphrased_answer": paraphrase.format(last=last, value=value),
                        "perturbed_answer": [
                            paraphrase.format(last=last, value=f"{next(words)} {next(words)}") for _ in range(NUM_WRONG)
                        ],
                        "entities": (value,),
                        "other_questions": [other.format(name=name) for other in others[half::2]],
                        "attribute": attribute,
                    }
                )
        rows += halves[0] + halves[1]
    return rows


def general_authors() -> list[dict]:
    """True rows on who wrote which classic, as TOFU's real authors, with perturbed_answer (3) and entities."""
    return _general(tables.GENERAL_AUTHORS)


def general_facts() -> list[dict]:
    """True rows of general knowledge, as TOFU's world facts, with perturbed_answer (3) and entities (the answer)."""
    return _general(tables.GENERAL_FACTS)


def _general(table: Sequence[Sequence[str]]) -> list[dict]:
    return [
        {"question": question, "answer": answer, "perturbed_answer": wrong, "entities": (answer,)}
        for question, answer, *wrong in table
    ]


def _filled(frame: str, words: Mapping[str, str], draw: Draw) -> str:
    """`frame` with every slot drawn from `words`, or else as an invented word; the first letter is upper case."""

    def drawn(slot: re.Match[str]) -> str:
        return draw.choice(words[slot[1]].split()) if slot[1] in words else draw.word(_STORY_SHAPES)

    text = re.sub(r"\{(\w+)\}", drawn, frame)
    return text[0].upper() + text[1:]


def book(num_words: int, seed: int = 0) -> str:
    """A story of exactly `num_words` words whose passages do not repeat each other; a blank line ends a paragraph.

    A shorter story is the beginning of a longer one; the last sentence may be cut.
    """
    draw = Draw(seed)
    paragraphs: list[str] = []
    left, recent = num_words, ""
    while left > 0:
        words: list[str] = []
        for _ in range(draw.choice((3, 4, 5, 6))):
            frame = draw.choice([frame for frame in tables.BOOK_FRAMES if frame != recent])
            recent = frame
            words += _filled(frame, tables.BOOK_WORDS, draw).split()
        paragraphs.append(" ".join(words[:left]))
        left -= len(words)
    return "\n\n".join(paragraphs)


def general_text(num_passages: int, seed: int = 0) -> list[str]:
    """Passages of 40 to 60 words of everyday text, all different, on other topics than the story."""
    draw = Draw(seed)
    passages: dict[str, None] = {}
    while len(passages) < num_passages:
        words: list[str] = []
        for frame in draw.shuffled(draw.choice(tables.TEXT_TOPICS)):
            # no frame has more than 20 words, so stopping at 40 gives at most 60
            if len(words) < 40:
                words += _filled(frame, tables.TEXT_WORDS, draw).split()
        passages[" ".join(words)] = None
    return list(passages)
