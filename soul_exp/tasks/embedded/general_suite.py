"""The embedded utility suite: nine tasks of multiple-choice questions, and running text, like those of lm-eval.

All of it is generated and deterministic. `training_rows` teaches a model from scratch what the questions need, in other
wordings: no question is among them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from soul_exp.data import Item
from soul_exp.tasks.embedded import corpus
from soul_exp.tasks.embedded import general_suite_tables as tables
from soul_exp.tasks.embedded.corpus_tables import GENERAL_FACTS

NUM_TEXTS = 24
PRONOUN, TEXT = "pronoun", "text"  # the task whose contexts differ; the task of running text
TEXT_SEED = 1  # the text in trainings has seed 0


@dataclass(frozen=True)
class Question:
    """A choice between pairs of context and continuation, of which number `gold` is right.

    Usually all contexts are equal and the continuations differ; in `pronoun`, as in WinoGrande, the reverse. Scored is
    the likelihood of the continuation.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


def questions() -> dict[str, list[Question]]:
    """Task -> 24 questions; right answers are equally often in each position, so a constant guess is at chance."""
    return {name: make()[0] for name, make in TASKS.items()}


def texts() -> list[str]:
    """Running text for perplexity: everyday passages, none of which is in the training of a task."""
    trained = set(corpus.general_text(1000))
    unseen = [text for text in corpus.general_text(2 * NUM_TEXTS, TEXT_SEED) if text not in trained]
    return unseen[:NUM_TEXTS]


def training_rows() -> list[Item]:
    """216 short rows from which a model from scratch learns what the questions need; none of them is a question."""
    return [item for make in TASKS.values() for item in make()[1]]


Made = tuple[list[Question], list[Item]]  # the questions of a task and the rows that teach them


def _choice(context: str, right: str, wrong: Sequence[str], number: int) -> Question:
    """A question whose right answer is in position `number` modulo the number of answers."""
    position = number % (len(wrong) + 1)
    answers = [*wrong[:position], right, *wrong[position:]]
    return Question((context,) * len(answers), tuple(answers), position)


def _row(context: str, answer: str) -> Item:
    return Item(context, f" {answer}", raw=True)


def _others(values: Sequence[str], number: int, count: int) -> list[str]:
    """`count` values other than value `number`, consecutive from a start that depends on it."""
    rest = [*values[number + 1 :], *values[:number]]
    start = number % len(rest)
    return (rest + rest)[start : start + count]


def _keyed(answers: Mapping[str, str], wordings: Sequence[str], num_wrong: int, first: int = 0) -> Made:
    """Each key taught in the first wording, questioned in the second; wrong are answers to other keys."""
    teach, ask = wordings
    values, questions, rows = list(answers.values()), [], []
    for i, (key, value) in enumerate(answers.items()):
        rows.append(_row(teach.format(key=key), value))
        questions.append(_choice(ask.format(key=key), value, _others(values, i, num_wrong), first + i))
    return questions, rows


def _facts(groups: Sequence[tuple[tuple[str, str], Mapping[str, str]]], frame: str) -> Made:
    questions: list[Question] = []
    rows: list[Item] = []
    for wordings, facts in groups:
        of_group = _keyed(facts, [frame.format(wording) for wording in wordings], 3, len(questions))
        questions, rows = questions + of_group[0], rows + of_group[1]
    return questions, rows


def boolean() -> Made:
    questions, rows = [], []
    for group, (word, sides) in enumerate(tables.BOOLEAN.items()):
        nouns = tables.BOOLEAN_NOUNS[3 * group :] + tables.BOOLEAN_NOUNS[: 3 * group]
        for answer, keys in zip(("yes", "no"), sides, strict=True):
            for i, key in enumerate(keys):  # both answers get the same nouns
                teach, ask = tables.BOOLEAN_WORDINGS
                rows.append(_row(teach.format(noun=nouns[i], key=key, value=word), answer))
                context = ask.format(noun=nouns[i + 3], key=key, value=word)
                questions.append(Question((context,) * 2, ("no", "yes"), int(answer == "yes")))
    return questions, rows


def entailment() -> Made:
    questions, rows = [], []
    for nouns, (hypothesis, sides) in zip(tables.ENTAILMENT_NOUNS, tables.ENTAILMENT.items(), strict=True):
        for answer, keys in zip(("True", "False"), sides, strict=True):
            for i, key in enumerate(keys):  # both answers get the same names and nouns
                contexts = []
                for turn, wording in enumerate(tables.ENTAILMENT_WORDINGS):
                    name, noun = tables.NAMES[(i + 3 * turn) % len(tables.NAMES)], nouns[(i + turn) % len(nouns)]
                    claim = hypothesis.format(name=name, noun=noun)
                    contexts.append(wording.format(name=name, key=key, noun=noun, claim=claim))
                rows.append(_row(contexts[0], answer))
                questions.append(Question((contexts[1],) * 2, ("True", "False"), int(answer == "False")))
    return questions, rows


def pronoun() -> Made:
    questions, rows = [], []
    for wordings, continuations, pairs in tables.PRONOUNS:
        for i, (first, second) in enumerate(pairs):
            other = pairs[(i + 1) % len(pairs)][1]  # the question has another second noun than the training row
            teach = wordings[i % 2].format(first=first, second=second)
            ask = wordings[1 - i % 2].format(first=first, second=other)
            for number, continuation in enumerate(continuations):
                rows.append(_row(f"{teach} {(first, second)[number]}", continuation))
                options = (first, other) if i % 2 else (other, first)
                contexts = tuple(f"{ask} {option}" for option in options)
                questions.append(Question(contexts, (continuation,) * 2, options.index((first, other)[number])))
    return questions, rows


def science_easy() -> Made:
    facts = {answer: question for question, answer, *_ in GENERAL_FACTS}
    questions, rows = [], []
    answers = list(tables.SCIENCE_EASY)
    for i, (answer, question) in enumerate(tables.SCIENCE_EASY.items()):
        rows.append(_row(f"Question: {facts[answer]}\nAnswer:", answer))
        questions.append(_choice(f"Question: {question}\nAnswer:", answer, _others(answers, i, 3), i))
    return questions, rows


def truthful() -> Made:
    questions = [
        _choice(f"Question: {ask}\nAnswer:", truth, wrong, i)
        for i, (_, ask, truth, *wrong) in enumerate(tables.TRUTHFUL)
    ]
    rows = [_row(f"Question: {teach}\nAnswer:", truth) for teach, _, truth, *_ in tables.TRUTHFUL]
    return questions, rows


TASKS: dict[str, Callable[[], Made]] = {
    "boolean": boolean,
    "entailment": entailment,
    "completion": lambda: _keyed({s: f"{e}." for s, e in tables.COMPLETION.items()}, tables.COMPLETION_WORDINGS, 3),
    "pronoun": pronoun,
    "science_easy": science_easy,
    "science_hard": lambda: _facts(tables.SCIENCE_HARD, "Question: {}\nAnswer:"),
    "open_book": lambda: _facts(tables.OPEN_BOOK, "{}"),
    "physical": lambda: _keyed({g: f"a {tool}." for g, tool in tables.PHYSICAL.items()}, tables.PHYSICAL_WORDINGS, 1),
    "truthful": truthful,
}
