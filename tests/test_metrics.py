"""Every metric against values computed by hand, a slow computation, and the logs of TOFU's authors."""

from __future__ import annotations

import inspect
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import permutations, product
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import compress

import numpy as np
import pytest
import sacrebleu
from omegaconf import OmegaConf
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from soul_exp import binding, options
from soul_exp.artifacts.measures import measures
from soul_exp.build import metrics_of
from soul_exp.evaluation.records import read_tofu_log
from soul_exp.metrics import dialects, general, membership, memorisation, suite, text, tofu, toxicity
from soul_exp.metrics.answers import Answers, UndefinedError
from soul_exp.metrics.scale import Scale
from soul_exp.report import labels

LN2 = math.log(2)
TASKS = Path(__file__).parents[1] / "conf" / "task"


def nll_of(*probabilities: float) -> np.ndarray:
    """NLLs of the given probabilities, so that a test can speak of one half instead of 0.693."""
    return -np.log(np.array(probabilities, dtype=np.float64))


def answers_of_ratios(*ratios: float) -> Answers:
    """Answers whose truth ratios are the given numbers: the paraphrase has NLL ln R, both wrong answers 0."""
    log_ratios = np.log(np.array(ratios))
    wrong_nll = np.zeros((len(ratios), 2))
    return Answers(nll=np.zeros(len(ratios)), paraphrase_nll=log_ratios, wrong_nll=wrong_nll)


def membership_fields(draw: np.random.Generator, size: int) -> dict[str, Any]:
    """Log-probabilities and what else membership attacks read; rounded, so that many values tie."""
    logp = [-np.round(draw.exponential(2, draw.integers(1, 30)), 1) for _ in range(size)]
    return {
        "logp": logp,
        "mean_logp": [-np.round(draw.exponential(2, len(row)), 1) for row in logp],
        "var_logp": [np.round(draw.exponential(1, len(row)), 0) for row in logp],  # often 0
        "gradnorm": np.round(draw.exponential(2, size), 1),
        "gradnorm_mean": draw.exponential(2, size),
        "recall_ll": -np.round(draw.exponential(2, size), 1),
    }


def random_answers(seed: int, size: int) -> Answers:
    draw = np.random.default_rng(seed)
    return Answers(
        nll=draw.exponential(2, size),
        paraphrase_nll=draw.exponential(2, size),
        wrong_nll=draw.exponential(2, (size, 5)),
        rouge_l=draw.uniform(0, 1, size),
        answer=["".join(draw.choice(list("ab "), 20)) for _ in range(size)],
        **membership_fields(draw, size),
        generation=["".join(draw.choice(list("ab "), 20)) for _ in range(size)],
        right=[draw.integers(0, 2, draw.integers(1, 30)) for _ in range(size)],
        toxicity=draw.uniform(0, 1, size),
        rephrased_nll=draw.exponential(2, size),
        similarity=draw.uniform(-1, 1, (size, 6)),
        bare_nll=draw.exponential(2, size),
        bare_wrong_nll=draw.exponential(2, (size, 5)),
    )


def reordered(answers: Answers, order: Sequence[int]) -> Answers:
    return Answers(**{field.name: getattr(answers.take(np.array(order)), field.name) for field in fields(Answers)})


# ---- TOFU, by hand


def test_probability_is_the_mean_over_items_of_exp_minus_nll() -> None:
    assert tofu.probability(Answers(nll=nll_of(1, 0.5, 0.25, 0.25))) == pytest.approx(0.5)


def test_choice_probability_is_the_true_answers_share() -> None:
    # 0.4 / (0.4 + 0.1 + 0.3) = 0.5 and 0.1 / (0.1 + 0.2 + 0.1) = 0.25
    answers = Answers(nll=nll_of(0.4, 0.1), wrong_nll=np.stack([nll_of(0.1, 0.3), nll_of(0.2, 0.1)]))
    assert tofu.choice_probability(answers) == pytest.approx((0.5 + 0.25) / 2)


def test_choice_probability_of_very_unlikely_answers_is_not_zero_over_zero() -> None:
    # exp(-2000) is 0 in floating point, yet the answers are equally likely: 1 in 4
    assert tofu.choice_probability(Answers(nll=np.full(1, 2000.0), wrong_nll=np.full((1, 3), 2000.0))) == 0.25


def test_truth_ratio_of_an_item_is_the_geometric_mean_of_wrong_over_paraphrase() -> None:
    # geometric mean of 1/2 and 1/8 is 1/4; over a paraphrase of 1/2 that is 1/2 (the arithmetic mean would give 0.625)
    answers = Answers(nll=nll_of(0.9), paraphrase_nll=nll_of(0.5), wrong_nll=nll_of(0.5, 0.125)[None])
    assert tofu.truth_ratios(answers) == pytest.approx([0.5])


def test_truth_ratio_without_a_paraphrase_uses_the_answer() -> None:
    assert tofu.truth_ratios(Answers(nll=nll_of(0.5), wrong_nll=nll_of(0.25, 0.25)[None])) == pytest.approx([0.5])


def test_aggregated_truth_ratios_by_hand() -> None:
    answers = answers_of_ratios(0.5, 1, 2, 4)
    assert tofu.truth_ratio_forget(answers) == pytest.approx((0.5 + 1 + 0.5 + 0.25) / 4)
    assert tofu.truth_ratio(answers) == pytest.approx(0.5 / 4)


@pytest.mark.filterwarnings("error")
def test_extreme_truth_ratios_give_the_limit_without_a_warning() -> None:
    extreme = Answers(
        nll=np.zeros(2), paraphrase_nll=np.array([2000.0, 0.0]), wrong_nll=np.array([[0.0, 0.0], [2000.0, 2000.0]])
    )
    assert tofu.truth_ratios(extreme).tolist() == [math.inf, 0.0]
    assert tofu.truth_ratio(extreme) == 0.5  # of 0 and 1
    assert tofu.truth_ratio_forget(extreme) == 0.0


def test_forget_quality_of_a_model_against_itself_is_one() -> None:
    answers = random_answers(0, 40)
    assert tofu.forget_quality(answers, {"forget": answers}) == 1.0
    assert tofu.log10_forget_quality(answers, {"forget": answers}) == 0.0


def test_forget_quality_of_three_against_three_separated_items_is_one_tenth() -> None:
    # Of the C(6, 3) = 20 ways to split six values in two, two separate them fully: p = 2 / 20.
    retrained = {"forget": answers_of_ratios(4, 5, 6)}
    assert tofu.forget_quality(answers_of_ratios(1, 2, 3), retrained) == pytest.approx(0.1)
    assert tofu.log10_forget_quality(answers_of_ratios(1, 2, 3), retrained) == pytest.approx(-1)


def test_the_dialect_of_open_unlearning_adds_1e_10_to_the_probability_of_the_paraphrase() -> None:
    """Its R is about 1e8 here for both models, whose values then alternate; R itself is 1e10 or more against 1e8."""
    unlikely, wrong = np.array([1e-12, 1e-13, 1e-14]), np.array([[0.11], [0.1095], [0.109]])
    ours = Answers(np.zeros(3), paraphrase_nll=-np.log(unlikely), wrong_nll=-np.log(np.full((3, 1), 0.01)))
    theirs = Answers(np.zeros(3), paraphrase_nll=nll_of(1e-9, 1e-9, 1e-9), wrong_nll=-np.log(wrong))
    added = 0.01 / (unlikely + 1e-10), wrong[:, 0] / (1e-9 + 1e-10)
    expected = math.log10(general.ks_p_value(*added))
    assert tofu.open_unlearning_log10_forget_quality(ours, {"forget": theirs}) == pytest.approx(expected) != -1
    assert tofu.log10_forget_quality(ours, {"forget": theirs}) == pytest.approx(-1)  # 2 of the 20 orders
    likely = answers_of_ratios(1, 2, 3), {"forget": answers_of_ratios(4, 5, 6)}
    assert tofu.open_unlearning_log10_forget_quality(*likely) == pytest.approx(tofu.log10_forget_quality(*likely))


def test_forget_quality_separates_items_whose_ratios_overflow() -> None:
    def at(*log_ratios: float) -> Answers:
        return Answers(np.zeros(3), paraphrase_nll=np.array(log_ratios), wrong_nll=np.zeros((3, 1)))

    assert tofu.forget_quality(at(1000, 1001, 1002), {"forget": at(2000, 2001, 2002)}) == pytest.approx(0.1)


def test_log10_forget_quality_is_finite_where_the_p_value_underflows() -> None:
    low, high = Answers(nll=np.linspace(0, 1, 600)), Answers(nll=np.linspace(2, 3, 600))
    assert general.forget_quality(low, {"forget": high}) == 0.0
    assert general.log10_forget_quality(low, {"forget": high}) == pytest.approx(-307.65, abs=0.01)


def test_forget_quality_without_the_retrained_forget_answers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"found the retrained model's answers to \['retain'\], expected 'forget'"):
        tofu.forget_quality(answers_of_ratios(1), {"retain": answers_of_ratios(1)})


def test_metrics_that_define_truth_by_the_paraphrase_do_not_fall_back_to_the_answer() -> None:
    bare = Answers(nll=np.zeros(2), wrong_nll=np.zeros((2, 1)), rouge_l=np.ones(2))
    complete = answers_of_ratios(1, 2)
    calls: list[Callable[[], float]] = [
        lambda: tofu.truth_ratio_forget(bare),
        lambda: tofu.forget_quality(bare, {"forget": complete}),
        lambda: tofu.forget_quality(complete, {"forget": bare}),
        lambda: tofu.model_utility(bare, bare, bare),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="found answers without paraphrase_nll"):
            call()


def test_model_utility_by_hand() -> None:
    # retain: probability 1/2, ROUGE 1/2, truth ratio 1 - 1/2. authors and facts: true 1/2, one wrong 1/4:
    # choice 2/3, ROUGE 1, truth ratio 1/2. Harmonic mean: 9 / (2 + 2 + 2 + 2 (3/2 + 1 + 2)) = 9 / 15.
    retain = Answers(nll_of(0.5), None, nll_of(0.5), nll_of(0.25)[None], np.array([0.5]))
    other = Answers(nll_of(0.5), wrong_nll=nll_of(0.25)[None], rouge_l=np.array([1.0]))
    assert tofu.model_utility(retain, other, other) == pytest.approx(0.6)


def test_model_utility_is_zero_if_one_part_is_zero() -> None:
    fine = random_answers(1, 5)
    mute = Answers(fine.nll, None, fine.paraphrase_nll, fine.wrong_nll, np.zeros(5))
    assert tofu.model_utility(fine, mute, fine) == 0.0


# ---- TOFU, the authors' own logs of Llama-2-7B (300 items a split)


def test_model_utility_of_the_authors_models_is_reproduced(real_data: Callable[[str], Path]) -> None:
    for name, utility in (("full", 0.6227), ("retain90", 0.6137)):
        log = read_tofu_log(real_data(f"tofu_logs/llama2-7b_{name}.json"))
        assert round(tofu.model_utility(log["retain"], log["authors"], log["facts"]), 4) == utility


def test_forget_quality_of_the_authors_models_is_reproduced(real_data: Callable[[str], Path]) -> None:
    full = read_tofu_log(real_data("tofu_logs/llama2-7b_full.json"))
    retrained = read_tofu_log(real_data("tofu_logs/llama2-7b_retain90.json"))
    assert f"{tofu.forget_quality(full['forget'], retrained):.2e}" == "1.83e-21"
    assert tofu.log10_forget_quality(full["forget"], retrained) == pytest.approx(math.log10(1.834e-21), abs=1e-4)
    assert tofu.forget_quality(retrained["forget"], retrained) == 1.0


def test_truth_ratios_of_the_authors_models_are_reproduced_item_by_item(real_data: Callable[[str], Path]) -> None:
    path = real_data("tofu_logs/llama2-7b_full.json")
    log, raw = read_tofu_log(path), json.loads(path.read_text())
    assert round(float(tofu.truth_ratios(log["retain"])[0]), 5) == 0.83277
    sections = ("eval_log.json", "eval_log_forget.json", "eval_real_author_wo_options.json")
    for probe, section in zip(
        ("retain", "forget", "authors", "facts"), (*sections, "eval_real_world_wo_options.json"), strict=True
    ):
        theirs = [raw[section]["truth_ratio"][str(i)] for i in range(len(log[probe]))]
        np.testing.assert_allclose(tofu.truth_ratios(log[probe]), theirs, rtol=2e-6)  # theirs are float32


# ---- Membership


def of_logp(*rows: Sequence[float]) -> Answers:
    return Answers(nll=np.zeros(len(rows)), logp=[np.array(row, dtype=np.float64) for row in rows])


def test_min_k_is_the_mean_of_the_lowest_share_of_tokens() -> None:
    answers = of_logp([-1, -5, -3, -2, -4])
    assert membership.min_k(answers, k=0.4).tolist() == [-4.5]
    assert membership.min_k(answers, k=1.0).tolist() == [-3.0]
    assert membership.min_k(answers, k=0.59).tolist() == [-4.5]  # int(2.95) = 2


def test_min_k_keeps_at_least_one_token() -> None:
    assert membership.min_k(of_logp([-2], [-1, -7]), k=0.2).tolist() == [-2.0, -7.0]


def test_min_k_does_not_lose_a_nan() -> None:
    scores = membership.min_k(of_logp([-1, math.nan, -3], [-math.inf, -1]), k=0.2)
    assert math.isnan(scores[0]) and scores[1] == -math.inf


@pytest.mark.parametrize("k", [0.0, -0.1, 1.5, math.nan])
def test_min_k_rejects_a_k_outside_zero_to_one(k: float) -> None:
    with pytest.raises(ValueError, match=r"expected a fraction in \(0, 1\]"):
        membership.min_k(of_logp([-1]), k=k)


def test_min_k_rejects_an_empty_text() -> None:
    with pytest.raises(ValueError, match="found no token in text 1"):
        membership.min_k(of_logp([-1], []), k=0.2)


def test_roc_auc_by_hand() -> None:
    # pairs (member, other): 3>1, 3>2, 2>1, 2=2: (3 + 1/2) / 4
    assert membership.roc_auc(np.array([3, 2]), np.array([1, 2])) == 0.875


def test_roc_auc_is_one_for_members_above_zero_for_members_below_and_half_for_ties() -> None:
    high, low = np.array([2.0, 3.0]), np.array([0.0, 1.0, -math.inf])
    assert membership.roc_auc(high, low) == 1.0
    assert membership.roc_auc(low, high) == 0.0
    assert membership.roc_auc(np.zeros(3), np.zeros(5)) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_roc_auc_is_the_share_of_pairs_and_scikit_learns(seed: int) -> None:
    draw = np.random.default_rng(seed)
    members, others = draw.integers(0, 8, 23).astype(float), draw.integers(0, 6, 40).astype(float)  # many ties
    slow = np.mean([(member > other) + 0.5 * (member == other) for member in members for other in others])
    assert membership.roc_auc(members, others) == pytest.approx(slow, abs=1e-12)
    labels = np.array([1] * 23 + [0] * 40)
    theirs = roc_auc_score(labels, np.concatenate([members, others]))
    assert membership.roc_auc(members, others) == pytest.approx(theirs, abs=1e-12)
    assert membership.roc_auc(members, others) + membership.roc_auc(others, members) == pytest.approx(1)


def test_roc_auc_rejects_an_empty_sample() -> None:
    with pytest.raises(ValueError, match="found 0 members and 1 others"):
        membership.roc_auc(np.array([]), np.array([1.0]))


def test_mia_auc_is_one_for_a_memorised_forget_set() -> None:
    forget = Answers(nll=np.zeros(2), logp=[np.array([-0.1, -0.2]), np.array([-0.1])])
    holdout = Answers(nll=np.zeros(2), logp=[np.array([-0.01, -3.0]), np.array([-2.0])])
    assert membership.mia_auc(forget, holdout, k=0.2) == 1.0
    assert membership.mia_auc(holdout, forget, k=0.2) == 0.0


def test_mia_auc_needs_logp() -> None:
    with pytest.raises(ValueError, match="found answers without logp"):
        membership.mia_auc(Answers(nll=np.zeros(1)), Answers(nll=np.zeros(1)), k=0.2)


def test_tpr_by_hand() -> None:
    # others 0 to 9: at 10 % one may be above, so the threshold is 8, and 8.5 and 9.5 of the members are above it
    members, others = np.array([8.0, 8.5, 9.5, 3.0]), np.arange(10.0)
    assert membership.tpr_at(members, others, 0.1) == 0.5
    assert membership.tpr_at(members, others, 0.01) == 0.5  # of ten others 10 % is the lowest rate
    assert membership.tpr_at(members, others, 0.2) == 0.75  # 8 is above 7
    assert membership.tpr_at(np.zeros(3), np.zeros(9), 0.1) == 0.0  # ties are not above
    assert membership.tpr_at(members, others, 1.0) == 1.0
    assert membership.rate_used(0.01, 40) == 0.025 and membership.rate_used(0.1, 40) == 0.1


def slow_scores(answers: Answers) -> dict[str, list[float]]:
    """Every score, text by text and token by token, without numpy."""
    found: dict[str, list[float]] = {name: [] for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "recall")}
    for i in range(len(answers)):
        logp, mean, var = (list(answers.needed(field)[i]) for field in ("logp", "mean_logp", "var_logp"))
        average = sum(logp) / len(logp)
        standard = [(p - m) / math.sqrt(max(v, 1e-6)) for p, m, v in zip(logp, mean, var, strict=True)]
        count = max(1, int(0.2 * len(logp)))
        found["loss"].append(average)
        found["zlib"].append(average / len(compress(answers.needed("answer")[i].encode())))
        found["min_k"].append(sum(sorted(logp)[:count]) / count)
        found["min_k_plus_plus"].append(sum(sorted(standard)[:count]) / count)
        found["recall"].append(min(answers.needed("recall_ll")[i], -0.01) / min(average, -0.01))
    return found | {"gradnorm": [-norm for norm in answers.needed("gradnorm")]}


def slow_auc(members: Sequence[float], others: Sequence[float]) -> float:
    return sum((a > b) + 0.5 * (a == b) for a in members for b in others) / (len(members) * len(others))


def slow_tpr(members: Sequence[float], others: Sequence[float], rate: float) -> float:
    """Every threshold is tried: each score, and one below all of them."""
    limit = max(rate, 1 / len(others)) + 1e-12
    allowed = [t for t in [*members, *others, -math.inf] if sum(o > t for o in others) / len(others) <= limit]
    return max(sum(m > t for m in members) / len(members) for t in allowed)


def test_membership_equals_brute_force_on_1000_random_cases() -> None:
    """All scores, AUC and TPR; scores are rounded, as most would otherwise be different and few ties were tested."""
    scores = {
        "loss": membership.loss, "zlib": membership.zlib, "gradnorm": membership.gradnorm, "recall": membership.recall,
        "min_k": partial(membership.min_k, k=0.2), "min_k_plus_plus": partial(membership.min_k_plus_plus, k=0.2),
    }  # fmt: skip
    num_ties = 0
    for case in range(1000):
        draw = np.random.default_rng(case)
        pair = [
            Answers(np.zeros(n), answer=["ab" * draw.integers(1, 9) for _ in range(n)], **membership_fields(draw, n))
            for n in draw.integers(1, 14, 2)
        ]
        slow = [slow_scores(answers) for answers in pair]
        for name, score in scores.items():
            fast = [score(answers) for answers in pair]
            for found, expected in zip(fast, slow, strict=True):
                np.testing.assert_allclose(found, expected[name], rtol=1e-12, atol=1e-12)
            members, others = (np.round(found, 1) for found in fast)
            num_ties += len(set(members.tolist()) & set(others.tolist()))
            rate = draw.choice([0.01, 0.1, 0.3])
            assert membership.roc_auc(members, others) == pytest.approx(slow_auc(members, others), abs=1e-12)
            assert membership.tpr_at(members, others, rate) == pytest.approx(slow_tpr(members, others, rate), abs=1e-12)
    assert num_ties > 1000


def separated(auc: float) -> tuple[Answers, Answers]:
    """Four forget and five holdout texts of one token whose AUC is `auc`, a multiple of 0.05."""
    for members in product(range(6), repeat=4):
        forget, holdout = of_logp(*([-10 + m] for m in members)), of_logp(*([-9.5 + i] for i in range(5)))
        if abs(membership.mia_auc(forget, holdout, k=0.2) - auc) < 1e-9:
            return forget, holdout
    raise ValueError(auc)


def against(ours: float, *never: float) -> tuple[Answers, Answers, list[dict[str, Answers]]]:
    """This model's answers, and those of retrained models with the AUCs `never`."""
    return *separated(ours), [dict(zip(("forget", "holdout"), separated(auc), strict=True)) for auc in never]


def test_privleak_and_s_mia_by_hand() -> None:
    assert membership.privleak(*against(0.9, 0.6), k=0.4) == pytest.approx(50)  # 0.3 of 0.6
    assert membership.muse_privleak(*against(0.9, 0.6), k=0.4) == pytest.approx(-75)  # (0.1 - 0.4) of 0.4
    assert membership.s_mia(*against(0.9, 0.6), k=0.2) == pytest.approx(0.25)  # 0.3 of the 0.4 above
    assert membership.s_mia(*against(0.2, 0.6), k=0.2) == pytest.approx(1 / 3)  # 0.4 of the 0.6 below
    assert membership.open_unlearning_s_mia(*against(0.9, 0.6), k=0.2) == pytest.approx(0.5)  # 0.3 of 0.6
    for metric in (membership.privleak, membership.muse_privleak):
        assert metric(*against(0.6, 0.6), k=0.4) == pytest.approx(0)
    for auc, expected in ((1.0, 0.0), (0.0, 0.0), (0.6, 1.0)):
        assert membership.s_mia(*against(auc, 0.6), k=0.2) == pytest.approx(expected)
    assert membership.s_mia(*against(0.9, 0.5, 0.7, 0.6), k=0.2) == pytest.approx(0.25)  # A_r is the mean over seeds
    # the one-sided form of open-unlearning gives the untouched model not 0 but
    assert membership.open_unlearning_s_mia(*against(1.0, 0.65), k=0.2) == pytest.approx(1 - 0.35 / 0.65)


def test_where_the_retrained_models_auc_is_at_an_end_the_metrics_that_divide_by_it_say_so() -> None:
    undefined = {
        0.0: (membership.privleak, membership.s_mia, membership.open_unlearning_s_mia),
        1.0: (membership.muse_privleak, membership.s_mia),
    }
    for never, metrics in undefined.items():
        for metric in metrics:
            with pytest.raises(UndefinedError, match=rf"the retrained model's AUC is {never:g}, by"):
                metric(*against(0.5, never), k=0.2)


def test_the_reference_attack_compares_with_the_retrained_model_on_the_same_texts() -> None:
    forget, holdout = of_logp([-1], [-2]), of_logp([-1], [-1.5])
    retrained = {"forget": of_logp([-3], [-4]), "holdout": of_logp([-1], [-1.5])}
    assert membership.reference(forget, retrained["forget"]).tolist() == [2.0, 2.0]
    assert membership.reference_auc(forget, holdout, retrained) == 1.0
    assert membership.reference_tpr(forget, holdout, retrained, rate=0.1) == 1.0
    own = retrained["forget"], retrained["holdout"], retrained
    assert membership.reference_auc(*own) == 0.5 and membership.reference_tpr(*own, rate=0.1) == 0.0


def test_the_label_order_of_the_soul_release_confines_its_auc_to_217_800ths_of_one_half() -> None:
    """With 400 forgotten and 217 other texts, as on TOFU forget10: memorised, over-unlearned, of equal size."""
    draw = np.random.default_rng(0)
    low, high = -10 - draw.random(400), -draw.random(400)
    assert membership.roc_auc(high, low[:217]) == 1.0 and membership.roc_auc(low, high[:217]) == 0.0
    # of the 400 "others" 183 are forgotten texts: those are a draw, which rounds to one half
    memorised, forgotten = (membership.soul_release_auc(*pair) for pair in ((high, low[:217]), (low, high[:217])))
    assert memorised == pytest.approx(0.5 + 217 / 800, abs=0.02) and forgotten == pytest.approx(1 - memorised, abs=0.04)
    assert membership.soul_release_auc(np.zeros(400), -np.ones(217)) == pytest.approx(0.5 + 217 / 800, abs=1e-12)
    assert membership.soul_release_auc(high, low) == membership.roc_auc(high, low) == 1.0
    probes = [of_logp(*values[:, None]) for values in (high, low[:100], low[100:217])]
    assert membership.soul_release_mia_auc(*probes, k=0.2) == memorised


def test_the_forget_quality_of_the_soul_release_is_1_for_a_model_that_repeats_one_character() -> None:
    """It compares forget with retain answers of the same model; ours compares with a model that never saw them."""
    draw = np.random.default_rng(0)
    ruined, healthy = np.full((60, 3), 30.0), 5 + draw.random((60, 3))

    def answers(nll: np.ndarray) -> Answers:
        return Answers(nll[:, 0], paraphrase_nll=nll[:, 1], wrong_nll=nll, bare_nll=nll[:, 1], bare_wrong_nll=nll)

    never = {"forget": answers(healthy - [[0, 2, 0]])}
    assert tofu.soul_release_forget_quality(answers(ruined), answers(ruined)) == 1.0
    assert tofu.forget_quality(answers(ruined), never) < 1e-20


@pytest.mark.parametrize("name", dialects.DIALECTS)
def test_every_metric_of_every_task_has_a_form_in_every_dialect(name: str) -> None:
    """With the parameters that it had, but for what the dialect fixes."""
    for path in TASKS.glob("*.yaml"):
        for metric in metrics_of(OmegaConf.to_container(OmegaConf.load(path))["metrics"]).values():  # type: ignore
            other = dialects.in_dialect(metric, name)
            assert set(binding.names(other)) <= {*binding.names(metric), "retain", "authors", "facts"}
            if name == "ours":
                assert other is metric or (other.func, other.keywords) == (metric.func, metric.keywords)  # type: ignore


def test_a_dialect_replaces_scores_inside_an_attack_and_keeps_its_constants() -> None:
    attack = partial(membership.attack_tpr, score=partial(membership.gradnorm), rate=0.1)
    other = dialects.in_dialect(attack, "open_unlearning")
    assert isinstance(other, partial) and other.func is membership.attack_tpr and other.keywords["rate"] == 0.1
    assert other.keywords["score"].func is membership.open_unlearning_gradnorm
    ours = partial(membership.mia_auc, k=0.2)
    assert dialects.in_dialect(ours, "muse").keywords == {"k": 0.4}  # type: ignore[attr-defined]


def test_the_dialect_of_tofu_reads_the_first_300_answers_of_each_probe_and_side() -> None:
    forget, never = Answers(np.arange(400.0)), {"forget": Answers(np.arange(400.0)[::-1])}
    first = dialects.in_dialect(general.forget_quality, "tofu")
    assert binding.names(first) == ("forget", "retrained")
    expected = general.forget_quality(Answers(np.arange(300.0)), {"forget": Answers(np.arange(399.0, 99.0, -1))})
    assert binding.call(first, {"forget": forget, "retrained": never}) == expected < 1e-10
    assert binding.call(first, {"forget": Answers(np.arange(4.0)), "retrained": never}) > 0


@pytest.mark.parametrize("num", [240, 400])
def test_intervals_in_the_dialect_of_tofu_are_ours_over_the_answers_that_it_reads(num: int) -> None:
    draw, units = np.random.default_rng(0), [str(row // 12) for row in range(num)]
    records = {
        model: {
            "forget": Answers(
                draw.random(num), paraphrase_nll=draw.random(num), wrong_nll=draw.random((num, 2)), unit=units
            )
        }
        for model in ("unlearned", "retrained")
    }
    theirs = {"d": dialects.in_dialect(tofu.forget_ks_distance, "tofu")}
    read = {model: {"forget": probes["forget"].take(np.arange(min(num, 300)))} for model, probes in records.items()}
    assert measures(theirs, records, 0) == measures({"d": tofu.forget_ks_distance}, read, 0)


def test_the_dialects_that_can_be_chosen_are_those_that_are_defined() -> None:
    assert (*dialects.DIALECTS,) == options.DIALECTS


# ---- Text


def test_rouge_l_recall_by_hand() -> None:
    # in order: "the sat", all words, one word of three, none, all words
    generations = ["the dog sat", "so the old cat sat down", "sat cat the", "", "THE CAT, sat!"]
    recall = text.rouge_l_recall(generations, ["the cat sat"] * 5)
    assert recall == pytest.approx([2 / 3, 1, 1 / 3, 0, 1])


def test_rouge_l_recall_divides_by_the_words_of_the_reference() -> None:
    assert text.rouge_l_recall(["cat"], ["the black cat sat"]).tolist() == [0.25]
    assert text.rouge_l_recall(["the black cat sat"], ["cat"]).tolist() == [1.0]


def test_rouge_l_recall_stems_words_longer_than_three_letters() -> None:
    assert text.rouge_l_recall(["he walked"], ["he walks"]).tolist() == [1.0]


@pytest.mark.parametrize("reference", ["", "  ", "?!", "👍"])
def test_rouge_l_recall_rejects_a_reference_without_a_word(reference: str) -> None:
    with pytest.raises(ValueError, match="as reference 1, expected at least one word"):
        text.rouge_l_recall(["a", "b"], ["a", reference])


def test_rouge_l_recall_rejects_unequal_numbers_of_texts() -> None:
    with pytest.raises(ValueError, match="found 1 generations, expected 2"):
        text.rouge_l_recall(["a"], ["a", "b"])


# ---- General


def test_general_forget_quality_compares_the_nll_of_the_answers() -> None:
    retrained = {"forget": Answers(nll=np.array([4.0, 5.0, 6.0]))}
    assert general.forget_quality(Answers(nll=np.array([1.0, 2.0, 3.0])), retrained) == pytest.approx(0.1)
    assert general.log10_forget_quality(Answers(nll=np.array([1.0, 2.0, 3.0])), retrained) == pytest.approx(-1)


def test_mean_nll_and_perplexity_by_hand() -> None:
    answers = Answers(nll=np.array([LN2, 3 * LN2]))
    assert general.mean_nll(answers) == pytest.approx(2 * LN2)
    assert general.perplexity(answers) == pytest.approx(4)
    assert general.perplexity(Answers(nll=np.array([1000.0]))) == math.inf


# ---- What holds for every metric

ON_ONE_PROBE: list[Callable[[Answers], float]] = [
    tofu.probability,
    tofu.choice_probability,
    tofu.rouge,
    tofu.truth_ratio,
    tofu.truth_ratio_forget,
    tofu.accuracy,
    tofu.paraphrased_question_probability,
    tofu.soul_release_truth_ratio,
    general.mean_nll,
    general.perplexity,
    lambda answers: tofu.forget_quality(answers, {"forget": random_answers(99, 30)}),
    lambda answers: general.forget_quality(answers, {"forget": random_answers(99, 30)}),
    lambda answers: tofu.forget_ks_distance(answers, {"forget": random_answers(99, 30)}),
    lambda answers: general.forget_ks_distance(answers, {"forget": random_answers(99, 30)}),
    lambda answers: tofu.model_utility(answers, random_answers(98, 9), answers),
    lambda answers: membership.mia_auc(answers, random_answers(97, 30), k=0.2),
    lambda answers: membership.attack_auc(answers, random_answers(97, 30), score=membership.zlib),
    lambda answers: membership.attack_tpr(answers, random_answers(97, 30), score=membership.loss, rate=0.1),
]


@pytest.mark.parametrize("metric", ON_ONE_PROBE)
@pytest.mark.parametrize("seed", range(3))
def test_a_metric_is_a_float_that_does_not_depend_on_the_order_of_the_items(
    metric: Callable[[Answers], float], seed: int
) -> None:
    answers = random_answers(seed, 25)
    value = metric(answers)
    assert type(value) is float
    order = np.random.default_rng(seed).permutation(25).tolist()
    assert metric(reordered(answers, order)) == pytest.approx(value, rel=1e-12)


def declared(module: ModuleType) -> list[Callable[..., float]]:
    """The metrics that `module` defines."""
    return [function for function in vars(module).values() if isinstance(getattr(function, "scale", None), Scale)]


MODULES = (general, membership, memorisation, suite, text, tofu, toxicity)
ALL = [metric for module in MODULES for metric in declared(module)]


CONSTANTS = {"k": 0.2, "score": membership.loss, "rate": 0.1}  # of the metrics that take them


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: f"{metric.__module__.rpartition('.')[2]}.{metric.__name__}")
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_value_lies_in_the_declared_range_at_any_size_of_nll(metric: Callable[..., float], size: float) -> None:
    drawn, others = random_answers(5, 25), random_answers(6, 600)
    names = ("nll", "paraphrase_nll", "wrong_nll", "rephrased_nll", "bare_nll", "bare_wrong_nll")
    scaled = {name: drawn.numbers(name) * size for name in names}
    answers = replace(drawn, **scaled)
    never = {"forget": random_answers(7, 25), "validation_forget": others, "holdout": random_answers(8, 600)}
    never["validation_holdout"] = never["holdout"]
    available = {
        **dict.fromkeys(binding.names(metric), answers),
        **dict.fromkeys(("holdout", "validation_holdout"), others),
        "retrained": never,
        "retrained_seeds": [never],
        "suite": {"boolean": {"acc": 0.75}, "text": {"word_perplexity": 31.5}},
    }
    wanted = inspect.signature(metric).parameters
    constants = {name: value for name, value in CONSTANTS.items() if name in wanted}
    value = binding.call(partial(metric, **constants), available)
    assert metric.scale.low <= value <= metric.scale.high  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sorted(TASKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_metric_of_a_task_has_a_direction(path: Path) -> None:
    metrics = {**OmegaConf.load(path).metrics, **OmegaConf.load(TASKS.parent / "metrics" / "membership.yaml").metrics}
    directions = {name: labels.declared(metrics, name)[1] for name in metrics}
    assert len(directions) > 10 and not [name for name, direction in directions.items() if direction is None]


def test_a_docstring_states_the_declared_range_and_unit() -> None:
    for metric in ALL:
        scale, text = metric.scale, metric.__doc__ or ""  # type: ignore[attr-defined]
        low, high = ("-307.65" if number < -300 else f"{number:g}" for number in (scale.low, scale.high))
        assert f"in [{low}, " in text and scale.unit in text, metric
        assert f", {high}]" in text or metric is suite.perplexity, metric  # its exp stops at 700 nats


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", ON_ONE_PROBE)
def test_a_nan_among_the_answers_gives_nan(metric: Callable[[Answers], float]) -> None:
    answers = random_answers(6, 10)
    for field in ("nll", "paraphrase_nll", "wrong_nll", "rouge_l", "rephrased_nll", "similarity", "bare_nll"):
        answers.numbers(field)[3] = math.nan
    answers.needed("logp")[3][0] = math.nan
    assert math.isnan(metric(answers))


@pytest.mark.parametrize("metric", ON_ONE_PROBE)
def test_a_probe_without_examples_is_an_error(metric: Callable[[Answers], float]) -> None:
    empty = np.zeros(0)
    with pytest.raises(ValueError, match="expected at least one"):
        more = {
            "rephrased_nll": empty,
            "bare_nll": empty,
            **dict.fromkeys(("similarity", "bare_wrong_nll"), empty[:, None]),
        }
        metric(Answers(empty, [], empty, np.zeros((0, 2)), empty, answer=[], **more))


@pytest.mark.parametrize("seed", range(3))
def test_tofu_metrics_equal_a_slow_computation_item_by_item(seed: int) -> None:
    answers = random_answers(seed, 20)
    ratios, choices = [], []
    for nll, paraphrase, wrong in zip(
        answers.nll, answers.numbers("paraphrase_nll"), answers.numbers("wrong_nll"), strict=True
    ):
        probabilities = [math.exp(-x) for x in wrong]
        ratios.append(math.prod(probabilities) ** (1 / 5) / math.exp(-paraphrase))
        choices.append(math.exp(-nll) / (math.exp(-nll) + sum(probabilities)))
    assert tofu.truth_ratios(answers) == pytest.approx(ratios)
    assert tofu.choice_probability(answers) == pytest.approx(sum(choices) / 20)
    assert tofu.truth_ratio(answers) == pytest.approx(sum(max(0, 1 - r) for r in ratios) / 20)
    assert tofu.truth_ratio_forget(answers) == pytest.approx(sum(min(r, 1 / r) for r in ratios) / 20)


def test_ks_p_value_is_the_share_of_all_splits_that_differ_as_much() -> None:
    def distance(first: Sequence[float], second: Sequence[float]) -> float:
        first, second = sorted(first), sorted(second)
        return max(abs(bisect_right(first, x) / 3 - bisect_right(second, x) / 4) for x in [*first, *second])

    values = [0.3, 1.1, 1.9, 0.7, 2.4, 2.9, 1.5]
    found = distance(values[:3], values[3:])
    splits = [distance(order[:3], order[3:]) for order in permutations(values)]
    slow = sum(d >= found - 1e-9 for d in splits) / len(splits)
    assert general.ks_p_value(np.array(values[:3]), np.array(values[3:])) == pytest.approx(slow, abs=1e-12)


def test_extraction_strength_is_the_share_of_the_answer_after_the_last_wrong_argmax() -> None:
    rows = [[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]  # k = 0, 1, 3, 4 of n = 4
    answers = Answers(nll=np.zeros(4), right=[np.array(row, dtype=bool) for row in rows])
    assert memorisation.extraction_strength(answers) == (1 + 0.75 + 0.25 + 0) / 4
    assert memorisation.exact_memorisation(answers) == (1 + 0.75 + 0.75 + 0.75) / 4


def test_in_the_dialect_of_open_unlearning_a_total_miss_extracts_one_token() -> None:
    rows = [[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    answers = Answers(nll=np.zeros(4), right=[np.array(row, dtype=bool) for row in rows])
    assert memorisation.extraction_strength(answers) == (1 + 0.25 + 0 + 0) / 4
    assert memorisation.open_unlearning_extraction_strength(answers) == (1 + 0.25 + 0.25 + 0.25) / 4


def test_a_validation_forget_quality_compares_the_validation_rows_of_both_models() -> None:
    ours, others = Answers(nll=np.arange(5.0)), Answers(nll=np.arange(5.0) + 10)
    measured = general.validation_log10_forget_quality(ours, {"validation_forget": others, "forget": ours})
    assert measured == pytest.approx(np.log10(2 / 252))  # exact: all five below all five
    assert general.validation_log10_forget_quality(ours, {"validation_forget": ours}) == 0.0


# ---- Samples of examples, and what is computed once for all of them


@pytest.mark.parametrize("metric", ON_ONE_PROBE)
def test_a_metric_of_taken_examples_is_that_of_answers_made_of_them(metric: Callable[[Answers], float]) -> None:
    answers = random_answers(7, 25)
    rows = np.random.default_rng(7).integers(0, 25, 40)  # some are repeated, some left out
    recorded = {name: values for name, values in vars(answers).items() if values is not None}
    copied = {name: [values[row] for row in rows] for name, values in recorded.items() if isinstance(values, list)}
    copied |= {name: values[rows] for name, values in recorded.items() if isinstance(values, np.ndarray)}
    assert metric(answers.take(rows)) == metric(Answers(**copied))
    assert metric(answers.take(np.arange(25)).take(rows)) == metric(Answers(**copied))


def test_what_is_computed_per_example_is_computed_once_for_all_samples() -> None:
    calls = []

    def length(answers: Answers, *, factor: int) -> np.ndarray:
        calls.append(factor)
        return factor * np.array([len(row) for row in answers.needed("logp")])

    answers = Answers(nll=np.zeros(3), logp=[np.zeros(1), np.zeros(2), np.zeros(3)])
    for _ in range(5):
        assert answers.take(np.array([2, 0, 2])).per_example(length, factor=2).tolist() == [6, 2, 6]
    assert answers.per_example(length, factor=3).tolist() == [3, 6, 9]
    assert calls == [2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_ks_distance_is_scipys_statistic(seed: int) -> None:
    draw = np.random.default_rng(seed)
    first, second = draw.integers(0, 9, 23).astype(float), draw.integers(0, 12, 40).astype(float)  # many ties
    first[0], second[0] = math.inf, -math.inf
    assert general.ks_statistic(first, second) == pytest.approx(float(ks_2samp(first, second).statistic), abs=1e-15)
    assert general.ks_statistic(first, first[::-1]) == 0.0


def test_forget_ks_distance_by_hand() -> None:
    # Shares at most 1, 1.5, 2 and 2.5: of ours 1/3, 1/3, 2/3, 2/3, of theirs 0, 1/2, 1/2, 1. The last differ by 1/3.
    ours, theirs = [1.0, 2.0, 3.0], [1.5, 2.5]
    assert general.forget_ks_distance(Answers(np.array(ours)), {"forget": Answers(np.array(theirs))}) == 2 / 6
    assert tofu.forget_ks_distance(answers_of_ratios(*ours), {"forget": answers_of_ratios(*theirs)}) == 2 / 6
    with pytest.raises(ValueError, match="found answers without paraphrase_nll"):
        tofu.forget_ks_distance(Answers(np.zeros(2), wrong_nll=np.zeros((2, 1))), {"forget": answers_of_ratios(1)})


@pytest.mark.parametrize("seed", range(3))
def test_bleu_is_that_of_the_corpus_although_its_counts_are_taken_text_by_text(seed: int) -> None:
    draw = np.random.default_rng(seed)
    written = [" ".join(draw.choice("the cat sat on a mat , and don't".split(), 12)) for _ in range(30)]
    others = [*written[:15], *(" ".join(draw.choice("the cat sat on".split(), 9)) for _ in range(15))]
    expected = sacrebleu.corpus_bleu(others, [written]).score
    assert text.bleu(Answers(np.zeros(30), answer=written, generation=others)) == expected > 1
