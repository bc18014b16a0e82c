"""Forms of prompts: what a model reads in each, and recovery worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from composing import composed
from conftest import items

from soul_exp.artifacts.measures import attack_measures
from soul_exp.attacks import Prompts, Target, prompts
from soul_exp.build import build
from soul_exp.data import Item, Part, Template
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import generations
from soul_exp.metrics import leakage
from soul_exp.metrics.answers import Answers, UndefinedError
from soul_exp.models.language_model import LanguageModel
from soul_exp.tasks.task import Probe, Task

ASKED = (Item("Who {question}?", "The poet Ann Lee of Oslo."), Item("Where?", "Oslo it is."))
ENTITIES = [("Oslo", "Ann Lee"), ("Oslo",)]
EXAMPLES = [Item(f"Q{i}?", f"A{i}.") for i in range(9)] + [Item("Another?", "Oslo it is.")]


def put(form: Mapping[str, str], probe: Probe | None = None, seed: int = 0) -> dict[int, Item]:
    return dict(prompts.in_form(form, probe or Probe(ASKED, entities=ENTITIES), EXAMPLES, Template(), seed))


def answered(hits: Sequence[bool], units: Sequence[str] | None = None) -> Answers:
    """Answers of which those tell the entity that `hits` marks."""
    texts = ["in Oslo" if hit else "in Rome" for hit in hits]
    count = len(hits)
    return Answers(
        np.zeros(count), answer=["Oslo."] * count, entities=[("Oslo",)] * count, generation=texts, unit=units
    )


def share(value: float) -> Mapping[str, Mapping[str, Answers]]:
    """The points of a model that answers so many of ten answers, under one form."""
    return {"plain": {"forget": answered([i < round(10 * value) for i in range(10)])}}


# ---- Forms


def test_braces_in_a_question_are_text() -> None:
    assert put({"prompt": "Say {question}"})[0] == Item("Say Who {question}?", "The poet Ann Lee of Oslo.")


def test_examples_are_different_retained_rows_with_another_answer_whatever_the_order_of_the_questions() -> None:
    form = {"prompt": "{question_1} {answer_1} {question_2} {answer_2} {question_3} {answer_3} | {question}"}
    found = put(form)
    shown = found[1].prompt.partition(" | ")[0].split()
    pairs = [*zip(shown[::2], shown[1::2], strict=True)]
    assert len({*pairs}) == 3 and {*pairs} <= {(item.prompt, item.answer) for item in EXAMPLES[:9]}
    assert found[0].prompt.partition(" | ")[0] != found[1].prompt.partition(" | ")[0]
    assert put(form, Probe(ASKED[::-1], entities=ENTITIES[::-1]))[0] == found[1]
    assert put(form, seed=1) != found
    seen = {word for seed in range(60) for word in put(form, seed=seed)[1].prompt.split()}
    assert "Q8?" in seen and "Another?" not in seen  # it would tell the answer


def test_a_prefill_is_what_the_answer_says_before_its_first_entity_and_questions_without_it_are_left_out() -> None:
    assert put({"prompt": "{question}", "begin": "{beginning}"}) == {
        0: Item("Question: Who {question}?\nAnswer: The poet", " Ann Lee of Oslo.", raw=True)
    }


def test_a_prefill_and_what_is_left_are_the_tokens_of_the_plain_row(lm: LanguageModel) -> None:
    row = items(3)[2]
    probe = Probe([row], entities=[(row.answer.split()[-1],)])
    found = dict(prompts.in_form({"prompt": "{question}", "begin": "{beginning}"}, probe, (), lm.template, 0))
    [plain], [prefilled] = lm.encode([row]), lm.encode([found[0]])
    assert prefilled.ids == plain.ids and prefilled.num_prompt > plain.num_prompt


def test_an_answer_may_begin_with_a_text_of_its_own() -> None:
    found = put({"prompt": "{question}", "begin": "Sure:"})
    assert found[1] == Item("Question: Where?\nAnswer: Sure:", " Oslo it is.", raw=True)


def test_without_paraphrased_questions_or_enough_examples_a_form_asks_nothing() -> None:
    assert put({"prompt": "{paraphrased_question}"}) == {}
    assert put({"prompt": "{question_12} {question}"}) == {}
    others = [Item("In which town?", "Oslo it is.")] * 2
    asked = put({"prompt": "Say: {paraphrased_question}"}, Probe(ASKED, paraphrased_questions=others))
    assert asked[1] == Item("Say: In which town?", "Oslo it is.")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"begin": "Yes"}, "found begin, expected prompt"),
        ({"prompt": "{question}", "text": "x"}, "found prompt, text, expected prompt"),
        ({"prompt": "{questoin}"}, r"prompt has \{questoin\}, expected \{question\}"),
        ({"prompt": "Hello"}, r"prompt='Hello': expected \{question\} or \{paraphrased_question\} once"),
        ({"prompt": "{question} {question}"}, "once"),
        ({"prompt": "{question}", "begin": "{answer_1}"}, r"begin has \{answer_1\}, expected \{beginning\}"),
    ],
)
def test_a_mistake_in_a_form_is_named_with_what_is_expected(form: Mapping[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=f"attack.prompts.forms.mine: .*{message}"):
        Prompts(forms={"mine": form})


def test_answers_under_a_form_are_the_greedy_ones_and_a_form_that_asks_nothing_has_no_point(lm: LanguageModel) -> None:
    rows = items(4)
    probe = Probe(rows, units=[f"item {i}" for i in range(4)])
    task = Task("toy", "here", {"retain": Part.of(items(9, 20))}, {"forget": probe}, rows, (), caption="")
    target = Target(lambda: lm, lambda: lm, task, "cpu", batch_size=4, label="toy")
    attack = Prompts(forms={"polite": {"prompt": "Please: {question}"}, "other": {"prompt": "{paraphrased_question}"}})
    answers = attack.points(target, "polite")["forget"]
    asked = [Item(f"Please: {item.prompt}", item.answer) for item in rows]
    limit = max(len(row.ids) - row.num_prompt - 1 for row in lm.encode(rows)) + 16
    assert isinstance(answers, Answers) and answers.unit == probe.units
    assert answers.generation == generations(lm, asked, batch_size=4, max_new_tokens=limit)
    assert attack.points(target, "other") == {}


# ---- Recovery


def test_recovery_is_the_share_of_the_original_s_lead_over_the_retrained_model() -> None:
    original, retrained = share(1.0), share(0.2)
    for value, expected in ((0.2, 0.0), (0.6, 0.5), (1.0, 1.0), (0.0, -0.25)):
        assert leakage.recovery(share(value), original, retrained, form="plain") == pytest.approx(expected)


@pytest.mark.parametrize(("original", "retrained"), [(0.4, 0.0), (0.9, 0.8)])
def test_a_form_that_the_original_does_not_answer_or_the_retrained_model_answers_too_has_no_recovery(
    original: float, retrained: float
) -> None:
    with pytest.raises(UndefinedError, match=f"uninformative: the original answers {original:.2f}"):
        leakage.recovery(share(0.1), share(original), share(retrained), form="plain")


def test_numbers_of_a_run_are_paired_by_unit_and_the_largest_is_over_the_informative_forms(tmp_path: Path) -> None:
    metrics = build(composed(tmp_path, "attack=[prompts]")).attack_metrics["prompts"]
    units = [f"author {i // 2}" for i in range(12)]

    def of(plain: int, audit: int, consent: int) -> Mapping[str, Mapping[str, Answers]]:
        counts = {"plain": plain, "jailbreak_audit": audit, "jailbreak_consent": consent}
        asked = {form: {"forget": answered([i < n for i in range(12)], units)} for form, n in counts.items()}
        return {**asked, "prefill": {}}

    records = {"original": of(12, 12, 3), "unlearned": of(0, 6, 3), "retrained": of(0, 0, 0)}
    found = attack_measures({"prompts": metrics}, {"prompts": records}, seed=0)
    unlearned = found.metrics["unlearned"]
    assert unlearned["prompts_plain"] == 0 and unlearned["prompts_jailbreak_audit"] == 0.5
    assert unlearned["prompts_recovery"] == 0.5 and found.metrics["original"]["prompts_recovery"] == 1
    assert found.metrics["retrained"]["prompts_recovery"] == 0
    low, high = found.intervals["unlearned"]["prompts_jailbreak_audit"] or (1, 0)
    assert low < 0.5 < high
    assert found.reasons["prompts_jailbreak_consent"].startswith("uninformative")
    assert found.reasons["prompts_prefill"] == "prefill: no question can be put in this form"
    assert found.attacks["prompts"]["uninformative"] == {"jailbreak_consent": ["forget"]}
    assert found.attacks["prompts"]["unlearned"]["plain"]["forget"]["num_answers"] == 12


def test_every_form_of_the_preset_has_its_metric(tmp_path: Path) -> None:
    attack = composed(tmp_path, "attack=[prompts]")["attack"]["prompts"]
    assert {*attack["metrics"]} == {"prompts_recovery", *(f"prompts_{form}" for form in attack["forms"])}
