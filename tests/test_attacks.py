"""What attacks do to a model, and what their points come to: closed forms, hand-made numbers, plain loops."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import items, small_model

from soul_exp.attacks import Prune, Quantise, Relearn, RetrainOnPart, Target
from soul_exp.attacks.quantise import BITS, dequantised, linear_weights, nf4_levels, quantised, same_codes
from soul_exp.attacks.relearn import units_of
from soul_exp.data import Item, Part
from soul_exp.errors import UsageError
from soul_exp.metrics import attack_points, robustness
from soul_exp.metrics.answers import Answers, UndefinedError
from soul_exp.metrics.uncertainty import NoIntervalError, paired_interval, unit_values
from soul_exp.models.language_model import LanguageModel
from soul_exp.report.paired import compared, holm, sign_flip
from soul_exp.tasks.task import Probe, Task

SCHEMES = ("int8", "int4", "nf4")


def a_task(rows: list[Item], related: list[Item] | None = None, missing: Mapping[str, str] | None = None) -> Task:
    units = [f"item {i // 2}" for i in range(len(rows))]
    return Task(
        name="own", source="here", parts={"forget": Part.of(rows)}, probes={"forget": Probe(rows, units=units)},
        target_rows=rows, retrained_rows=[], caption="", related=related or [], missing=missing or {},
    )  # fmt: skip


def a_target(task: Task) -> Target:
    return Target(
        load=small_model, original=small_model, task=task, device="cpu", batch_size=8, label="attack"
    )  # fmt: skip


# --- quantising ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("width", [3, 64, 70, 130])
def test_codes_are_those_of_a_loop_over_groups(scheme: str, width: int) -> None:
    """Half to even, the last group shorter, a group of zeros without a scale."""
    bits = {"int8": 8, "int4": 4}[scheme]
    weight = torch.randn(4, width, generator=torch.Generator().manual_seed(width))
    weight[1, :64] = 0.0
    codes, scales = quantised(weight, scheme, 64)
    made = dequantised(codes, scales, scheme, 64)
    for row in range(4):
        for start in range(0, width, 64):
            group = weight[row, start : start + 64].tolist()
            bound = 2 ** (bits - 1)
            step = np.float32(max(map(abs, group))) / np.float32(bound - 1)
            for column, value in enumerate(group, start=start):
                code = 0 if step == 0 else min(max(round(float(np.float32(value) / step)), -bound), bound - 1)
                assert codes[row, column] == code
                assert made[row, column] == pytest.approx(code * float(step), rel=1e-6)


def test_round_to_nearest_by_hand() -> None:
    """Of scale 1/7 in 4 bits: 0.5/7 lies half-way between 0 and 1 and goes to 0, the even one; 1.5/7 to 2."""
    weight = torch.tensor([[1.0, 0.5 / 7, 1.5 / 7, -1.0]], dtype=torch.float64)
    codes, scales = quantised(weight, "int4", 64)
    assert scales.tolist() == [[pytest.approx(1 / 7)]] and codes.tolist() == [[7, 0, 2, -7]]


def test_nf4_has_the_published_levels() -> None:
    published = [
        -1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(nf4_levels().numpy(), published, atol=1e-6)


def test_nf4_takes_the_nearest_level() -> None:
    weight = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    codes, scales = quantised(weight, "nf4", 64)
    levels = nf4_levels()
    for row in range(3):
        for column in range(70):
            value = weight[row, column] / scales[row, column // 64]
            assert codes[row, column] == (levels - value).abs().argmin()
    assert scales[0, 1] == weight[0, 64:].abs().max()


def test_nf4_gives_the_weights_of_bitsandbytes() -> None:
    """Where that package is installed, which nothing here needs: its levels have 7 digits."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    ours = dequantised(*quantised(weight, "nf4", 64), "nf4", 64)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_round_to_nearest_gives_the_codes_of_torchao_on_our_scales(scheme: str) -> None:
    """Where that package is installed, which nothing here needs: its own scales hold half a step more."""
    torchao = pytest.importorskip("torchao.quantization.quant_primitives", reason="torchao is not installed")
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = quantised(weight, scheme, 64)
    bound = 2 ** (BITS[scheme] - 1)
    given = ((1, 64), scales, torch.zeros_like(scales, dtype=torch.int32), torch.int8, -bound, bound - 1)
    theirs = torchao.quantize_affine(weight, *given)
    assert torch.equal(theirs, codes.to(torch.int8))
    assert torch.equal(torchao.dequantize_affine(theirs, *given), dequantised(codes, scales, scheme, 64))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_identical_weights_have_the_same_codes_and_others_fewer(scheme: str) -> None:
    lm, other = small_model(), small_model()
    assert same_codes(lm, other, scheme, 64)[0] == same_codes(lm, other, scheme, 64)[1] > 0
    for weight in linear_weights(lm):
        weight.mul_(1.3)
    same, size = same_codes(lm, other, scheme, 64)
    assert same < size


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantising_leaves_the_head_the_embedding_and_the_checkpoint_alone(scheme: str) -> None:
    seen: list[LanguageModel] = []

    def load() -> LanguageModel:
        seen.append(small_model())
        return seen[-1]

    target = replace(a_target(a_task(items(4))), load=load)
    Quantise(scheme=["none", scheme], group=64).points(target, scheme)
    before, after = small_model().model.state_dict(), seen[0].model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("embed" in name or "lm_head" in name or "norm" in name for name in changed)
    assert {name for name in before if "proj" in name and name.endswith("weight")} == changed


# --- pruning ------------------------------------------------------------------------------------------------------


def test_pruning_removes_the_smallest_share_of_each_layer() -> None:
    seen: list[LanguageModel] = []

    def load() -> LanguageModel:
        seen.append(small_model())
        return seen[-1]

    attack = Prune(share=[0, 0.25, 0.5])
    found = attack.points(replace(a_target(a_task(items(4))), load=load), "magnitude")
    assert list(found) == ["0", "0.25", "0.5"] == attack.named_points()
    for before, after in zip(linear_weights(small_model()), linear_weights(seen[0]), strict=True):
        gone = after == 0
        assert int(gone.sum()) == before.numel() // 2
        assert before[gone].abs().max() <= before[~gone].abs().min()
        assert torch.equal(before[~gone], after[~gone])


# --- fine-tuning --------------------------------------------------------------------------------------------------


def test_relearning_is_adamw_without_decay_on_the_mean_nll_of_rows() -> None:
    """Against a plain loop, of as many rows as a step has, so that their order does not matter."""
    rows, lr = items(4), 1e-3
    attack = Relearn(rows="forget", lr=[lr], steps=[0, 2, 5], batch_size=4)
    made = attack.points(a_target(a_task(rows)), str(lr))
    assert [*made] == attack.named_points()
    lm = small_model()
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    for step in range(6):
        if step in (0, 2, 5):
            answers = a_target(a_task(rows)).knowledge(lm)
            np.testing.assert_allclose(made[str(step)].nll, answers.nll, rtol=2e-5)  # type: ignore[union-attr]
            assert np.exp(-answers.nll).mean() == pytest.approx(attack_points.measured(answers)["probability"])
        lm.model.eval()
        losses = []
        for encoded in lm.encode(rows):
            logits = lm.model(input_ids=torch.tensor([encoded.ids])).logits[0, encoded.num_prompt - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(encoded.ids[encoded.num_prompt :])))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()


def test_updates_are_not_lost_in_bf16() -> None:
    """40 steps of 1e-5, each less than half of the distance between most weights and the next number of bf16."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        seen: list[LanguageModel] = []

        def load(dtype: torch.dtype = dtype, seen: list[LanguageModel] = seen) -> LanguageModel:
            lm = small_model()
            seen.append(lm.with_model(lm.model.to(dtype)))
            return seen[-1]

        target = replace(a_target(a_task(items(4))), load=load)
        Relearn(rows="forget", lr=[1e-5], steps=[0, 40]).points(target, "1e-05")
        before = torch.cat([p.flatten() for p in small_model().model.to(dtype).parameters()])
        after = torch.cat([p.detach().flatten() for p in seen[0].model.parameters()])
        moved[dtype] = float((after.float() - before.detach().float()).mean())
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.2)


def test_rows_of_each_kind() -> None:
    task = a_task(items(4), related=items(5, 20))
    relearn = Relearn(rows="forget", lr=[1e-3], steps=[0])
    assert relearn.training_rows(task) == items(4)
    assert replace(relearn, rows="related").training_rows(task) == items(5, 20)
    unrelated = replace(relearn, rows="unrelated", num_unrelated=7).training_rows(task)
    assert len(unrelated) == 7 and all(item.raw for item in unrelated)
    known = replace(task, target_rows=[*task.target_rows, unrelated[0]])
    without = replace(relearn, rows="unrelated", num_unrelated=7).training_rows(known)
    assert len(without) == 7 and unrelated[0] not in without
    contents = [
        replace(relearn, rows=rows, num_unrelated=7).content(task) for rows in ("forget", "related", "unrelated")
    ]
    assert len({str(content) for content in contents}) == 3  # so a file's content is part of the cache's key
    with pytest.raises(UsageError, match=r"source=/nofile"):
        replace(relearn, rows="unrelated", source="/nofile").missing(task)


def test_an_attack_that_lacks_its_rows_says_why() -> None:
    relearn = Relearn(rows="related", lr=[1e-3], steps=[0])
    assert relearn.missing(a_task(items(4))) == "task=own has no related rows"
    assert relearn.missing(a_task(items(4), missing={"related": "no others"})) == "no others"
    assert relearn.missing(a_task(items(4), related=items(4, 9))) is None
    few = "3 rows to tune on are fewer than batch_size=4: lower it"
    forget = Relearn(rows="forget", lr=[1e-3], steps=[0, 1])
    assert forget.missing(a_task(items(3))) == few and forget.missing(a_task(items(4))) is None
    with pytest.raises(UsageError, match=few):
        forget.points(a_target(a_task(items(3))), "0.001")
    halves = RetrainOnPart(lr=[1e-3], steps=[0, 1])
    assert "are of one item" in str(halves.missing(a_task(items(2))))
    assert halves.missing(a_task(items(7))) == few and halves.missing(a_task(items(8))) is None


def test_half_of_the_units_is_tuned_on_and_the_other_half_measured() -> None:
    task = a_task(items(16))
    attack = RetrainOnPart(lr=[1e-2], steps=[0, 20])
    found = attack.points(a_target(task), "0.01")
    assert [*found] == attack.named_points()
    halves = {name: {*answers.unit} for name, answers in found.items()}  # type: ignore[union-attr]
    first, second = {f"item {i}" for i in range(0, 8, 2)}, {f"item {i}" for i in range(1, 8, 2)}
    assert halves["first-tuned-20"] == first == halves["second-left-20"]
    assert halves["first-left-20"] == second == halves["second-tuned-20"]
    for split in ("first", "second"):
        gain = {
            part: found[f"{split}-{part}-20"].nll.mean() - found[f"{split}-{part}-0"].nll.mean()  # type: ignore[union-attr]
            for part in ("tuned", "left")
        }
        assert gain["tuned"] < min(gain["left"], -0.5)
    assert units_of(task.probes["forget"])[:3] == ["item 0", "item 0", "item 1"]


# --- what points come to ------------------------------------------------------------------------------------------


def answers(*strengths: float) -> Answers:
    """Of 10 tokens each, with these extraction strengths."""
    right = [np.arange(10) >= 10 - round(10 * value) for value in strengths]
    return Answers(nll=np.ones(len(strengths)), right=right)


def curve(*values: float, steps: tuple[int, ...] = (0, 50, 100)) -> dict[str, Answers]:
    return {str(step): answers(value) for step, value in zip(steps, values, strict=True)}


KNOWS = {"slow": curve(1, 1, 1), "fast": curve(1, 1, 1)}
NEVER = {"slow": curve(0, 0.2, 0.4), "fast": curve(0, 0.9, 1)}
FORGOT = {"slow": curve(0.2, 0.4, 0.6), "fast": curve(0.2, 1, 1)}


def test_excess_is_the_largest_area_over_the_control_where_there_is_something_to_recover() -> None:
    """slow: 0.2 everywhere. fast: no point after the start leaves a lead of 0.2, so that it does not count."""
    assert robustness.excess_area(FORGOT, KNOWS, NEVER) == pytest.approx(0.2)
    assert robustness.excess_area(NEVER, KNOWS, NEVER) == 0
    assert robustness.excess_area(KNOWS, KNOWS, NEVER) == pytest.approx((1.0 + 0.8) / 4 + (0.8 + 0.6) / 4)
    only_fast = [{"fast": model["fast"]} for model in (FORGOT, KNOWS, NEVER)]
    with pytest.raises(UndefinedError, match="uninformative"):
        robustness.excess_area(*only_fast)


def test_similarity_is_one_for_the_control_and_the_least_over_branches() -> None:
    """slow: both gain 0.2, R 1. fast: 0.8 and 0.9, R = 1 - 0.1/1.7."""
    assert robustness.relearning_similarity(NEVER, NEVER, step=50) == 1
    assert robustness.relearning_similarity(FORGOT, NEVER, step=50) == pytest.approx(1 - 0.1 / 1.7)
    assert robustness.relearning_similarity(KNOWS, NEVER, step=50) == 0
    still = {"slow": curve(0.2, 0.2, 0.2)}
    with pytest.raises(UndefinedError, match=r"neither model moves by 0.05 in 50 steps"):
        robustness.relearning_similarity(still, still, step=50)


def test_steps_to_recover_count_to_the_middle_between_original_and_control() -> None:
    """Half-way is 0.5: fast at 50, slow at 100; the untouched model is there at 0."""
    assert robustness.steps_to_recover(FORGOT, KNOWS, NEVER) == 50
    assert robustness.steps_to_recover(KNOWS, KNOWS, NEVER) == 0
    slow = [{"slow": model["slow"]} for model in (FORGOT, KNOWS, NEVER)]
    assert robustness.steps_to_recover(*slow) == 100
    with pytest.raises(UndefinedError, match="half of it is not back after 100 steps"):
        robustness.steps_to_recover(slow[2], slow[1], slow[2])


def test_branches_that_teach_the_control_do_not_count() -> None:
    calm = {"slow": curve(0, 0, 0), "fast": curve(0, 0.9, 1)}
    assert robustness.excess_area(FORGOT, KNOWS, calm, control=0.05) == pytest.approx(0.4)
    with pytest.raises(UndefinedError, match=r"control moved: the retrained model by 0.40, expected 0.05 at most"):
        robustness.excess_area(FORGOT, KNOWS, NEVER, control=0.05)


def test_uninformative_points_are_named() -> None:
    points = [
        {name: {point: attack_points.measured(found) for point, found in of.items()} for name, of in model.items()}
        for model in (KNOWS, NEVER)
    ]
    assert attack_points.uninformative(*points) == {"fast": ["50", "100"]}
    lost = {name: {p: {**a, "extraction_strength": 0.4} for p, a in of.items()} for name, of in points[0].items()}
    assert attack_points.uninformative(lost, points[1]) == {name: ["0", "50", "100"] for name in ("slow", "fast")}


def test_recovery_by_quantising_is_a_share_of_what_was_forgotten() -> None:
    """0.3 come back, of which the retrained model gets 0.1 too, of 0.8 that are gone."""
    original = {"none": {"forget": answers(1)}, "int4": {"forget": answers(1)}}
    forgot = {"none": {"forget": answers(0.2)}, "int4": {"forget": answers(0.5)}}
    never = {"none": {"forget": answers(0)}, "int4": {"forget": answers(0.1)}}
    assert robustness.quantised_recovery(forgot, original, never, scheme="int4") == pytest.approx(0.2 / 0.8)
    assert robustness.quantised_recovery(never, original, never, scheme="int4") == 0
    with pytest.raises(UndefinedError, match=r"knows 0.00 more than the model, expected more than 0.2"):
        robustness.quantised_recovery(original, original, never, scheme="int4")
    counted = {"int4": {"codes": {"all": {"same": 30.0, "size": 40.0}}}}
    assert robustness.same_codes(counted, scheme="int4") == 0.75


def test_what_tuning_on_one_half_brings_back_of_the_other_is_chosen_on_the_first() -> None:
    """Both ways the tuned half is best at 50: there the other half has 0.4 and 0.2 of the original's 1."""

    def points(*left: float) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for split, value in zip(("first", "second"), left, strict=True):
            found |= {f"{split}-tuned-0": answers(0), f"{split}-left-0": answers(0.9)}
            found |= {f"{split}-tuned-50": answers(1), f"{split}-left-50": answers(value)}
        return {"0.001": found}

    never = points(0, 0)
    assert robustness.retrained_on_part(points(0.4, 0.2), points(1, 1), never) == pytest.approx(0.3)
    assert robustness.retrained_on_part(points(1, 1), points(1, 1), never) == 1
    for original, retrained in ((points(0.4, 1), never), (points(0.9, 1), points(0.8, 0))):
        with pytest.raises(UndefinedError, match=r"uninformative: of the other half the original knows"):
            robustness.retrained_on_part(points(1, 1), original, retrained)


def test_of_equally_good_steps_on_one_half_the_first_counts_whatever_the_order_of_the_options() -> None:
    """And of equal steps the smallest rate."""

    def points(*rates: str) -> dict[str, Any]:
        left = {("0.001", "25"): 0.5, ("0.001", "100"): 0.9, ("1e-05", "25"): 0.2, ("1e-05", "100"): 0.9}
        return {
            rate: {f"{split}-tuned-{step}": answers(1) for split in ("first", "second") for step in ("100", "25")}
            | {
                f"{split}-left-{step}": answers(left[rate, step])
                for split in ("first", "second")
                for step in ("100", "25")
            }
            for rate in rates
        }

    original = {"1e-05": {f"{s}-{p}-25": answers(1) for s in ("first", "second") for p in ("tuned", "left")}}
    never = {"1e-05": {f"{s}-{p}-25": answers(0) for s in ("first", "second") for p in ("tuned", "left")}}
    for order in (("0.001", "1e-05"), ("1e-05", "0.001")):
        assert robustness.retrained_on_part(points(*order), original, never) == pytest.approx(0.2)


def test_where_nothing_can_be_recovered_nothing_is_said() -> None:
    ignorant = {"slow": curve(0.1, 0.1, 0.1)}
    with pytest.raises(UndefinedError, match="uninformative: before the attack"):
        robustness.steps_to_recover(ignorant, ignorant, ignorant)
    quantised_points = {"none": {"forget": answers(0.1)}, "int4": {"forget": answers(0.4)}}
    with pytest.raises(UndefinedError, match=r"uninformative: quantised, the original knows 0.40"):
        robustness.quantised_recovery(quantised_points, quantised_points, quantised_points, scheme="int4")


# --- intervals ----------------------------------------------------------------------------------------------------


def paired(num_units: int, rng: np.random.Generator) -> dict[str, Any]:
    """Two models that answer two items of each of `num_units` units."""
    unit = [f"item {i // 2}" for i in range(2 * num_units)]
    return {name: {"b": {"p": Answers(nll=rng.random(2 * num_units), unit=unit)}} for name in ("attacked", "original")}


def gap(available: Mapping[str, Any]) -> float:
    both = (available[name]["b"]["p"].numbers("nll").mean() for name in ("attacked", "original"))
    return float(next(both) - next(both))


def test_a_paired_interval_leaves_the_same_unit_out_of_every_sample() -> None:
    """The jackknife of a difference of means is that of the per-unit differences: Student's t of their mean."""
    from scipy.stats import t as student

    available = paired(8, np.random.default_rng(0))
    nll = [available[name]["b"]["p"].nll.reshape(8, 2).mean(1) for name in ("attacked", "original")]
    each = nll[0] - nll[1]
    half = student.ppf(0.975, 7) * each.std(ddof=1) / np.sqrt(8)
    assert paired_interval(gap, available, seed=0) == pytest.approx((each.mean() - half, each.mean() + half))


def test_models_that_differ_by_a_constant_have_no_uncertainty_in_their_difference() -> None:
    available = paired(30, np.random.default_rng(0))
    shifted = copy.copy(available["original"]["b"]["p"])
    available["attacked"] = {"b": {"p": replace(shifted, nll=shifted.nll + 0.5)}}
    assert paired_interval(gap, available, seed=0) == pytest.approx((0.5, 0.5))


def test_pairs_of_four_units_have_no_interval() -> None:
    with pytest.raises(NoIntervalError, match="4 independent units, expected 5 or more"):
        paired_interval(gap, paired(4, np.random.default_rng(0)), seed=0)


def test_by_unit_are_the_samples_of_the_attacked_model_which_must_have_the_same_units() -> None:
    available = paired(8, np.random.default_rng(0))
    available["original"] = paired(7, np.random.default_rng(1))["original"]
    assert len(unit_values(gap, available)) == 8  # the other samples stay as they are

    def both(available: Mapping[str, Any]) -> float:
        return float(np.mean([available["attacked"]["b"][point].numbers("nll").mean() for point in ("p", "q")]))

    available["attacked"]["b"]["q"] = paired(7, np.random.default_rng(1))["attacked"]["b"]["p"]
    with pytest.raises(NoIntervalError, match="its samples have different units"):
        unit_values(both, available)


def test_a_unit_s_value_of_a_mean_is_its_own() -> None:
    available = paired(8, np.random.default_rng(0))
    nll = [available[name]["b"]["p"].nll.reshape(8, 2).mean(1) for name in ("attacked", "original")]
    found = unit_values(gap, available)
    assert list(found) == [f"item {i}" for i in range(8)]
    np.testing.assert_allclose([*found.values()], nll[0] - nll[1])


# --- methods compared unit by unit --------------------------------------------------------------------------------


def test_sign_flip_counts_the_patterns_that_are_as_far_from_zero() -> None:
    """Of four differences of one sign two of the 16 patterns are as far: 1/8. Of 1, 1, -1 all are."""
    assert sign_flip(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(2 / 16)
    assert sign_flip(np.array([1.0, 1.0, -1.0])) == 1
    assert sign_flip(np.zeros(5)) == 1
    rng = np.random.default_rng(3)
    gaps = rng.normal(0.3, 1, 10)
    ours = [abs(np.dot(signs, gaps)) for signs in itertools.product((1, -1), repeat=10)]
    assert sign_flip(gaps) == pytest.approx(np.mean(np.array(ours) >= abs(gaps.sum()) - 1e-12))
    many = rng.normal(0.2, 1, 40)
    assert sign_flip(many) == pytest.approx(scipy_sign_flip(many), abs=0.01)


def scipy_sign_flip(gaps: np.ndarray) -> float:
    from scipy.stats import permutation_test

    found = permutation_test((gaps,), np.mean, permutation_type="samples", n_resamples=50_000, rng=0)
    return float(found.pvalue)


def test_holm_by_hand() -> None:
    """0.01 x 3, then 0.02 x 2, then 0.03, which may not fall below the one before."""
    assert holm({"a": 0.03, "b": 0.01, "c": 0.02}) == pytest.approx({"a": 0.04, "b": 0.03, "c": 0.04})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_methods_are_compared_by_unit_after_averaging_seeds() -> None:
    adam = [{"x": 0.0, "y": 0.0}, {"x": 2.0, "y": 2.0}]
    found = compared({"adam": adam, "sgd": [{"x": 2.0, "y": 1.0}], "lost": [{"x": 2.0}], "none": [{}]}, "adam")
    assert found["sgd"] is not None and found["sgd"].value == pytest.approx(0.5)
    assert found["sgd"].p == pytest.approx(1.0) and found["sgd"].n == 2
    assert found["lost"] is None and found["none"] is None
