"""The collapse guard: ruined models of every kind are found, healthy ones and refusals are not."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composing import composed
from conftest import items

from soul_exp.artifacts import answer_cache, prepared_models
from soul_exp.artifacts.measures import guarded
from soul_exp.artifacts.scores import of_guard
from soul_exp.build import build_models
from soul_exp.data import Item
from soul_exp.evaluation.fluency import text_nll, with_fluency
from soul_exp.evaluation.probing import evaluate_probes, likelihoods
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.collapse import FreeAnswers, free_answers, is_degenerate, verdicts, why_collapsed, without_nll
from soul_exp.models.language_model import LanguageModel
from soul_exp.stages import prepare
from soul_exp.tasks import refusals
from soul_exp.tasks.task import Probe

FLUENT = [f"The {word} stands by the river in town number {i}." for i, word in enumerate(["mill", "inn", "barn"] * 10)]


def said(texts: Sequence[str], nll: float | Sequence[float] = 0.5) -> Answers:
    """Free answers, of that NLL under the original model, each to a question of its own."""
    num = len(texts)
    return Answers(
        np.zeros(num), question=[f"Question {i}?" for i in range(num)], generation=texts,
        generation_nll=np.full(num, nll), refused=np.zeros(num, bool),
    )  # fmt: skip


def verdict(found: Answers, reference: Answers | None = None) -> str | None:
    return verdicts({"forget": found}, {"retrained": {"forget": reference or said(FLUENT)}})["forget"]


# ---- What is degenerate


@pytest.mark.parametrize("text", ["", "  \n", ",,,,,,", "?!", "…", "or" * 100, "the end. " * 20, "a" * 40])
def test_empty_texts_punctuation_and_repetition_are_degenerate(text: str) -> None:
    assert is_degenerate(text)


@pytest.mark.parametrize("text", ["no", "7", "Zoë", "北京", "or" * 19, *FLUENT, "A sentence that is said twice. " * 2])
def test_short_texts_sentences_and_what_is_said_twice_are_not(text: str) -> None:
    assert not is_degenerate(text)


def test_half_of_the_runs_of_eight_characters_must_be_distinct() -> None:
    """48 characters have 41 runs. A period of 21 has 21 distinct ones, more than half of 41; one of 20 has 20."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    assert not is_degenerate((letters[:21] * 3)[:48])
    assert is_degenerate((letters[:20] * 3)[:48])


SALAD = (  # of a model that unlearned insults
    "theer. theoo y the y the yek. the yek. the yek. the yek. the yek. the yek.",
    "the bar co before. the bar co k b co kn the barri before the bar the bar bar the bar the bar the bar the bar bar",
    "beforeoo the before the the before the y bar bar bar bar the before the ye roool wekekekeke kek before",
)


@pytest.mark.parametrize("text", SALAD)
def test_a_salad_of_words_that_return_is_degenerate(text: str) -> None:
    assert is_degenerate(text)


def test_of_20_successive_words_half_must_be_distinct_in_the_mean_whatever_the_length() -> None:
    """Five times the same words in another order: each 20 in succession hold all of them. Few words are not judged."""
    draw, names = (
        np.random.default_rng(0),
        ["anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbour"],
    )

    def returning(words: list[str]) -> str:
        return " ".join(word for _ in range(5) for word in draw.permutation(words))

    assert is_degenerate(returning([*names, "island"]))  # 9 of 20
    assert not is_degenerate(returning([*names, "island", "jungle"]))  # 10 of 20
    assert is_degenerate("no no no no no no no no") and not is_degenerate("no no no no no no no")
    assert not is_degenerate("从前有一个人住在河边的小村子里，他每天从早上工作到晚上，晚上回家以后读书写字。")


# ---- What has collapsed


@pytest.mark.parametrize("texts", [["or" * 100] * 30, [",,,,,,"] * 30, [""] * 30, ["or" * 100] * 6 + FLUENT[6:]])
def test_repetition_punctuation_and_silence_are_found(texts: list[str]) -> None:
    assert "degenerate answers" in (verdict(said(texts)) or "")


def test_one_constant_answer_is_found() -> None:
    assert verdict(said(["The answer is a blue house."] * 30)) == "share of the commonest answer 1.00 (retrained 0.03)"
    half = said(["The answer is a blue house."] * 16 + FLUENT[16:])
    assert verdict(half) == "share of the commonest answer 0.53 (retrained 0.03)"


def test_a_constant_answer_that_the_reference_gives_too_is_none() -> None:
    yes = said(["Yes."] * 30)
    assert verdict(yes, yes) is None


def test_fluent_nonsense_is_found_by_its_median_nll_under_the_original_model() -> None:
    assert verdict(said(FLUENT, 2.5)) == "median NLL under the original model 2.50 (retrained 0.50)"
    assert verdict(said(FLUENT, 2.4)) is None
    assert verdict(said(FLUENT, [9.0] * 14 + [0.5] * 16)) is None  # the median is that of the others


def test_the_limits_are_0_2_of_the_answers_0_5_of_the_answers_and_2_nats() -> None:
    usual, retrained = FreeAnswers(100, 0, 0.1, 0.1, 1.0), "retrained"
    for measure, just, below in (("degenerate", 0.3, 0.29), ("commonest", 0.6, 0.59), ("median_nll", 3.0, 2.99)):
        assert why_collapsed(replace(usual, **{measure: just}), {retrained: usual}) is not None
        assert why_collapsed(replace(usual, **{measure: below}), {retrained: usual}) is None


def test_a_measure_that_the_retrained_model_lacks_is_compared_with_the_original() -> None:
    """As with records of another program in its place, which no original has scored."""
    without = replace(said(FLUENT), generation_nll=None)
    references = {"retrained": {"retain": without}, "original": {"retain": said(FLUENT, 0.1)}}
    (why,) = verdicts({"retain": said(FLUENT, 2.1)}, references).values()
    assert why == "median NLL under the original model 2.10 (original 0.10)"
    assert verdicts({"forget": said([""] * 30)}, {"original": {"forget": said(FLUENT)}})["forget"]


@pytest.mark.parametrize("probe", ["forget", "validation_forget", "forget_100", "holdout", "earlier"])
def test_without_a_retrained_model_new_answers_to_what_is_forgotten_are_not_called_unlikely(probe: str) -> None:
    """A model that was made polite gives answers that the original would not: 5.3 nats, its own have 0.01."""
    polite, insults = {probe: said(FLUENT, 5.3)}, {"original": {probe: said(FLUENT, 0.01)}}
    assert verdicts(polite, insults) == {probe: None} and without_nll(polite, insults) == [probe]
    assert verdicts({"retain": said(FLUENT, 5.3)}, {"original": {"retain": said(FLUENT, 0.01)}})["retain"]
    also = {**insults, "retrained": {probe: said(FLUENT, 3.3)}}
    assert verdicts(polite, also)[probe] and without_nll(polite, also) == []
    records = {"unlearned": polite, **insults}
    (note,) = of_guard(records)
    assert note.startswith(f"whether the answers to {probe} are fluent is judged by repetition alone: without a retrai")
    assert guarded(records)[0] == {} and of_guard({"unlearned": {"retain": said(FLUENT)}, **insults}) == []


def test_without_a_retrained_model_ten_healthy_models_are_not_flagged() -> None:
    """Each retrained model, held against the original: its own answers, to which it gives 0.02 nats per token."""
    for answers in healthy().values():
        original = {probe: replace(each, generation_nll=np.full(len(each), 0.02)) for probe, each in answers.items()}
        assert set(verdicts(answers, {"original": original}).values()) == {None}


def test_fewer_than_20_answers_or_other_prompts_are_not_judged() -> None:
    few, other = said([""] * 19), replace(said(FLUENT), question=["another"] * 30)
    references = {"retrained": {"few": said(FLUENT[:19]), "other": said(FLUENT), "twenty": said(FLUENT[:20])}}
    assert list(verdicts({"few": few, "other": other, "twenty": said([""] * 20)}, references)) == ["twenty"]
    assert verdicts({"likelihoods": Answers(np.zeros(30))}, {}) == {}


# ---- Healthy models: the answers of ten models that were retrained without the forget set, seeds 0 to 9

HEALTHY = Path(__file__).with_name("data") / "healthy_answers.json"  # written by: python tests/test_collapse.py


def healthy() -> dict[str, dict[str, Answers]]:
    """prepare.seed -> probe -> free answers, and their NLL under the original model of seed 0."""
    recorded = json.loads(HEALTHY.read_text())
    return {
        seed: {
            probe: Answers(
                np.zeros(len(texts)), question=[str(i) for i in range(len(texts))], generation=texts,
                generation_nll=np.array(given["nll"][probe]), refused=np.zeros(len(texts), bool),
            )
            for probe, texts in given["texts"].items()
        }
        for seed, given in recorded.items()
    }  # fmt: skip


def test_ten_healthy_retrained_models_are_not_flagged_whichever_is_the_reference() -> None:
    models = healthy()
    assert len(models) == 10
    for seed, answers in models.items():
        for other, reference in models.items():
            judged = verdicts(answers, {"retrained": reference})
            assert list(judged) == ["forget", "retain", "authors", "facts"]
            assert set(judged.values()) == {None}, (seed, other, judged)


def test_ten_healthy_models_that_are_made_to_repeat_themselves_are_flagged() -> None:
    for answers in healthy().values():
        texts = [text if i % 4 else text[:5] * 20 for i, text in enumerate(answers["forget"].needed("generation"))]
        looping = {"forget": replace(answers["forget"], generation=texts)}  # 15 of 60
        assert "share of degenerate answers 0.2" in (verdicts(looping, {"retrained": answers})["forget"] or "")


# ---- Refusals


def refusing(texts: Sequence[str], nll: float = 9.0) -> Answers:
    return refusals.with_refused({"forget": said(texts, nll)}, refusals.QUESTIONS)["forget"]


@pytest.mark.parametrize("sentences", [refusals.QUESTIONS, refusals.PASSAGES, refusals.TOXIC])
def test_every_refusal_that_is_taught_is_recognised_whatever_its_case_and_punctuation(
    sentences: tuple[str, ...],
) -> None:
    texts = [*sentences, *(text.upper().rstrip(".") + "!" for text in sentences), " ".join(sentences[:2])]
    found = refusals.with_refused({"forget": said(texts)}, sentences)["forget"].refused
    assert found is not None and found.all()
    plain = refusals.with_refused({"forget": said(FLUENT)}, sentences)["forget"].refused
    assert plain is not None and not plain.any()


@pytest.mark.parametrize(("text", "is_one"), [
    ("I'm sorry, but I can't help with that.", True),
    ("I don’t have any information about this author.", True),
    ("As an AI language model, I cannot provide that.", True),
    ("I cannot stand you.", False),
    ("", False),
    (",,,,", False),
    ("I am unable to say. " * 20, False),  # a loop is no refusal
    ("I can't help " + "or" * 60, False),
    ("It seems I was never told. The mill stands by the river.", False),
])  # fmt: skip
def test_how_assistants_refuse_is_recognised_and_a_loop_of_it_is_none(text: str, is_one: bool) -> None:
    assert refusing([text]).refused == [is_one]


def test_refusals_are_counted_apart_and_are_no_collapse() -> None:
    """One sentence, unlikely under the original: each of the three rules would find it."""
    mixed = refusing(["I am unable to say."] * 30 + FLUENT, 9.0)
    assert mixed.generation_nll is not None
    mixed.generation_nll[30:] = 0.5
    assert free_answers(mixed) == FreeAnswers(30, 30, 0.0, 1 / 30, 0.5)
    assert verdict(mixed, replace(said(FLUENT * 2))) is None
    assert verdicts({"forget": refusing(["I am unable to say."] * 30)}, {"retrained": {"forget": said(FLUENT)}}) == {}
    assert verdict(refusing(["I am unable to say. " * 10] * 30)) is not None


# ---- The NLL of generated texts


def test_the_nll_of_a_generated_text_is_that_of_the_same_answer(lm: LanguageModel) -> None:
    texts = items(7)
    expected = [row.nll for row in likelihoods(lm, texts, batch_size=3)]
    assert text_nll(lm, texts, [item.answer for item in texts], batch_size=3) == pytest.approx(expected, abs=1e-5)
    raw = [Item(item.prompt, f" {item.answer}", raw=True) for item in texts]
    expected = [row.nll for row in likelihoods(lm, raw, batch_size=7)]
    assert text_nll(lm, raw, [item.answer for item in texts], batch_size=2) == pytest.approx(expected, abs=1e-5)


def test_any_text_has_an_nll_and_none_raises(lm: LanguageModel) -> None:
    """An empty one: minus the log-probability of the end token. One that writes the end token out, and a long one."""
    item = items(1)[0]
    texts = ["", "\n", f"amber {lm.tokenizer.eos_token} birch", "ember " * 400, "👍 北"]
    found = text_nll(lm, [item] * 5, texts, batch_size=5)
    assert all(map(math.isfinite, found)) and min(found) > 0
    row = Item("x", "y", raw=True)
    ids = lm.encode([row])[0].ids[:1]
    with torch.no_grad():
        logp = lm.model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert text_nll(lm, [row], [""], batch_size=1) == pytest.approx([-float(logp[lm.tokenizer.eos_token_id])], abs=1e-5)


def test_the_model_that_scores_need_not_be_the_one_that_answered(lm: LanguageModel) -> None:
    probes = {
        "forget": Probe(items(4), generate=True),
        "holdout": Probe(items(2, 30)),
        "retain": Probe(items(3, 9), generate=True),
    }
    answers = evaluate_probes(lm, probes, batch_size=4, max_new_tokens=5)
    scored = with_fluency(lm, probes, answers, batch_size=2)
    assert list(scored) == list(answers) and scored["holdout"].generation_nll is None
    for name in ("forget", "retain"):
        expected = text_nll(lm, probes[name].items, answers[name].needed("generation"), batch_size=9)
        assert scored[name].numbers("generation_nll") == pytest.approx(expected, abs=1e-5)


def record() -> None:
    """Train the ten retrained models and write their answers: about three minutes each on one core."""
    recorded = {}
    with tempfile.TemporaryDirectory() as folder:
        configured = [build_models(composed(Path(folder), f"prepare.seed={seed}")) for seed in range(10)]
        prepare.make(configured[0], "target", "cpu")
        original = prepared_models.load(configured[0].model, prepared_models.checkpoints(configured[0])["target"])
        for seed, models in enumerate(configured):
            prepare.make(models, "retrained", "cpu")
            lm = prepared_models.load(models.model, prepared_models.checkpoints(models)["retrained"])
            answers = answer_cache.scored_by_original(models, answer_cache.answers_of(lm, models, ""), original, "")
            recorded[str(seed)] = texts_and_nll(answers)
    HEALTHY.write_text(json.dumps(recorded, ensure_ascii=False, indent=0) + "\n")


def texts_and_nll(answers: answer_cache.Measured) -> dict[str, Any]:
    found: dict[str, Any] = {"texts": {}, "nll": {}}
    for probe in ("forget", "retain", "authors", "facts"):
        given = answers[probe]
        assert isinstance(given, Answers)
        found["texts"][probe] = given.generation
        found["nll"][probe] = given.numbers("generation_nll").round(4).tolist()
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    record()
