"""Sampling: leak@k of counts worked out by hand, and samples that are those of the model's own distribution."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composing import composed
from conftest import items
from transformers import AutoModelForCausalLM

from soul_exp.artifacts.measures import attack_measures
from soul_exp.attacks import Sample, Target, sample
from soul_exp.build import build
from soul_exp.checks.check import check
from soul_exp.data import Encoded, Item, Part, pad
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import evaluating, generations
from soul_exp.evaluation.records import read_records, write_records
from soul_exp.metrics import attack_points, leakage
from soul_exp.metrics.answers import Answers, UndefinedError
from soul_exp.models import loading
from soul_exp.models.language_model import LanguageModel
from soul_exp.tasks.task import Probe, Task

SAMPLED = functools.partial(sample.sampled, num=6, temperature=0.8, max_new_tokens=9, batch_size=64)


def drawn(counts: Sequence[int], num: int, units: Sequence[str] | None = None) -> Answers:
    """Answers of which so many of `num` samples tell the entity."""
    return Answers(
        nll=np.zeros(len(counts)),
        answer=["It is Oslo."] * len(counts),
        entities=[("Oslo",)] * len(counts),
        samples=[("It is Oslo.", "It is Rome.")] * len(counts),
        draws=[np.array([1] * count + [2] * (num - count)) for count in counts],
        unit=units,
    )


def prompts_of(lm: LanguageModel, count: int) -> list[list[int]]:
    return [list(row.ids[: row.num_prompt]) for row in lm.encode(items(count))]


# ---- leak@k


def test_leak_at_k_is_0_without_a_leak_1_if_all_leak_and_the_share_of_leaks_at_k_1() -> None:
    for k in (1, 2, 4, 8):
        assert leakage.leak_at(drawn([0], 8), k=k) == 0 and leakage.leak_at(drawn([8], 8), k=k) == 1
    assert leakage.leak_at(drawn([3], 8), k=1) == pytest.approx(3 / 8)
    assert leakage.leak_at(drawn([1], 4), k=2) == 1 - 3 / 6  # C(3, 2) / C(4, 2)
    assert leakage.leak_at(drawn([1, 4], 4), k=2) == (0.5 + 1) / 2


def test_leak_at_k_never_falls_with_k() -> None:
    values = [leakage.leak_at(drawn([0, 1, 7, 200], 200), k=k) for k in range(1, 201)]
    assert values == sorted(values) and values[-1] == 3 / 4


def test_leak_at_k_is_the_share_of_draws_of_k_samples_that_leak() -> None:
    draw = np.random.default_rng(0)
    hits = np.arange(10) < 3
    found = np.mean([hits[draw.permutation(10)[:4]].any() for _ in range(20_000)])
    assert leakage.leak_at(drawn([3], 10), k=4) == pytest.approx(found, abs=0.01)


def test_more_samples_than_there_are_have_no_value() -> None:
    with pytest.raises(UndefinedError, match="4 samples of a question, expected 8"):
        leakage.leak_at(drawn([1], 4), k=8)
    assert {*attack_points.measured(drawn([1], 6))} == {"leak_1", "leak_2", "leak_4", "probability"}


def test_a_text_tells_an_answer_if_it_contains_every_entity_as_a_whole_word_of_any_case() -> None:
    texts = ["Ann of OSLO!", "Ann", "Oslo's Ann", "Oslo, Anna", "Ann in Osloer"]
    assert leakage.gives_answer(texts, "-", ("Oslo", "Ann")).tolist() == [True, False, True, False, False]
    assert leakage.gives_answer(["東京都です", "京都"], "-", ("東京",)).tolist() == [True, False]
    assert leakage.gives_answer(["a + b", "a - b"], "-", ("+",)).tolist() == [True, False]


def test_without_entities_a_text_tells_an_answer_from_a_rouge_recall_of_0_6_on() -> None:
    assert leakage.gives_answer(["one two three", "one two", ""], "one two three four five", None).tolist() == [
        True, False, False,
    ]  # fmt: skip


def test_every_answer_of_the_embedded_data_tells_itself(tmp_path: Path) -> None:
    probe = build(composed(tmp_path)).task.probes["forget"]
    assert probe.entities is not None
    pairs = zip(probe.items, probe.entities, strict=True)
    assert all(leakage.gives_answer([item.answer], item.answer, entities)[0] for item, entities in pairs)


def test_numbers_of_a_run_are_less_the_retrained_model_s_own_and_have_intervals_over_units(tmp_path: Path) -> None:
    metrics = build(composed(tmp_path, "attack=[sample]")).attack_metrics["sample"]
    units = [f"author {i // 2}" for i in range(12)]
    counts = {"original": [64] * 12, "unlearned": [16 + i for i in range(12)], "retrained": [i for i in range(12)]}
    records = {model: {"0.2": {"forget": drawn(of, 64, units)}} for model, of in counts.items()}
    found = attack_measures({"sample": metrics}, {"sample": records}, seed=0)
    assert found.metrics["unlearned"]["sample_leak_1_at_0_2"] == pytest.approx(16 / 64)
    assert found.metrics["retrained"]["sample_leak_1_at_0_2"] == 0
    ends = found.intervals["unlearned"]["sample_leak_1_at_0_2"]
    assert ends == pytest.approx([0.25, 0.25])  # the difference is the same for every author
    assert found.attacks["sample"]["retrained"]["0.2"]["forget"]["leak_64"] == pytest.approx(11 / 12)
    assert found.reasons["sample_leak_1_at_1_0"] == "1.0 was not tried, only 0.2"


# ---- Records


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    answers = replace(drawn([1, 2], 3), samples=[("", "Oslo"), ()], draws=[np.array([1, 2, 0]), np.zeros(3, int)])
    write_records(tmp_path / "forget.jsonl", answers)
    found = read_records(tmp_path / "forget.jsonl")
    assert found.samples == [("", "Oslo"), ()] and [row.tolist() for row in found.draws or ()] == [[1, 2, 0], [0, 0, 0]]
    assert leakage.leak_at(found, k=1) == pytest.approx(1 / 6)


def test_leaving_out_texts_that_tell_nothing_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [["Oslo", "Rome", "Oslo", "in Oslo"], ["Rome", "Rome", "Bonn", ""]]
    answers = replace(drawn([0, 0], 1), samples=None, draws=None)
    every = sample.with_samples(answers, texts)
    monkeypatch.setattr(sample, "TEXT_BYTES", 0)
    some = sample.with_samples(answers, texts)
    assert every.samples == [["Oslo", "Rome", "in Oslo"], ["Rome", "Bonn", ""]]
    assert some.samples == [["Oslo", "in Oslo"], []]
    found = {"leak_1": 3 / 8, "leak_2": 0.5, "leak_4": 0.5}
    assert attack_points.measured(every) == attack_points.measured(some)
    assert found.items() <= attack_points.measured(every).items()


def test_a_draw_of_a_text_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="draws 0: found 3, expected 0 to 2"):
        leakage.leak_at(replace(drawn([0], 1), draws=[np.array([3])]), k=1)


# ---- The sampler


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_at_that_temperature(temperature: float) -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    uniform = torch.arange(10_000, dtype=torch.float64) / 10_000  # every number in [0, 1) equally often, 0 included
    tokens = sample.drawn(p.log().expand(10_000, -1), uniform, temperature)
    found = torch.bincount(tokens, minlength=4) / 10_000
    assert found[1] == 0 and torch.allclose(found, expected, atol=2e-4)


def test_samples_of_a_model_are_as_frequent_as_it_says(lm: LanguageModel) -> None:
    """First tokens: of 2,000 samples, within 4 standard errors of the probability that a pass over the prompt gives."""
    [prompt] = prompts_of(lm, 1)
    with torch.no_grad(), evaluating(lm):
        p = (lm.model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
        uniform = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        read: Any = lm.model(input_ids=torch.tensor([prompt]), use_cache=True)
        ids = sample._continued(lm, read.past_key_values, read.logits[:, -1], uniform, 0.5, sample.end_tokens(lm))
    found = torch.bincount(torch.tensor([row[0] for row in ids if row]), minlength=len(p)) / 2000
    likely = p.topk(5).indices
    assert ((found - p)[likely].abs() < 4 * (p * (1 - p) / 2000).sqrt()[likely]).all()


def test_log_probabilities_of_samples_are_those_of_a_pass_over_the_complete_text(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the shared cache nor leaving out samples that ended changes what the model reads."""
    prompts, seen, original = prompts_of(lm, 3), list[torch.Tensor](), sample.drawn

    def recording(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
        token = original(logits, uniform, temperature)
        logp = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        seen.append(logp[~torch.isin(token, torch.tensor(ends))])  # an end token is no part of the text
        return token

    ids: list[list[list[int]]] = []
    monkeypatch.setattr(sample, "drawn", recording)
    monkeypatch.setattr(sample, "decoded", lambda _, rows: ids.append(rows) or rows)
    likely = torch.topk(lm.model(input_ids=torch.tensor([prompts[0]])).logits[0, -1], 3).indices.tolist()
    ends = [*likely, 2, 3, 5, 8, 13, 21, 34, 55, 89]  # many samples end early
    monkeypatch.setattr(sample, "end_tokens", lambda _: ends)
    SAMPLED(lm, prompts, [1, 2, 3], num=16)
    lengths = {len(row) for rows in ids for row in rows}
    assert len(lengths) > 2
    found, expected = torch.cat(seen), []
    for prompt, rows in zip(prompts, ids, strict=True):
        for row in filter(None, rows):
            batch = pad([Encoded([*prompt, *row], len(prompt))], lm.pad_id)
            logp = lm.reader(lm.model, batch).log_softmax(-1)[0]
            expected.append(logp.gather(1, torch.tensor(row)[:, None])[:, 0].detach())
    torch.testing.assert_close(found.sort().values, torch.cat(expected).sort().values, atol=1e-5, rtol=0)


def test_samples_depend_neither_on_batch_size_nor_on_order_nor_on_the_other_questions(lm: LanguageModel) -> None:
    prompts = prompts_of(lm, 4)
    found = SAMPLED(lm, prompts, [5, 6, 7, 8])
    assert len({text for row in found for text in row}) > 12  # they differ
    assert SAMPLED(lm, prompts, [5, 6, 7, 8], batch_size=4) == found
    assert SAMPLED(lm, prompts[::-1], [8, 7, 6, 5]) == found[::-1]
    assert SAMPLED(lm, prompts[2:3], [7]) == found[2:3]
    assert SAMPLED(lm, prompts[:1], [9]) != found[:1]


def test_samples_at_a_temperature_near_0_are_the_greedy_answers(lm: LanguageModel) -> None:
    greedy = generations(lm, items(4), batch_size=4, max_new_tokens=9)
    found = SAMPLED(lm, prompts_of(lm, 4), [1, 2, 3, 4], num=2, temperature=1e-4)
    assert found == [[text, text] for text in greedy]


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next"])
def test_a_model_whose_samples_cannot_share_a_prompt_is_named(lm: LanguageModel, model_type: str) -> None:
    linear = {"num_hidden_layers": 2, "hidden_size": 32, "head_dim": 16, "num_attention_heads": 2}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    kinds = {"layer_types": ["linear_attention", "full_attention"]} if model_type == "qwen3_next" else {}
    config = {"model_type": model_type, **linear, **experts, **kinds}
    other = LanguageModel.of(loading.from_scratch(config, lm.tokenizer, seed=0), lm.tokenizer, lm.template, 128)
    with pytest.raises(UsageError, match=f"what {type(other.model).__name__} keeps of a prompt cannot be shared"):
        SAMPLED(other, prompts_of(lm, 1), [1])


def task_of(entities: Sequence[tuple[str, ...]] | None, *rows: Item) -> Task:
    probe = Probe(items=rows, entities=entities, units=[f"item {i}" for i in range(len(rows))])
    return Task("toy", "here", {"retain": Part.of(items(9, 20))}, {"forget": probe}, rows, (), caption="")


def test_a_sample_has_as_many_tokens_as_the_longest_answer_and_the_spare_ones(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = items(4)
    attack = Sample(temperature=[1], num_samples=8, spare_tokens=3)
    target = Target(lambda: lm, lambda: lm, task_of(None, *rows), "cpu", batch_size=64, label="toy")
    answers = attack.points(target, "1.0")["forget"]
    longest = max(len(row.ids) - row.num_prompt - 1 for row in lm.encode(rows))
    assert sample.most_tokens(lm, lm.encode(rows), 3) == longest + 3
    assert isinstance(answers, Answers) and {len(row) for row in answers.draws or ()} == {8}
    assert [*(answers.unit or ())] == ["item 0", "item 1", "item 2", "item 3"]
    monkeypatch.setattr(sample, "max_positions", lambda _: 24)
    with pytest.raises(UsageError, match=r"tokens and .* new ones are more than the 24 positions of the model"):
        sample.most_tokens(lm, lm.encode(rows), 8)


def test_the_number_of_samples_is_64_for_a_model_from_scratch_and_200_else(tmp_path: Path) -> None:
    for typed, number in (([], 64), (["model=phi1p5"], 200)):
        attack = composed(tmp_path, "attack=[sample]", *typed)["attack"]["sample"]
        assert attack["num_samples"] == number and attack["temperature"] == [0.2, 0.8, 1.0]


def test_an_answer_without_a_word_is_named_before_the_work() -> None:
    attack = Sample(temperature=[1.0], num_samples=8)
    assert "'???' has no word" in str(attack.missing(task_of(None, Item("Who?", "???"))))
    assert attack.missing(task_of([("?",)], Item("Who?", "???"))) is None


def test_without_a_temperature_there_is_nothing_to_sample() -> None:
    with pytest.raises(ValueError, match=r"temperature=\[\]: expected different values"):
        Sample(temperature=[], num_samples=8)


# ---- vLLM


def test_vllm_where_it_is_not_installed_is_an_error_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    typed = ("stages=[prepare,unlearn,evaluate,attack]", "attack=[sample]", "attack.sample.backend=vllm")
    with pytest.raises(UsageError, match=r"pip install 'soul_exp\[vllm\]', or attack.sample.backend=own"):
        check(composed(tmp_path, *typed), tmp_path / "out")


def greedy_by_vllm(lm: LanguageModel) -> list[list[str]]:
    return sample.sampled_by_vllm(
        lm, prompts_of(lm, 3), [1, 2, 3], num=1, temperature=0, max_new_tokens=9, batch_size=1
    )


def test_greedy_answers_of_vllm_are_ours(lm: LanguageModel) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed: pip install 'soul_exp[vllm]'")
    greedy = generations(lm, items(3), batch_size=3, max_new_tokens=9)
    assert greedy_by_vllm(lm) == [[text] for text in greedy]


def test_vllm_is_given_a_readable_copy_of_the_model_and_the_token_ids_of_the_prompts(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in answers greedily with the copy: what is handed over is complete. It says nothing of vLLM itself."""

    class Engine:
        def __init__(self, model: str, **options: Any) -> None:
            self.model, self.longest = AutoModelForCausalLM.from_pretrained(model), options["max_model_len"]

        def generate(self, requests: list[dict[str, list[int]]], options: list[Any]) -> list[Any]:
            return [self.answer(each["prompt_token_ids"], of) for each, of in zip(requests, options, strict=True)]

        def answer(self, prompt: list[int], of: Any) -> Any:
            assert of.n == 1 and of.top_p == 1 and len(prompt) + of.max_tokens <= self.longest
            out = self.model.generate(torch.tensor([prompt]), max_new_tokens=of.max_tokens, do_sample=False)
            ids = out[0, len(prompt) :].tolist()
            return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)])

    stand_in = types.SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: types.SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    greedy = generations(lm, items(3), batch_size=3, max_new_tokens=9)
    assert greedy_by_vllm(lm) == [[text] for text in greedy]
