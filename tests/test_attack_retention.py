"""Matched retention: weights between two models, the alpha that is chosen, and what is reported of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import items, small_model

from soul_exp.artifacts.measures import attack_measures
from soul_exp.attacks import Retention, Target
from soul_exp.attacks.attack import shapes_of
from soul_exp.attacks.retention import general_probes, largest_kept, put_between, weights_of
from soul_exp.errors import UsageError
from soul_exp.metrics import retention
from soul_exp.metrics.answers import Answers, UndefinedError
from soul_exp.metrics.attack_points import uninformative
from soul_exp.metrics.retention import keeps, point_of, retention_alpha, retention_forget
from soul_exp.models import lora
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.lora import Lora
from soul_exp.tasks.task import Probe, Task


def moved(lm: LanguageModel, size: float = 0.1) -> LanguageModel:
    """A copy of `lm` whose weights are some way off."""
    found = copied(lm)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in found.model.parameters():
            p.add_((size * torch.randn(p.shape, generator=draw)).to(p.dtype))
    return found


def copied(lm: LanguageModel) -> LanguageModel:
    return LanguageModel.of(copy.deepcopy(lm.model), lm.tokenizer, lm.template, lm.max_length)


def task_of(**probes: Probe) -> Task:
    return Task("toy", "here", {}, probes, items(4), items(4), "a toy")


def target_of(original: LanguageModel, lm: LanguageModel, task: Task) -> Target:
    return Target(lambda: copied(lm), lambda: copied(original), task, "cpu", 8, "attack")


# ---- Weights in between


def test_the_ends_are_both_models_to_the_last_bit_and_the_middle_is_their_mean() -> None:
    original = small_model()
    lm = moved(original)
    start, end = weights_of(original), weights_of(lm)
    for alpha, expected in ((0.0, start), (1.0, end)):
        put_between(lm, start, end, alpha)
        assert all(torch.equal(p, expected[name]) for name, p in lm.model.named_parameters())
    put_between(lm, start, end, 0.25)
    for name, p in lm.model.named_parameters():
        torch.testing.assert_close(p.detach(), 0.75 * start[name] + 0.25 * end[name])


def test_bf16_weights_are_interpolated_in_fp32_and_rounded_once() -> None:
    original = small_model()
    original.model.to(torch.bfloat16)
    lm = moved(original)
    start, end = weights_of(original), weights_of(lm)
    put_between(lm, start, end, 0.3)
    in_fp32 = {name: (0.7 * start[name].float() + 0.3 * end[name].float()).bfloat16() for name in start}
    assert all(torch.equal(p, in_fp32[name]) for name, p in lm.model.named_parameters())
    query = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(0.7 * start[query] + 0.3 * end[query], in_fp32[query])


def test_tied_weights_stay_tied_and_buffers_and_integers_stay_as_they_are() -> None:
    lm = small_model(tie_word_embeddings=True)
    whole = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    lm.model.register_parameter("whole", whole)
    lm.model.register_buffer("some", torch.ones(2))
    start = {name: torch.zeros_like(p) for name, p in weights_of(lm).items()}
    end = {name: torch.full_like(p, 2.0) for name, p in start.items()}
    assert "whole" not in start and "lm_head.weight" not in start
    put_between(lm, start, end, 0.5)
    head, embedding = lm.model.get_output_embeddings(), lm.model.get_input_embeddings()
    assert head.weight is embedding.weight and bool((head.weight == 1).all())
    assert whole.tolist() == [0, 1, 2] and lm.model.some.tolist() == [1.0, 1.0]


def test_an_adapter_scaled_by_alpha_is_the_model_between_the_base_and_the_merged_one() -> None:
    adapter = Lora(r=4, alpha=8, dropout=0.0, target_modules="all-linear", merge=False)
    original = small_model()
    wrapped = adapter.wrapped(copy.deepcopy(original.model), seed=0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=draw))
    lm = original.with_model(lora.merged(copy.deepcopy(wrapped)))
    between = copied(lm)
    put_between(between, weights_of(original), weights_of(lm), 0.3)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.mul_(0.3)
    scaled = lora.merged(wrapped)
    query = "model.layers.0.self_attn.q_proj.weight"
    assert (scaled.get_parameter(query) - original.model.get_parameter(query)).abs().max() > 0.1
    assert shapes_of(scaled) == shapes_of(lm.model)
    for (name, p), other in zip(between.model.named_parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, other, msg=name)


# ---- The alpha that is chosen


def visited(rejected: Sequence[float], **options: int) -> tuple[float, list[float]]:
    """What is chosen where alphas from `rejected[0]` to `rejected[1]` are rejected, and the alphas that were tried."""
    tried: list[float] = []

    def visit(alpha: float) -> bool:
        tried.append(alpha)
        return not rejected[0] <= alpha <= rejected[1]

    return largest_kept(visit, **{"num_points": 11, "num_bisections": 4, **options}), tried


def test_the_grid_ends_at_the_first_alpha_that_loses_too_much_and_is_bisected_below_it() -> None:
    chosen, tried = visited((0.67, 1.0))
    assert tried == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.65, 0.675, 0.6625, 0.66875]
    assert chosen == 0.66875


def test_a_larger_alpha_that_keeps_enough_again_is_not_chosen() -> None:
    """All smaller ones must keep it too: a path may leave the region and come back."""
    assert visited((0.25, 0.45))[0] == 0.24375
    assert 1.0 not in visited((0.25, 0.45))[1]


def test_a_model_that_keeps_enough_at_every_alpha_is_taken_as_it_is() -> None:
    chosen, tried = visited((2.0, 3.0))
    assert chosen == 1.0 and len(tried) == 11


def test_where_the_first_step_loses_too_much_the_rest_is_looked_for_below_it() -> None:
    assert visited((0.001, 1.0))[0] == 0.0 and visited((0.001, 1.0), num_bisections=0) == (0.0, [0.0, 0.1])


# ---- What is kept, and what is reported


def strength(*shares: float) -> Answers:
    """Answers of four tokens of which the last `share` are right: their extraction strength is its mean."""
    right = [np.arange(4) >= 4 - 4 * share for share in shares]
    return Answers(nll=1 - np.array(shares), right=right, unit=[f"author {i}" for i in range(len(shares))])


def chosen_by(known: float, right: float) -> Answers:
    """General questions: an answer of that NLL beside a wrong one."""
    return Answers(np.full(6, known), wrong_nll=np.full((6, 1), right), right=[np.ones(2)] * 6)


BRANCH: dict[str, Any] = {
    point_of("forget", 0.0): strength(*[1.0] * 6), point_of("forget", 0.5): strength(*[0.5] * 5, 0.0),
    point_of("forget", 1.0): strength(*[0.25] * 6),
    point_of("validation_retain", 0.0): strength(1.0, 1.0), point_of("validation_retain", 0.5): strength(1.0, 1.0),
    point_of("validation_retain", 1.0): strength(1.0, 0.75),
    point_of("validation_facts", 0.0): chosen_by(0.0, 5.0), point_of("validation_facts", 0.5): chosen_by(0.0, 4.0),
    point_of("validation_facts", 1.0): chosen_by(0.0, 5.0),
    "chosen": {"path": {"alpha": 0.5, "keep": 0.95}},
}  # fmt: skip


def test_both_the_rows_to_retain_and_general_knowledge_must_be_kept() -> None:
    assert keeps(BRANCH, 0.5, 0.95)
    assert not keeps(BRANCH, 1.0, 0.95) and keeps(BRANCH, 1.0, 0.87)  # 0.875 of the rows
    less = {**BRANCH, point_of("validation_facts", 0.5): chosen_by(1.0, 1.0)}  # 0.5 of 0.99
    assert not keeps(less, 0.5, 0.95) and keeps(less, 0.5, 0.5)


def test_the_numbers_are_those_of_the_chosen_alpha_and_alpha_follows_from_the_answers() -> None:
    points = {"path": BRANCH}
    less = {"path": {**BRANCH, "chosen": {"path": {"alpha": 1.0, "keep": 0.8}}}}
    assert retention_alpha(points) == 0.5 and retention_alpha(less) == 1.0
    falsified = {"path": {**BRANCH, "chosen": {"path": {"alpha": 0.5, "keep": 0.8}}}}
    with pytest.raises(UndefinedError, match=r"its records give 1, and state 0\.5"):
        retention_alpha(falsified)
    assert retention_forget(points) == pytest.approx(2.5 / 6)
    assert retention_forget(points, measure="probability") == pytest.approx((5 * np.exp(-0.5) + np.exp(-1)) / 6)
    assert retention.retention_retain(points) == 1.0
    assert retention.retention_general(points) == pytest.approx((1 + np.exp(-5)) / (1 + np.exp(-4)))


def test_without_general_knowledge_or_with_an_original_that_knows_nothing_there_is_a_reason() -> None:
    without = {"path": {name: value for name, value in BRANCH.items() if "facts" not in name}}
    assert retention_alpha(without) == 0.5
    with pytest.raises(UndefinedError, match="no probe of general knowledge"):
        retention.retention_general(without)
    ignorant = {"path": {**BRANCH, point_of("forget", 0.0): strength(*[0.25] * 6)}}
    with pytest.raises(UndefinedError, match=r"uninformative: the original knows 0\.25, expected 0\.5 or more"):
        retention_forget(ignorant)


def test_intervals_are_over_units_of_the_rows_at_the_chosen_alpha_and_points_on_the_way_are_no_attacks() -> None:
    metrics = {"alpha": retention_alpha, "strength": retention_forget}
    found = attack_measures({"retention": metrics}, {"retention": {"unlearned": {"path": BRANCH}}}, seed=0)
    low, high = found.intervals["unlearned"]["strength"] or ()
    assert low < found.metrics["unlearned"]["strength"] < high  # type: ignore[operator]
    assert found.no_interval == {"alpha": "it is chosen among a few values"}
    values = found.attacks["retention"]["unlearned"]["path"]
    assert values["forget-at-0.5"]["extraction_strength"] == pytest.approx(2.5 / 6)
    assert values["chosen"] == {"path_alpha": 0.5, "path_keep": 0.95}
    assert uninformative({"path": values}, {"path": {"chosen": {}}}) == {}


# ---- The attack


def test_validation_rows_come_before_test_rows_and_without_validation_rows_to_retain_there_is_no_attack() -> None:
    probe = Probe(items(3))
    assert general_probes(task_of(authors=probe, facts=probe, validation_facts=probe)) == ["validation_facts"]
    assert general_probes(task_of(authors=probe, general=probe)) == ["authors", "general"]
    assert general_probes(task_of(forget=probe)) == []
    attack = Retention()
    assert attack.missing(task_of(forget=probe, validation_retain=probe)) is None
    assert "type task.validation_fraction=0.25" in str(attack.missing(task_of(forget=probe)))


def test_the_attack_visits_what_its_rule_says_and_no_test_row_of_general_knowledge() -> None:
    """theta_u = theta_o is kept at every alpha; a model that lost everything is bisected down to less than one step."""
    original, rows = small_model(), items(8)
    wrong = [[replace(item, answer="no such word")] for item in rows]
    task = task_of(
        forget=Probe(rows), validation_retain=Probe(rows), facts=Probe(rows), validation_facts=Probe(rows, wrong=wrong)
    )
    same = Retention(num_points=3).points(target_of(original, original, task), "path")
    assert same["chosen"] == {
        "path": {"alpha": 1.0, "keep": 0.95},
        "by": {"validation_retain": 8.0, "validation_facts": 8.0},
    }
    assert {name.partition("-at-")[0] for name in same} == {"forget", "validation_retain", "validation_facts", "chosen"}
    nll = [same[point_of("forget", alpha)].nll.tolist() for alpha in (0.0, 0.5, 1.0)]  # type: ignore[union-attr]
    assert nll[0] == nll[1] == nll[2]
    lost = Retention(keep=0.999, num_points=3, num_bisections=2).points(
        target_of(original, moved(original, 1.0), task), "path"
    )
    assert retention_alpha({"path": lost}) == lost["chosen"]["path"]["alpha"] < 1.0  # type: ignore[index]


def test_models_of_two_architectures_are_an_error_that_names_the_weight() -> None:
    original, other = small_model(), small_model(num_hidden_layers=1)
    task = task_of(forget=Probe(items(3)), validation_retain=Probe(items(3)))
    with pytest.raises(
        UsageError, match=r"attack: model.layers.1.self_attn.q_proj.weight is absent, and \[32, 32\] in"
    ):
        Retention().points(target_of(original, other, task), "path")
