"""Intervals of metrics over independent units: against closed forms, and how often they cover the truth."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, sem
from scipy.stats import t as student

from soul_exp import binding
from soul_exp.metrics import general, membership, suite, uncertainty
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.uncertainty import NoIntervalError, interval, paired_interval, rows_of_units


def mean_of(probe: str = "forget") -> functools.partial[float]:
    return functools.partial(binding.call, functools.partial(general.mean_nll, answers=probe))


def of_units(values: Sequence[Sequence[float]]) -> Answers:
    """Answers with these NLLs, those of a unit in a row."""
    units = [f"author {number}" for number, row in enumerate(values) for _ in row]
    return Answers(np.array([value for row in values for value in row]), unit=units)


def drawn(num_units: int, per_unit: int, seed: int) -> Answers:
    """Examples that share the level of their unit, around a mean of 5."""
    draw = np.random.default_rng(seed)
    levels = 5 + draw.normal(size=(num_units, 1)) + 0.1 * draw.normal(size=(num_units, per_unit))
    return of_units(levels.tolist())


# ---- The jackknife


def test_the_jackknife_of_a_mean_is_the_t_interval_of_the_means_of_the_units() -> None:
    answers = drawn(8, 20, seed=0)
    means = answers.nll.reshape(8, 20).mean(axis=1)
    expected = student.interval(0.95, 7, loc=means.mean(), scale=sem(means))
    assert interval(mean_of(), {"forget": answers}, seed=0) == pytest.approx(expected)


def test_without_units_each_example_is_one() -> None:
    answers = Answers(np.arange(6.0))
    expected = student.interval(0.95, 5, loc=2.5, scale=sem(np.arange(6.0)))
    assert interval(mean_of(), {"forget": answers}, seed=0) == pytest.approx(expected)


def test_the_variances_of_two_samples_are_added_and_the_smaller_one_gives_the_degrees_of_freedom() -> None:
    """A difference of two means: Welch's variance, with the 4 degrees of freedom of five passages."""

    def difference(forget: Answers, retrained: dict[str, Answers]) -> float:
        return general.mean_nll(forget) - general.mean_nll(retrained["forget"])

    ours, theirs = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([3.0, 5.0, 6.0, 9.0, 9.0, 1.0, 0.0])
    available = {"forget": Answers(ours), "retrained": {"forget": Answers(theirs), "other": Answers(np.zeros(1))}}
    scale = math.hypot(sem(ours), sem(theirs))
    expected = student.interval(0.95, 4, loc=ours.mean() - theirs.mean(), scale=scale)
    assert interval(functools.partial(binding.call, difference), available, seed=0) == pytest.approx(expected)


def test_units_of_different_sizes_are_left_out_one_at_a_time() -> None:
    answers = of_units([[1.0], [2.0, 3.0], [4.0], [5.0, 6.0, 7.0], [8.0]])
    without = [(36 - total) / (8 - number) for total, number in ((1, 1), (5, 2), (4, 1), (18, 3), (8, 1))]
    half = student.ppf(0.975, 4) * math.sqrt(4 * np.var(without))
    assert interval(mean_of(), {"forget": answers}, seed=0) == pytest.approx((4.5 - half, 4.5 + half))


# ---- The bootstrap


def test_the_bootstrap_of_a_mean_is_near_its_normal_interval() -> None:
    answers = drawn(200, 3, seed=0)
    means = answers.nll.reshape(200, 3).mean(axis=1)
    expected = norm.interval(0.95, loc=means.mean(), scale=sem(means))
    assert interval(mean_of(), {"forget": answers}, seed=0) == pytest.approx(expected, abs=0.02)


def test_draws_depend_on_the_seed_and_on_the_sample_alone() -> None:
    answers = Answers(np.random.default_rng(0).normal(size=30))
    first = interval(mean_of(), {"forget": answers}, seed=0)
    assert interval(mean_of(), {"forget": answers, "retain": Answers(np.zeros(50))}, seed=0) == first
    assert interval(mean_of(), {"forget": answers}, seed=1) != first
    assert interval(mean_of("retain"), {"retain": answers}, seed=0) != first


def test_two_samples_are_drawn_apart() -> None:
    """A difference between equal numbers is always 0 only if both sides are the same units in each draw."""

    def difference(forget: Answers, retain: Answers) -> float:
        return general.mean_nll(forget) - general.mean_nll(retain)

    values = np.random.default_rng(0).normal(size=40)
    available = {"forget": Answers(values), "retain": Answers(values.copy())}
    low, high = interval(functools.partial(binding.call, difference), available, seed=0)
    half = norm.ppf(0.975) * math.sqrt(2) * sem(values)
    assert (low, high) == pytest.approx((-half, half), rel=0.15)


def test_20_units_in_the_smallest_sample_are_bootstrapped_and_19_are_left_out_one_at_a_time() -> None:
    auc = functools.partial(binding.call, functools.partial(membership.mia_auc, k=0.2))
    values = np.random.default_rng(0).normal(size=(3, 30))
    forget, holdout, _ = ([np.array([value]) for value in row] for row in values)
    few, many = (
        {"forget": Answers(values[0], forget), "holdout": Answers(values[1][:n], holdout[:n])} for n in (19, 20)
    )
    low, high = interval(auc, few, seed=0)
    assert (low + high) / 2 == pytest.approx(auc(few)) and interval(auc, few, seed=1) == (low, high)
    assert interval(auc, many, seed=1) != interval(auc, many, seed=0)


# ---- Where there is none


@pytest.mark.parametrize(("available", "reason"), [
    ({"forget": of_units([[1.0, 2.0]] * 4)}, "4 independent units in forget, expected 5 or more"),
    ({"forget": of_units([[1.0, 2.0]])}, "1 independent unit in forget, expected 5 or more"),
    ({"forget": Answers(np.array([1.0] * 9 + [math.nan]))}, "its value is nan"),
])  # fmt: skip
def test_there_is_none_for_too_few_units_or_a_value_that_is_not_finite(
    available: dict[str, Answers], reason: str
) -> None:
    with pytest.raises(NoIntervalError, match=reason):
        interval(mean_of(), available, seed=0)


@pytest.mark.parametrize("num", [6, 40])
def test_there_is_none_where_resampled_units_have_no_value(num: int) -> None:
    """Without the one forgotten text that scores above the holdout, A_r is 0, and s_mia has no value."""
    low, high = ([np.array([value])] * (num - 1) for value in (-9.0, -1.0))
    never = {
        "forget": Answers(np.ones(num), [*low, np.array([-0.5])]),
        "holdout": Answers(np.ones(num), [*high, high[0]]),
    }
    available = {**{name: Answers(np.ones(num), [np.ones(1)] * num) for name in never}, "retrained_seeds": [never]}
    compute = functools.partial(binding.call, functools.partial(membership.s_mia, k=0.2))
    with pytest.raises(
        NoIntervalError, match="on some of the resampled units it has no value: the retrained model's AUC"
    ):
        interval(compute, available, seed=0)


def test_there_is_none_where_a_model_is_compared_with_itself_or_nothing_is_sampled() -> None:
    answers = Answers(np.arange(30.0))
    distance = functools.partial(binding.call, general.forget_ks_distance)
    with pytest.raises(NoIntervalError, match="compares the model with itself"):
        interval(distance, {"forget": answers, "retrained": {"forget": answers}}, seed=0)
    with pytest.raises(NoIntervalError, match="not recorded by item"):
        interval(functools.partial(binding.call, suite.mean_accuracy), {"suite": {"task": {"acc": 0.5}}}, seed=0)


def test_rows_of_units_hold_every_row_once() -> None:
    answers = Answers(np.zeros(6), unit=["b", "a", "b", "c", "a", "b"])
    assert [rows.tolist() for rows in rows_of_units(answers)] == [[0, 2, 5], [1, 4], [3]]


# ---- What it costs


def test_a_metric_is_evaluated_once_per_unit_or_draw_and_what_is_per_example_once() -> None:
    """20 questions on each of 12 and 8 authors: 1 + 12 + 8 values, not 400, and two passes over the tokens."""
    calls, passes = [], []

    def scores(answers: Answers) -> np.ndarray:
        passes.append(len(answers))
        return membership.min_k(answers, k=0.2)

    def auc(forget: Answers, holdout: Answers) -> float:
        calls.append(len(forget) + len(holdout))
        return membership.roc_auc(forget.per_example(scores), holdout.per_example(scores))

    def of_authors(number: int) -> Answers:
        draw = np.random.default_rng(number)
        rows = 20 * number
        units = [f"author {row // 20}" for row in range(rows)]
        return Answers(draw.normal(size=rows), [-draw.exponential(size=9) for _ in range(rows)], unit=units)

    compute = functools.partial(binding.call, auc)
    interval(compute, {"forget": of_authors(12), "holdout": of_authors(8)}, seed=0)
    assert len(calls) == 1 + 12 + 8 and calls[1:] == [380] * 20 and passes == [240, 160]
    calls.clear()
    passes.clear()
    interval(compute, {"forget": of_authors(20), "holdout": of_authors(21)}, seed=0)
    assert len(calls) == 1 + uncertainty.DRAWS and passes == [400, 420]


# ---- How often the truth lies inside: 95 % is claimed


def coverage(num_units: int, draws: int) -> float:
    found = [interval(mean_of(), {"forget": drawn(num_units, 2, seed)}, seed=seed) for seed in range(draws)]
    return float(np.mean([low <= 5 <= high for low, high in found]))


def test_the_jackknife_of_5_and_12_units_covers_as_often_as_it_says() -> None:
    assert 0.93 <= coverage(5, 1000) <= 0.97
    assert 0.93 <= coverage(12, 600) <= 0.97


def test_the_bootstrap_would_cover_too_seldom_with_4_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncertainty, "JACKKNIFE", 2)
    monkeypatch.setattr(uncertainty, "DRAWS", 200)
    assert coverage(4, 400) > 0.92  # the jackknife
    monkeypatch.setattr(uncertainty, "BOOTSTRAP", 2)
    assert 0.70 <= coverage(4, 300) <= 0.86  # the bootstrap


def test_the_bootstrap_of_20_units_covers_as_often_as_it_says_nearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncertainty, "DRAWS", 300)
    assert 0.89 <= coverage(20, 300) <= 0.97


# ---- A utility suite: the items of each task are drawn apart


def suite_of(**right: Sequence[int]) -> dict[str, Any]:
    """Tasks whose items are right (1) or wrong (0), and a text of one item."""
    tasks = {task: suite.ScoredTask({"acc": np.array(hits, dtype=float)}) for task, hits in right.items()}
    text = suite.ScoredTask({"word_perplexity": np.array([[-2.0, 1.0]])})
    return {"suite": {**tasks, "text": text}}


def accuracy(available: Any) -> tuple[float, float]:
    return interval(functools.partial(binding.call, suite.mean_accuracy), available, seed=0)


def test_the_interval_of_a_mean_accuracy_is_over_the_items_of_each_task() -> None:
    """Half of 100 items: 0.5 +- 1.96 * 0.05; the mean of two such tasks varies by the square root of 2 less."""
    half = [1, 0] * 50
    low, high = accuracy(suite_of(a=half))
    assert (low, high) == (pytest.approx(0.402, abs=0.01), pytest.approx(0.598, abs=0.01))
    low, high = accuracy(suite_of(a=half, b=half))
    assert (low, high) == (pytest.approx(0.431, abs=0.01), pytest.approx(0.569, abs=0.01))
    assert accuracy(suite_of(a=[1] * 30, b=[0] * 30)) == (0.5, 0.5)  # items do not move from task to task


def test_with_few_items_it_is_the_jackknife_and_with_four_none() -> None:
    hits = [1, 0, 1, 1, 1, 0]
    low, high = accuracy(suite_of(a=hits))
    half = student.ppf(0.975, 5) * np.std(hits, ddof=1) / np.sqrt(6)
    assert (low, high) == (pytest.approx(np.mean(hits) - half), pytest.approx(np.mean(hits) + half))
    with pytest.raises(NoIntervalError, match="4 independent units in b, expected 5 or more"):
        accuracy(suite_of(a=[1, 0] * 20, b=[1, 0, 1, 1]))
    with pytest.raises(NoIntervalError, match="1 independent unit in text, expected 5 or more"):
        interval(functools.partial(binding.call, suite.perplexity), suite_of(a=hits), seed=0)


# ---- Pairs


def less(before: Answers, after: Answers) -> float:
    return general.mean_nll(before) - general.mean_nll(after)


@pytest.mark.parametrize("number", [8, 40])
def test_a_difference_of_pairs_is_as_certain_as_their_differences(number: int) -> None:
    """Models that answer the same items: the level of a unit, far more different than the models, cancels out."""
    before = drawn(number, 5, seed=0)
    after = Answers(before.nll - 1 + 0.01 * np.sin(np.arange(len(before))), unit=before.unit)
    low, high = paired_interval(functools.partial(binding.call, less), {"before": before, "after": after}, seed=0)
    assert low < 1 < high and high - low < 0.02


@pytest.mark.parametrize("number", [8, 200])
def test_samples_of_other_units_are_drawn_by_themselves_also_where_they_are_as_many(number: int) -> None:
    """Welch's variance, not that of the differences of values that happen to stand beside each other."""
    ours, theirs = drawn(number, 3, seed=0), drawn(number, 3, seed=1)
    theirs = Answers(ours.nll + 0.001 * theirs.nll, unit=[f"kept {unit}" for unit in theirs.unit or ()])
    low, high = paired_interval(functools.partial(binding.call, less), {"before": ours, "after": theirs}, seed=0)
    means = [each.nll.reshape(number, 3).mean(axis=1) for each in (ours, theirs)]
    scale = math.hypot(*map(sem, means))
    expected = student.interval(0.95, number - 1, loc=less(ours, theirs), scale=scale)
    assert (low, high) == pytest.approx(expected, rel=1e-9 if number == 8 else 0.1)


def test_a_pair_of_samples_with_too_few_units_in_one_has_no_interval() -> None:
    few = of_units([[1.0], [2.0], [4.0]])
    with pytest.raises(NoIntervalError, match="3 independent units, expected 5 or more"):
        paired_interval(functools.partial(binding.call, less), {"before": drawn(8, 2, 0), "after": few}, seed=0)
