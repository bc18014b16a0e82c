"""Evaluation: numbers that depend on the model and the text only."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import items
from transformers import GenerationConfig

from soul_exp.evaluation.probing import evaluate_probes, generations, likelihoods
from soul_exp.metrics.text import bleu
from soul_exp.models import lora
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.lora import Lora
from soul_exp.tasks.task import Probe


def test_likelihoods_equal_those_of_one_text_at_a_time_from_plain_logits(lm: LanguageModel) -> None:
    texts = items(11)
    batched = likelihoods(lm, texts, batch_size=4)
    lm.model.eval()
    for item, scores in zip(texts, batched, strict=True):
        encoded = lm.encode([item])[0]
        ids = torch.tensor([encoded.ids])
        with torch.no_grad():
            table = lm.model(input_ids=ids).logits.log_softmax(-1)[0]
        places = range(encoded.num_prompt, len(encoded.ids))
        np.testing.assert_allclose(scores.logp, [float(table[t - 1, encoded.ids[t]]) for t in places], atol=1e-5)
        assert scores.right.tolist() == [int(table[t - 1].argmax()) == encoded.ids[t] for t in places]


def test_an_end_token_written_out_in_an_answer_does_not_count(lm: LanguageModel) -> None:
    """A perfect answer has ROUGE-L 1 and BLEU 100, and the likelihoods are those of the answer without it."""
    texts = zip(items(30), generations(lm, items(30), batch_size=8, max_new_tokens=12), strict=True)
    perfect = [replace(item, answer=text) for item, text in texts if "a" in text.lower()]  # ROUGE wants a letter
    assert len(perfect) > 5
    written = [replace(item, answer=f"{item.answer}{lm.tokenizer.eos_token}") for item in perfect]
    asked = {"plain": Probe(perfect, generate=True), "written": Probe(written, generate=True, cut=True)}
    found = evaluate_probes(lm, asked, batch_size=8, max_new_tokens=12)
    plain, other = found["plain"], found["written"]
    np.testing.assert_array_equal(other.nll, plain.nll)
    assert other.answer == plain.answer == [item.answer for item in perfect]
    assert other.rouge_l is not None and other.rouge_l.tolist() == [1.0] * len(perfect)
    assert bleu(other) == pytest.approx(100) and bleu(plain) == pytest.approx(100)


def test_likelihoods_do_not_depend_on_the_batch_size(lm: LanguageModel) -> None:
    one, many = likelihoods(lm, items(23), batch_size=1), likelihoods(lm, items(23), batch_size=23)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.logp, b.logp, atol=3e-6)


def test_generations_do_not_depend_on_the_batch_size(lm: LanguageModel) -> None:
    one = generations(lm, items(13), batch_size=1, max_new_tokens=12)
    assert one == generations(lm, items(13), batch_size=5, max_new_tokens=12)
    assert len(set(one)) > 1


def test_a_generation_is_the_greedy_continuation_of_its_prompt(lm: LanguageModel) -> None:
    item = items(1)[0]
    encoded = lm.encode([item])[0]
    ids = list(encoded.ids[: encoded.num_prompt])
    lm.model.eval()
    with torch.no_grad():
        for _ in range(10):
            token = int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == lm.tokenizer.eos_token_id:
                break
            ids.append(token)
    expected = lm.tokenizer.decode(ids[encoded.num_prompt :], skip_special_tokens=True).strip()
    assert generations(lm, [item], batch_size=1, max_new_tokens=10) == [expected]


def test_a_continuation_is_cut_after_as_many_words_as_its_reference(lm: LanguageModel) -> None:
    texts = [replace(item, answer="one two") for item in items(9)]
    full = generations(lm, texts, batch_size=4, max_new_tokens=60)
    for size in (1, 4):  # who else is in its batch does not matter
        cut = generations(lm, texts, batch_size=size, max_new_tokens=60, cut=[True] * 8 + [False])
        for text, short in zip(full[:8], cut[:8], strict=True):
            assert short and len(short.split()) <= 2
            assert " ".join(text.split()).startswith(short.rstrip("\ufffd"))  # the last letter may have lost a byte
            assert len(lm.tokenizer(short)["input_ids"]) < len(lm.tokenizer(text)["input_ids"])
        assert cut[8] == full[8]


def test_a_probe_has_its_own_answers_in_its_own_order(lm: LanguageModel) -> None:
    texts = items(6)
    full = Probe(texts, paraphrases=texts[::-1], wrong=[[texts[0], texts[1]]] * 6, generate=True)
    answers = evaluate_probes(lm, {"other": Probe(items(3, 40)), "forget": full}, batch_size=4, max_new_tokens=4)
    assert list(answers) == ["other", "forget"] and len(answers["other"]) == 3
    given = answers["forget"]
    assert given.paraphrase_nll is not None and given.wrong_nll is not None and given.logp is not None
    np.testing.assert_allclose(given.paraphrase_nll, given.nll[::-1], atol=1e-6)
    np.testing.assert_allclose(given.wrong_nll[3], given.nll[:2], atol=1e-6)
    assert [len(row) for row in given.logp] == [len(e.ids) - e.num_prompt - 1 for e in lm.encode(texts)]
    assert given.rouge_l is not None and given.answer == [item.answer for item in texts]


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_mode_of_the_model(training: bool, lm: LanguageModel) -> None:
    lm.model.train(training)
    evaluate_probes(lm, {"forget": Probe(items(2))}, batch_size=2, max_new_tokens=2)
    assert lm.model.training is training


SETTINGS = {  # of generation_config.json, each of which would change a greedy answer or stop it
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 0},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 3.0},
    "repetition": {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1},
    "length": {"min_new_tokens": 12, "min_length": 40},
    "forced end": {"forced_eos_token_id": 5},
    "forced beginning": {"forced_bos_token_id": 5},
    "suppressed": {"suppress_tokens": [*range(2, 200)]},
    "suppressed at the beginning": {"begin_suppress_tokens": [*range(2, 200)]},
    "bad words": {"bad_words_ids": [[i] for i in range(2, 200)]},
    "guidance": {"guidance_scale": 3.0},
    "sequence bias": {"sequence_bias": [[[7], 50.0]]},
    "encoder penalty": {"encoder_repetition_penalty": 0.1},
    "encoder n-grams": {"encoder_no_repeat_ngram_size": 1},
    "time": {"max_time": 1e-9},
    "stop strings": {"stop_strings": ["a", "e", "i", "o", "r"]},
    "decay": {"exponential_decay_length_penalty": [1, 9.0]},
    "assisted": {"prompt_lookup_num_tokens": 3},
    "watermark": {"watermarking_config": {"bias": 50.0}},
    "outputs": {"return_dict_in_generate": True, "output_scores": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("adapter", [False, True])
def test_greedy_answers_do_not_depend_on_the_checkpoints_generation_settings(
    adapter: bool, lm: LanguageModel, tmp_path: Path
) -> None:
    """Each setting is read from generation_config.json, as a checkpoint brings it, and is there again afterwards."""
    if adapter:
        lm = lm.with_model(Lora(4, 8, 0.0, "all-linear", merge=False).wrapped(lm.model, seed=0))
    model: Any = lora.bare(lm.model)
    plain = generations(lm, items(6), batch_size=3, max_new_tokens=10)
    changed = []
    for name, settings in SETTINGS.items():
        written = {"eos_token_id": lm.tokenizer.eos_token_id, "pad_token_id": lm.pad_id, **settings}
        (tmp_path / "generation_config.json").write_text(json.dumps(written))
        model.generation_config = given = GenerationConfig.from_pretrained(tmp_path)
        before = given.to_dict()
        assert generations(lm, items(6), batch_size=3, max_new_tokens=10) == plain, name
        assert model.generation_config is given and given.to_dict() == before
        changed.append(name)
    assert changed == list(SETTINGS)


def test_each_end_token_that_a_checkpoint_lists_ends_a_greedy_answer(lm: LanguageModel) -> None:
    item = items(1)[0]
    (row,) = lm.encode([item])
    prompt = torch.tensor([row.ids[: row.num_prompt]])
    model: Any = lm.model
    model.generation_config.eos_token_id = None
    tokens = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)[0, row.num_prompt :].tolist()
    third = tokens.index(tokens[3])
    model.generation_config.eos_token_id = [lm.tokenizer.eos_token_id, tokens[3]]
    model.generation_config.min_new_tokens = 6
    (text,) = generations(lm, [item], batch_size=1, max_new_tokens=6)
    assert text == lm.tokenizer.decode(tokens[: third + 1], skip_special_tokens=True).strip()
