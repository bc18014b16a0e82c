"""Prompts: does a model that was made to forget an answer give it when it is asked in another way?"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np

from soul_exp.attacks.attack import FORGET, Attack, Found, Target
from soul_exp.attacks.sample import most_tokens, unreadable
from soul_exp.data import Item, Template, seed_of
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import evaluating, generations, likelihoods
from soul_exp.evaluation.records import as_recorded
from soul_exp.metrics.answers import Answers
from soul_exp.ranges import ANY_COUNT, SEED
from soul_exp.tasks.task import Probe, Task

PROMPT, BEGIN = "prompt", "begin"  # of a form: the text in place of the question, and how the answer is made to begin
QUESTION, PARAPHRASED, BEGINNING = "question", "paraphrased_question", "beginning"
SLOT = re.compile(r"\{(\w+)\}")
EXAMPLE = re.compile(r"(question|answer)_([1-9]\d*)")
LONGEST = 400  # characters of the question and the answer of an example


@dataclass(frozen=True, kw_only=True)
class Prompts(Attack):
    """The greedy answer to each question of the forget probe, put in another form.

    A form is a text, `prompt`, with slots: {question}, or {paraphrased_question} where the probe has these, and
    {question_1}, {answer_1}, {question_2} ... of retained examples, drawn anew for each question. Its text `begin`, if
    any, is how the answer begins: {beginning} is what the right one says before its first entity. Questions that lack
    what a form needs are left out of it. Answers have at most as many new tokens as samples do.
    """

    forms: Mapping[str, Mapping[str, str]]
    spare_tokens: Annotated[int, ANY_COUNT] = 16
    seed: Annotated[int, SEED] = 0

    grid = "forms"

    def __post_init__(self) -> None:
        if not self.forms:
            raise ValueError("forms={}: expected a form or more")
        for name, form in self.forms.items():
            if (why := _mistake(form)) is not None:
                raise UsageError(f"attack.prompts.forms.{name}: {why}")

    def branches(self) -> dict[str, Any]:
        return {name: dict(form) for name, form in self.forms.items()}

    def reads(self) -> Sequence[str]:
        return (f"probe.{FORGET}", "part.retain")

    def missing(self, task: Task) -> str | None:
        if (why := super().missing(task)) is not None:
            return why
        return unreadable(task.probes[FORGET])

    def rows_read(self, task: Task, template: Template) -> list[Item]:
        probe, examples = task.probes[FORGET], examples_of(task)
        return [i for form in self.forms.values() for _, i in in_form(form, probe, examples, template, self.seed)]

    def points(self, target: Target, branch: str) -> Found:
        lm, probe = target.load(), target.task.probes[FORGET]
        limit = most_tokens(lm, lm.encode(probe.items), self.spare_tokens)
        asked = list(in_form(self.branches()[branch], probe, examples_of(target.task), lm.template, self.seed))
        if not asked:
            return {}
        numbers, items = zip(*asked, strict=True)
        with evaluating(lm):
            rows = likelihoods(lm, items, batch_size=target.batch_size, label=target.label)
            texts = generations(lm, items, batch_size=target.batch_size, max_new_tokens=limit, label=target.label)
        answers = Answers(
            nll=np.array([row.nll for row in rows]),
            answer=[probe.items[i].answer for i in numbers],
            entities=[probe.entities[i] for i in numbers] if probe.entities is not None else None,
            unit=[probe.units[i] for i in numbers] if probe.units is not None else None,
            generation=texts,
        )
        return {FORGET: as_recorded(answers)}


def _mistake(form: Mapping[str, str]) -> str | None:
    """What is wrong with `form`; None: nothing."""
    if PROMPT not in form or not {*form} <= {PROMPT, BEGIN}:
        return f"found {', '.join(form) or 'nothing'}, expected prompt, and begin if the answer is to begin in some way"
    known = f"{{{QUESTION}}}, {{{PARAPHRASED}}}, {{{QUESTION}_1}}, {{answer_1}} and so on"
    slots = SLOT.findall(form[PROMPT])
    for slot in slots:
        if slot not in (QUESTION, PARAPHRASED) and not EXAMPLE.fullmatch(slot):
            return f"prompt has {{{slot}}}, expected {known}"
    if sum(slot in (QUESTION, PARAPHRASED) for slot in slots) != 1:
        return f"prompt={form[PROMPT]!r}: expected {{{QUESTION}}} or {{{PARAPHRASED}}} once"
    if other := {*SLOT.findall(form.get(BEGIN, ""))} - {BEGINNING}:
        return f"begin has {{{min(other)}}}, expected {{{BEGINNING}}} or no slot"
    return None


def examples_of(task: Task) -> list[Item]:
    """Retained rows that can be shown before a question: the short ones."""
    rows = [row[0] for row in task.parts["retain"].rows]
    return [item for item in rows if len(item.prompt) + len(item.answer) <= LONGEST]


def in_form(
    form: Mapping[str, str], probe: Probe, examples: Sequence[Item], template: Template, seed: int
) -> Iterator[tuple[int, Item]]:
    """The number of each question of `probe` that can be put in `form`, and its item then.

    Where the form begins the answer, the item is running text, and its answer is what is left to say.
    """
    begin = form.get(BEGIN, "")
    slots = {*SLOT.findall(form[PROMPT] + begin)}
    count = max((int(found[2]) for slot in slots if (found := EXAMPLE.fullmatch(slot))), default=0)
    for i, item in enumerate(probe.items):
        values = {QUESTION: item.prompt, **_shown(item, examples, count, seed)}
        if probe.paraphrased_questions is not None:
            values[PARAPHRASED] = probe.paraphrased_questions[i].prompt
        before = beginning_of(item.answer, probe.entities[i]) if probe.entities is not None else ""
        if before:
            values[BEGINNING] = before
        if not slots <= values.keys():
            continue
        put = replace(item, prompt=_filled(form[PROMPT], values))
        if begin:
            prompt, answer = template.texts(put)
            at = answer.index(item.answer)  # blanks, or what the template writes before the answer
            left = answer[at:].removeprefix(before) if BEGINNING in slots else f" {answer[at:]}"
            put = Item(prompt + answer[:at] + _filled(begin, values), left, raw=True)
        yield i, put


def _filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with a value in each slot, in one pass: braces in a value are text."""
    return SLOT.sub(lambda slot: values[slot[1]], text)


def _shown(item: Item, examples: Sequence[Item], count: int, seed: int) -> dict[str, str]:
    """Slot -> text of `count` examples with another answer than `item`, which draws them; none if there are fewer."""
    others = [each for each in examples if each.answer != item.answer] if count else []
    if len(others) < count:
        return {}
    drawn = random.Random(seed_of("example", seed, item.prompt)).sample(others, count)
    pairs = [(f"question_{number}", f"answer_{number}", each) for number, each in enumerate(drawn, start=1)]
    return {slot: text for own, other, each in pairs for slot, text in ((own, each.prompt), (other, each.answer))}


def beginning_of(answer: str, entities: Sequence[str]) -> str:
    """What `answer` says before the first of `entities` that it contains, without blanks at its end; "" if none."""
    found = [match.start() for each in entities if (match := re.search(re.escape(each), answer, re.IGNORECASE))]
    return answer[: min(found)].rstrip() if found else ""
