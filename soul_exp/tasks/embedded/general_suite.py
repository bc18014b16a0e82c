"""The embedded utility suite: nine kinds of questions and running text, as lm-evaluation-harness's tasks ask them.

All of it is made on the spot and deterministic. `training_rows` teaches a model from scratch what the questions need,
in other wordings: no question is ever among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from soul_exp.data import Item
from soul_exp.tasks.embedded import corpus
from soul_exp.tasks.embedded.corpus_tables import GENERAL_FACTS
from soul_exp.tasks.embedded.general_suite_tables import (
    BOOLEAN,
    BOOLEAN_NOUNS,
    BOOLEAN_WORDINGS,
    COMPLETION,
    COMPLETION_WORDINGS,
    ENTAILMENT,
    ENTAILMENT_NOUNS,
    ENTAILMENT_WORDINGS,
    NAMES,
    OPEN_BOOK,
    PHYSICAL,
    PHYSICAL_WORDINGS,
    PRONOUNS,
    SCIENCE_EASY,
    SCIENCE_HARD,
    TRUTHFUL,
)

NUM_TEXTS = 24
PRONOUN, TEXT = "pronoun", "text"  # the task whose contexts differ; the name of the running text
TEXT_SEED = 1  # the training's text has seed 0


@dataclass(frozen=True)
class Question:
    """A choice between continuations of `contexts`, of which number `gold` is right.

    Usually all contexts are the same and the continuations differ; in `pronoun`, as in WinoGrande, it is the other way
    round. The likelihood that counts is that of the continuation.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


def questions() -> dict[str, list[Question]]:
    """Task -> 24 questions; right answers stand equally often in each place, so that a constant guess is at chance."""
    return {name: make()[0] for name, make in TASKS.items()}


def texts() -> list[str]:
    """Running text for perplexity: everyday passages of which none is in a training of ours."""
    taught = set(corpus.general_text(1000))
    fresh = [text for text in corpus.general_text(2 * NUM_TEXTS, TEXT_SEED) if text not in taught]
    return fresh[:NUM_TEXTS]


def training_rows() -> list[Item]:
    """What a model from scratch has to read to answer the questions: 216 short rows, none of them a question."""
    return [item for make in TASKS.values() for item in make()[1]]


Made = tuple[list[Question], list[Item]]


def _choice(context: str, right: str, wrong: Sequence[str], number: int) -> Question:
    """A question whose right answer stands in place `number`, counted round."""
    place = number % (len(wrong) + 1)
    answers = [*wrong[:place], right, *wrong[place:]]
    return Question((context,) * len(answers), tuple(answers), place)


def _row(context: str, answer: str) -> Item:
    return Item(context, f" {answer}", raw=True)


def _others(values: Sequence[str], number: int, count: int) -> list[str]:
    """`count` other values than that of `number`, which follow each other from a place that depends on it."""
    rest = [*values[number + 1 :], *values[:number]]
    start = number % len(rest)
    return (rest + rest)[start : start + count]


def _facts(groups: Sequence[tuple[tuple[str, str], Mapping[str, str]]], frame: str) -> Made:
    asked: list[Question] = []
    taught: list[Item] = []
    for (teach, ask), facts in groups:
        values = list(facts.values())
        for i, (key, value) in enumerate(facts.items()):
            taught.append(_row(frame.format(teach.format(key=key)), value))
            asked.append(_choice(frame.format(ask.format(key=key)), value, _others(values, i, 3), len(asked)))
    return asked, taught


def boolean() -> Made:
    asked, taught = [], []
    for group, (word, sides) in enumerate(BOOLEAN.items()):
        nouns = BOOLEAN_NOUNS[3 * group :] + BOOLEAN_NOUNS[: 3 * group]
        for answer, keys in zip(("yes", "no"), sides, strict=True):
            for i, key in enumerate(keys):  # both answers get the same nouns
                teach, ask = BOOLEAN_WORDINGS
                taught.append(_row(teach.format(noun=nouns[i], key=key, value=word), answer))
                context = ask.format(noun=nouns[i + 3], key=key, value=word)
                asked.append(Question((context,) * 2, ("no", "yes"), int(answer == "yes")))
    return asked, taught


def entailment() -> Made:
    asked, taught = [], []
    for nouns, (hypothesis, sides) in zip(ENTAILMENT_NOUNS, ENTAILMENT.items(), strict=True):
        for answer, keys in zip(("True", "False"), sides, strict=True):
            for i, key in enumerate(keys):  # both answers get the same names and nouns
                contexts = []
                for turn, wording in enumerate(ENTAILMENT_WORDINGS):
                    name, noun = NAMES[(i + 3 * turn) % len(NAMES)], nouns[(i + turn) % len(nouns)]
                    claim = hypothesis.format(name=name, noun=noun)
                    contexts.append(wording.format(name=name, key=key, noun=noun, claim=claim))
                taught.append(_row(contexts[0], answer))
                asked.append(Question((contexts[1],) * 2, ("True", "False"), int(answer == "False")))
    return asked, taught


def completion() -> Made:
    return _keyed(list(COMPLETION), [f"{ending}." for ending in COMPLETION.values()], COMPLETION_WORDINGS, 3)


def pronoun() -> Made:
    asked, taught = [], []
    for wordings, said, pairs in PRONOUNS:
        for i, (first, second) in enumerate(pairs):
            other = pairs[(i + 1) % len(pairs)][1]  # asked with another partner than taught
            teach = wordings[i % 2].format(first=first, second=second)
            ask = wordings[1 - i % 2].format(first=first, second=other)
            for number, what in enumerate(said):
                taught.append(_row(f"{teach} {(first, second)[number]}", what))
                options = (first, other) if i % 2 else (other, first)
                contexts = tuple(f"{ask} {option}" for option in options)
                asked.append(Question(contexts, (what,) * 2, options.index((first, other)[number])))
    return asked, taught


def science_easy() -> Made:
    facts = {answer: question for question, answer, *_ in GENERAL_FACTS}
    asked, taught = [], []
    answers = list(SCIENCE_EASY)
    for i, (answer, question) in enumerate(SCIENCE_EASY.items()):
        taught.append(_row(f"Question: {facts[answer]}\nAnswer:", answer))
        asked.append(_choice(f"Question: {question}\nAnswer:", answer, _others(answers, i, 3), i))
    return asked, taught


def science_hard() -> Made:
    return _facts(SCIENCE_HARD, "Question: {}\nAnswer:")


def open_book() -> Made:
    return _facts(OPEN_BOOK, "{}")


def physical() -> Made:
    return _keyed(list(PHYSICAL), [f"a {tool}." for tool in PHYSICAL.values()], PHYSICAL_WORDINGS, 1)


def _keyed(keys: Sequence[str], answers: Sequence[str], wordings: Sequence[str], num_wrong: int) -> Made:
    """Each key taught in the first wording and asked in the second, among the answers to other keys."""
    teach, ask = wordings
    taught = [_row(teach.format(key=key), answer) for key, answer in zip(keys, answers, strict=True)]
    asked = [_choice(ask.format(key=key), answers[i], _others(answers, i, num_wrong), i) for i, key in enumerate(keys)]
    return asked, taught


def truthful() -> Made:
    asked = [
        _choice(f"Question: {ask}\nAnswer:", truth, wrong, i) for i, (_, ask, truth, *wrong) in enumerate(TRUTHFUL)
    ]
    taught = [_row(f"Question: {teach}\nAnswer:", truth) for teach, _, truth, *_ in TRUTHFUL]
    return asked, taught


TASKS: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (
        boolean, entailment, completion, pronoun, science_easy, science_hard, open_book, physical, truthful,
    )
}  # fmt: skip
