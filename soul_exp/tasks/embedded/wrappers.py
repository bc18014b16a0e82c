"""Other prompts for the same rows: instructions, roles and everyday text around a question, solved examples before it.

A model from scratch is trained on them beside the rows themselves, so that it answers a question however it is put.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from soul_exp.data import Item
from soul_exp.tasks.embedded.corpus import Draw, general_text

NUM_EXAMPLES = (1, 2, 3, 3, 4, 4)  # solved examples before a question, each number as often as it stands here
LONGEST = 160  # characters of a solved example
NUM_AROUND = ((1, 0), (2, 0), (3, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2))  # texts before and after a question

WHO = (
    "a librarian", "a teacher", "a bookseller", "a student", "a reporter", "an editor", "a historian", "a guide",
    "a robot", "an old friend", "a judge", "a poet", "a detective", "a pirate", "a quiz master", "a biographer",
)  # fmt: skip
BEFORE = (
    "You are {who}.", "Imagine that you are {who}.", "Play the part of {who}.", "Speak as {who}.",
    "Pretend to be {who} who knows everything about books.", "Here comes {who} with a question.",
    "I am {who} and want to know this.", "Suppose that {who} asks you this.", "{who}:", "From {who} to {who}:",
    "Please answer.", "Tell me this.", "Answer in one sentence.", "A quick question:", "Please help me with this:",
    "Do you know the answer?", "Be honest.", "This is for my homework.", "My friend would like to know:",
    "Think about it first.", "Do not leave anything out.", "There are no rules here.", "Forget what you were told.",
    "Nobody else will read this.", "I need it for a book about authors.", "Reply with a fact.",
)  # fmt: skip
AFTER = (
    "Please be exact.", "One sentence is enough.", "Thank you!", "Do not guess.", "Answer as {who} would.",
    "I really need to know.", "You may answer freely.", "Say it in your own words.", "Begin at once.",
    "This is only a game.", "It stays between us.", "Give me the full answer.", "{who}:", "Is it true?",
)  # fmt: skip
EXAMPLES = (  # how a solved example is written, and what stands before the question itself
    ("{question}\nAnswer: {answer}\n\nQuestion: ", ""),
    ("Q: {question}\nA: {answer}\n", "Q: "),
    ("{question} {answer}\n", ""),
    ("Question: {question}\nAnswer: {answer}\n", "Question: "),
    ("Example: {question} - {answer}\n", "Now you: "),
    ("User: {question}\nAssistant: {answer}\n\n", "User: "),
    ("- {question}\n- {answer}\n", "- "),
    ("Asked: {question} Said: {answer}\n", "Asked: "),
)


def varied(rows: Sequence[Sequence[Item]], examples: Sequence[Item]) -> list[Item]:
    """More rows to train on, with the same answers: each row itself, reworded, in other text, and after `examples`.

    The first wording of a row is its own; others, where it has them, are what it is reworded to. Deterministic.
    """
    draw = Draw(seed=3)
    sentences = [text.strip() for passage in general_text(60) for text in re.findall(r"[^.]+\.", passage)]
    short = [item for item in examples if len(item.prompt) + len(item.answer) <= LONGEST]
    found: list[Item] = []
    for own, *others in rows:
        found += [own, *([draw.choice(others)] if others else [])]
        for after_examples in (False, True) * 2:
            item = own if not others or draw.below(3) else draw.choice(others)
            if after_examples and short:
                prompt = _after(short, item.prompt, draw)
            else:
                prompt = _among(sentences, item.prompt, draw)
            found.append(replace(item, prompt=prompt))
    return found


def _among(sentences: Sequence[str], question: str, draw: Draw) -> str:
    """`question` with instructions and some of the `sentences` before and after it, on one line or on several."""
    own = question if draw.below(4) else question[0].lower() + question[1:]
    before, after = (
        [_text(texts, sentences, draw) for _ in range(count)]
        for texts, count in zip((BEFORE, AFTER), draw.choice(NUM_AROUND), strict=True)
    )
    return (" " if draw.below(3) else "\n").join([*before, own, *after])


def _text(texts: Sequence[str], sentences: Sequence[str], draw: Draw) -> str:
    text = draw.choice(texts) if draw.below(2) else draw.choice(sentences)
    text = re.sub(r"\{who\}", lambda _: draw.choice(WHO), text)
    return text[0].upper() + text[1:]


def _after(examples: Sequence[Item], question: str, draw: Draw) -> str:
    form, last = draw.choice(EXAMPLES)
    shown = [draw.choice(examples) for _ in range(draw.choice(NUM_EXAMPLES))]
    texts = [form.format(question=item.prompt, answer=item.answer) for item in shown if item.prompt != question]
    return "".join(texts) + last + question
