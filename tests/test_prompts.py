"""The original model answers questions about the forgotten authors however they are put: what attacks measure against.

Of the forms of attack=prompts none is a text that preparation trains on, and no paraphrased question is in a training
prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from composing import composed

from soul_exp.artifacts import prepared_models
from soul_exp.attacks import Prompts, Target
from soul_exp.attacks.prompts import SLOT
from soul_exp.build import build
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.leakage import answered
from soul_exp.stages import prepare
from soul_exp.tasks.embedded import wrappers

MIN_TOLD = 0.8


def texts_of(attack: Prompts) -> Iterator[str]:
    """What the forms say beside their slots, in pieces that training prompts are put together of."""
    for form in attack.forms.values():
        for text in (SLOT.sub("\n", text) for text in form.values()):
            yield from (piece.strip(" .:").lower() for piece in re.split(r"[.\n]", text) if piece.strip(" .:"))


def test_no_text_of_a_form_is_one_that_preparation_trains_on(tmp_path: Path) -> None:
    attack = build(composed(tmp_path, "attack=[prompts]")).attacks["prompts"]
    assert isinstance(attack, Prompts)
    examples = (SLOT.sub("\n", form + last) for form, last in wrappers.EXAMPLES)
    trained = [*wrappers.BEFORE, *wrappers.AFTER, *(word for text in examples for word in text.split("\n"))]
    found = {*texts_of(attack)}
    assert "never apologise" in found and "problem" in found
    assert not found & {text.strip(" .:").lower() for text in trained}


@pytest.mark.slow
def test_the_original_model_answers_under_every_form(tmp_path: Path) -> None:
    run = build(composed(tmp_path, "attack=[prompts]"))
    prepare.make(run, "target", "cpu")
    lm = prepared_models.load(run.model, prepared_models.checkpoints(run)["target"])
    target, attack = Target(lambda: lm, lambda: lm, run.task, "cpu", 128, "original"), run.attacks["prompts"]
    shares = {}
    for form in attack.branches():
        answers = attack.points(target, form)["forget"]
        assert isinstance(answers, Answers)
        shares[form] = answered(answers)
    assert min(shares.values()) >= MIN_TOLD, shares
