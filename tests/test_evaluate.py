"""Evaluation: numbers that depend on the model and the text only."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import items
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from soul_exp.data import Item
from soul_exp.errors import UsageError
from soul_exp.evaluation import probing
from soul_exp.evaluation.gradients import gradient_norms
from soul_exp.evaluation.probing import evaluate_probes, generations, likelihoods, preceded, token_statistics
from soul_exp.evaluation.records import read_records, write_records
from soul_exp.losses import IGNORED
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
        rows = table[encoded.num_prompt - 1 : -1].double()
        mean = (rows.exp() * rows).sum(-1)
        np.testing.assert_allclose(scores.mean_logp, mean, atol=1e-5)
        np.testing.assert_allclose(scores.var_logp, (rows.exp() * (rows - mean[:, None]) ** 2).sum(-1), atol=1e-5)
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
        for field in ("logp", "mean_logp", "var_logp"):
            np.testing.assert_allclose(getattr(a, field), getattr(b, field), atol=3e-6)


class Largest(TorchDispatchMode):
    """Remembers the number of values of the largest tensor that an operation made, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not any(output.alias_info for output in operation._schema.returns):
            self.size = max(self.size, found.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_statistics_make_no_copy_of_the_logits_larger_than_a_chunk(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 positions of 500 logits, 3 of them at a time, give the numbers of all at once; some tokens are masked."""
    logits = 3 * torch.randn(4, 15, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[..., 7:11] = -torch.inf
    labels = torch.arange(60).view(4, 15) + 20
    labels[1, 9:] = IGNORED
    expected = token_statistics(logits, labels)
    assert expected.shape == (4, 54) and expected.isfinite().all()
    monkeypatch.setattr(probing, "CHUNK", 3)
    with Largest() as largest:
        found = token_statistics(logits, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert largest.size == 1500


def test_the_score_after_a_prefix_is_that_of_one_text_that_begins_with_it(lm: LanguageModel) -> None:
    """All tokens of the prefix, with its end tokens; 23 rows in batches of 5 are read as one at a time."""
    prefix, texts = items(4, start=60), items(23)
    found = likelihoods(lm, texts, batch_size=5, prefix=prefix)
    before = [token for row in lm.encode(prefix) for token in row.ids]
    lm.model.eval()
    for row, scores in zip(lm.encode(texts), found, strict=True):
        with torch.no_grad():
            table = lm.model(input_ids=torch.tensor([[*before, *row.ids]])).logits[0].log_softmax(-1)
        first = len(before) + row.num_prompt
        expected = [float(table[first + t - 1, token]) for t, token in enumerate(row.ids[row.num_prompt :])]
        np.testing.assert_allclose(scores.logp, expected, atol=1e-5)


def test_a_row_that_ends_beyond_the_positions_after_the_prefix_is_an_error(lm: LanguageModel) -> None:
    rows = lm.encode(items(5))
    size = sum(len(row.ids) for row in rows)
    assert len(preceded(rows[4:], rows[:4], items(5)[4:], size)[0].ids) == size
    with pytest.raises(UsageError, match=f"has {size} tokens after the 4 rows that ReCaLL puts before it, and the"):
        preceded(rows[4:], rows[:4], items(5)[4:], size - 1)


def test_recall_is_left_out_where_the_model_has_no_positions_for_the_prefix(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes, given = {"forget": Probe(items(3))}, {"batch_size": 4, "max_new_tokens": 2}
    found = evaluate_probes(lm, probes, **given, prefix=items(4, start=50))
    assert found["forget"].recall_ll is not None and len(found["forget"].recall_ll) == 3
    monkeypatch.setattr("soul_exp.evaluation.probing.max_positions", lambda model: 60)
    short = evaluate_probes(lm, probes, **given, prefix=items(4, start=50))
    assert short["forget"].recall_ll is None
    np.testing.assert_array_equal(short["forget"].nll, found["forget"].nll)


def plain_norms(lm: LanguageModel, item: Item) -> tuple[float, float]:
    """The global norm of the gradient of the NLL per answer token, and the mean norm of a weight tensor's."""
    (row,) = lm.encode([item])
    lm.model.zero_grad()
    logits = lm.model(input_ids=torch.tensor([row.ids])).logits[0]
    answer = slice(row.num_prompt, -1)  # without the end token
    loss = torch.nn.functional.cross_entropy(logits[row.num_prompt - 1 : -2], torch.tensor(row.ids[answer]))
    loss.backward()
    norms = torch.stack([p.grad.norm() for p in lm.model.parameters() if p.grad is not None])
    lm.model.zero_grad()
    return float(norms.norm()), float(norms.mean())


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_norms_are_those_of_one_backward_pass_per_row(lm: LanguageModel, tied: bool) -> None:
    """Of all weights together, and open-unlearning's mean over weight tensors, which ranks texts in another order."""
    if tied:
        lm.model.get_output_embeddings().weight = lm.model.get_input_embeddings().weight
    for p in list(lm.model.parameters())[:3]:
        p.requires_grad_(False)  # as an adapter does: the gradient is by all weights all the same
    found = gradient_norms(lm, items(9))
    assert all(p.grad is None for p in lm.model.parameters()) and lm.model.training
    for p in lm.model.parameters():
        p.requires_grad_(True)
    lm.model.eval()
    expected = [plain_norms(lm, item) for item in items(9)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.argsort([both[0] for both in found]).tolist() != np.argsort([both[1] for both in found]).tolist()


def test_gradient_norms_of_an_adapted_model_are_those_of_the_merged_one(lm: LanguageModel) -> None:
    lm = lm.with_model(Lora(2, 4.0, 0.0, "all-linear", merge=True).wrapped(lm.model, seed=0))
    for name, p in lm.model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    adapted = gradient_norms(lm, items(5))
    merged = gradient_norms(lm.with_model(lora.merged(lm.model)), items(5))
    np.testing.assert_allclose(adapted, merged, rtol=1e-4)


def test_answers_are_those_that_their_records_give_to_the_last_bit(lm: LanguageModel, tmp_path: Path) -> None:
    others = {
        "paraphrases": items(9, 9),
        "wrong": [items(2, i) for i in range(9)],
        "paraphrased_questions": items(9, 20),
    }
    probes = {"forget": Probe(items(9), **others, generate=True), "holdout": Probe(items(4, 30))}  # type: ignore[arg-type]
    found = evaluate_probes(lm, probes, batch_size=4, max_new_tokens=6, prefix=items(2, start=60))["forget"]
    write_records(tmp_path / "forget.jsonl", found)
    read = vars(read_records(tmp_path / "forget.jsonl"))
    recorded = {field: values for field, values in vars(found).items() if values is not None}
    assert len(recorded) == 18 and recorded.keys() == {field for field, values in read.items() if values is not None}
    for field, values in recorded.items():
        for ours, theirs in zip(values, read[field], strict=True):
            np.testing.assert_array_equal(ours, theirs, field)


def test_paraphrased_questions_are_asked_as_well_and_change_no_digit_of_the_other_numbers(lm: LanguageModel) -> None:
    probe = Probe(items(9), items(9, 9), [items(2, i) for i in range(9)], items(9, 20), generate=True)
    general = Probe(items(5), wrong=[items(3, i) for i in range(5)])
    probes = {"forget": probe, "facts": general, "validation_forget": probe}
    given: dict[str, int] = {"batch_size": 4, "max_new_tokens": 6}
    found = evaluate_probes(lm, probes, **given)
    without = evaluate_probes(
        lm, {name: replace(each, paraphrased_questions=None) for name, each in probes.items()}, **given
    )
    asked = {"rephrased_nll", "rephrased_generation", "bare_nll", "bare_wrong_nll"}
    for name, answers in found.items():
        for field, values in vars(without[name]).items():
            if field not in asked:
                np.testing.assert_equal(getattr(answers, field), values, field)
    again = [replace(item, prompt=other.prompt) for item, other in zip(items(9), items(9, 20), strict=True)]
    forget = found["forget"]
    expected = [row.nll for row in likelihoods(lm, again, batch_size=9)]
    np.testing.assert_allclose(forget.numbers("rephrased_nll"), expected, atol=3e-6)
    assert forget.rephrased_generation == generations(lm, again, batch_size=9, max_new_tokens=6) != forget.generation
    # without the end token: of the paraphrase to the paraphrased question; of the answer where there is none
    paraphrases = [replace(item, prompt=other.prompt) for item, other in zip(items(9, 9), again, strict=True)]
    scores = likelihoods(lm, paraphrases, batch_size=9)
    np.testing.assert_allclose(forget.numbers("bare_nll"), [-row.logp[:-1].mean() for row in scores], atol=3e-6)
    facts = found["facts"]
    np.testing.assert_allclose(facts.numbers("bare_nll"), [-row.mean() for row in facts.logp or ()], atol=3e-6)
    assert facts.numbers("bare_wrong_nll").shape == (5, 3) and forget.numbers("bare_wrong_nll").shape == (9, 2)
    for other in (found["validation_forget"], without["forget"]):
        assert not any(getattr(other, field) is not None for field in asked)


def test_only_the_probes_of_membership_attacks_pay_for_them(lm: LanguageModel) -> None:
    """Validation rows get no gradient; without a holdout nothing does, and without a prefix there is no ReCaLL."""
    names = ("forget", "holdout", "validation_forget", "retain")
    probes = {name: Probe(items(3 + i, start=9 * i)) for i, name in enumerate(names)}
    found = evaluate_probes(lm, probes, batch_size=4, max_new_tokens=1, prefix=items(2, start=60))
    assert [name for name in names if found[name].gradnorm is not None] == ["forget", "holdout"]
    assert [name for name in names if found[name].recall_ll is not None] == ["forget", "holdout", "validation_forget"]
    np.testing.assert_allclose(found["holdout"].numbers("gradnorm"), [a for a, _ in gradient_norms(lm, items(4, 9))])
    scores = likelihoods(lm, items(5, 18), batch_size=5, prefix=items(2, start=60))
    expected = [row.logp[:-1].mean() for row in scores]
    np.testing.assert_allclose(found["validation_forget"].numbers("recall_ll"), expected, atol=3e-6)
    del probes["holdout"]
    alone = evaluate_probes(lm, probes, batch_size=4, max_new_tokens=1)["forget"]
    assert alone.gradnorm is None and alone.recall_ll is None and alone.mean_logp is not None


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
