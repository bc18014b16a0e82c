"""What results.json says of answers: intervals with reasons, the ceiling of forget quality, what collapsed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from composing import composed
from test_tables import made

from soul_exp import experiment, results
from soul_exp.artifacts import answer_cache, measures, prepared_models, scores
from soul_exp.build import build, build_models
from soul_exp.checks.check import check
from soul_exp.errors import UsageError
from soul_exp.metrics import general, membership
from soul_exp.metrics.answers import Answers
from soul_exp.report import labels
from soul_exp.report.console import comparison
from soul_exp.stages import prepare


def answers(seed: int, **given: Any) -> Answers:
    draw = np.random.default_rng(seed)
    return Answers(draw.exponential(2, 30), logp=[-draw.exponential(2, 9) for _ in range(30)], **given)


def of_model(seed: int) -> dict[str, Answers]:
    return {"forget": answers(seed), "holdout": answers(seed + 100)}


METRICS: dict[str, Any] = {
    "log10_forget_quality": general.log10_forget_quality,
    "forget_ks_distance": general.forget_ks_distance,
    "mia_auc": functools.partial(membership.mia_auc, k=0.2),
    "forget_nll": functools.partial(general.mean_nll, answers="forget"),
}


def found(by_model: Mapping[str, Any], retrained: Sequence[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    values = {
        model: {name: scores.score(metric, given, retrained) for name, metric in METRICS.items()}
        for model, given in by_model.items()
    }
    return measures.intervals(METRICS, values, by_model, retrained, 0)


# ---- Intervals


def test_each_model_has_intervals_in_the_range_of_the_metric_and_a_reason_where_it_has_none() -> None:
    by_model = {"unlearned": of_model(0), "retrained": of_model(1)}
    intervals, why = found(by_model, [by_model["retrained"]])
    assert why == {
        "log10_forget_quality": general.IS_TEST,
        "retrained.forget_ks_distance": "it compares the model with itself",
    }
    for model in by_model:
        low, high = intervals[model]["mia_auc"]
        assert 0 <= low < high <= 1 and intervals[model]["log10_forget_quality"] is None
    low, high = intervals["unlearned"]["forget_ks_distance"]
    assert 0 <= low < high <= 1 and intervals["retrained"]["forget_ks_distance"] is None


def test_an_interval_is_cut_to_the_range_of_its_metric() -> None:
    """One of the six forgotten authors is below every other author: the t interval around 5/6 goes beyond 1."""
    units = [f"author {i // 5}" for i in range(30)]
    forget = [np.array([-9.0 if unit == "author 0" else 0.0]) for unit in units]
    few = {
        "forget": Answers(np.zeros(30), forget, unit=units),
        "holdout": Answers(np.zeros(30), [np.array([-1.0])] * 30, unit=units),
    }
    intervals, _ = found({"unlearned": few}, [])
    assert intervals["unlearned"]["mia_auc"] == [pytest.approx(5 / 6 - 2.5706 / 6, abs=1e-4), 1.0]


def test_what_has_no_value_has_neither_interval_nor_reason() -> None:
    intervals, why = found({"unlearned": {"forget": answers(0)}}, [])
    assert intervals["unlearned"]["mia_auc"] is None and "mia_auc" not in why


# ---- Several retrained models


def test_the_ceiling_is_the_same_test_between_every_two_retrained_models() -> None:
    retrained = [of_model(seed) for seed in range(3)]
    ceiling = measures.ceiling(METRICS, retrained)
    assert list(ceiling) == ["log10_forget_quality", "forget_ks_distance"]
    pairs = [(0, 1), (0, 2), (1, 2)]
    distances = [general.forget_ks_distance(retrained[i]["forget"], retrained[j]) for i, j in pairs]
    assert ceiling["forget_ks_distance"] == sorted(distances) and 0 < min(distances) < max(distances)
    assert measures.ceiling(METRICS, retrained[:1]) == measures.ceiling(METRICS, []) == {}
    aucs = measures.of_seeds(METRICS, retrained)["mia_auc"]
    assert aucs == [membership.mia_auc(**each, k=0.2) for each in retrained] and len(set(aucs)) == 3
    assert measures.of_seeds(METRICS, retrained[:1]) == {}


def test_a_metric_may_compare_with_all_retrained_models_and_each_is_resampled() -> None:
    def excess(forget: Answers, retrained_seeds: Sequence[Mapping[str, Answers]]) -> float:
        return general.mean_nll(forget) - float(np.mean([general.mean_nll(each["forget"]) for each in retrained_seeds]))

    retrained = [of_model(seed) for seed in (1, 2, 3)]
    mine = answers(0)
    value = scores.score(excess, {"forget": mine}, retrained)
    expected = mine.nll.mean() - np.mean([each["forget"].nll.mean() for each in retrained])
    assert value == pytest.approx(expected)
    given = {"unlearned": {"forget": mine}}
    several, _ = measures.intervals({"excess": excess}, {"unlearned": {"excess": value}}, given, retrained, 0)
    low, high = several["unlearned"]["excess"] or (0, 0)
    error = np.sqrt(mine.nll.var() / 30 + sum(each["forget"].nll.var() / 30 / 9 for each in retrained))
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert scores.why_null(excess, None, {"forget": mine}, []) == "no answers: retrained_seeds"


def test_further_retrained_models_have_further_seeds_and_change_no_identity(tmp_path: Path) -> None:
    """The second is the retrained model of prepare.seed=1, so that runs share it."""
    one, three = (build_models(composed(tmp_path, f"retrained.seeds={seeds}")) for seeds in (1, 3))
    recipes = prepared_models.recipes(three)
    assert list(recipes) == ["target", "retrained", "retrained_1", "retrained_2"]
    assert {role: recipes[role] for role in ("target", "retrained")} == prepared_models.recipes(one)
    other = build_models(composed(tmp_path, "prepare.seed=1"))
    assert recipes["retrained_1"] == prepared_models.recipes(other)["retrained"] != recipes["retrained"]
    assert prepared_models.data_hashes(one) == prepared_models.data_hashes(three)
    assert prepare.unprepared(three) == list(recipes) and prepare.unprepared(one) == ["target", "retrained"]


def test_more_seeds_are_measured_for_a_finished_run_whose_model_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(tmp_path, "retrained.seeds=3")
    run: Any = SimpleNamespace(overwrite=False, **{key: value for key, value in vars(build_models(config)).items()})
    run.measures_only = run.target_is_given = False
    hashes = prepared_models.data_hashes(run)
    one = {**config, "retrained": {**config["retrained"], "seeds": 1}}
    before = replace(made(), config=one, data_hashes=hashes, samples={"forget": {"examples": 60, "units": 4}})
    results.write(tmp_path, before)
    assert experiment.finished(config, run, tmp_path) is None
    for stands in (replace(before, config=config), replace(before, samples={})):  # the latter of an earlier version
        results.write(tmp_path, stands)
        assert experiment.finished(config, run, tmp_path) is not None


@pytest.mark.parametrize("typed", ["retrained.records=records", "retrained.path=model"])
def test_further_seeds_of_a_retrained_model_that_is_given_are_an_error(typed: str, tmp_path: Path) -> None:
    config = composed(tmp_path, "retrained.seeds=2", typed)
    with pytest.raises(
        UsageError, match=r"retrained.seeds=2: this run trains no retrained model.*type retrained.seeds=1"
    ):
        check(config, tmp_path / "run")


@pytest.mark.parametrize(("model", "seeds"), [("tiny", 3), ("llama2_7b_chat", 1)])
def test_presets_measure_the_ceiling_on_a_model_from_scratch_only(model: str, seeds: int, tmp_path: Path) -> None:
    for preset in ("table_tofu", "ablation_rho"):
        assert composed(tmp_path, f"experiment={preset}", f"model={model}")["retrained"]["seeds"] == seeds
    assert build(composed(tmp_path)).retrained_seeds == 1


def test_the_ceiling_and_the_spread_of_the_auc_are_one_line_each() -> None:
    run = replace(
        made(), ceiling={"forget_quality": [0.1, 0.4, 0.9], "forget_ks_distance": [0.1, 0.2, 0.3]},
        retrained_seeds={"mia_auc": [0.4, 0.3, 0.45]},
    )  # fmt: skip
    assert labels.ceiling_of(run) == [
        "ceiling, the same test between two retrained models (median of 3 pairs): forget quality 0.400, KS distance "
        "0.200",
        "MIA AUC of the 3 retrained models: 0.400, 0.300, 0.450; the table has the first",
    ]
    assert labels.ceiling_of(made()) == []


# ---- The guard


def free(text: str, num: int = 30, nll: float = 0.5) -> Answers:
    texts = [f"{text} {i}" for i in range(num)]
    return Answers(np.zeros(num), question=texts, generation=texts, generation_nll=np.full(num, nll))


def test_what_is_guarded_is_the_unlearned_model_and_every_model_is_measured() -> None:
    by_model = {
        "unlearned": {"forget": free("the mill", nll=9.0), "retain": free("an inn")},
        "original": {"forget": free("the mill"), "retain": free("an inn")},
        "retrained": {"forget": free("the mill", nll=8.0), "retain": free("an inn")},
    }
    collapsed, read = measures.guarded(by_model)
    assert collapsed == {}  # the retrained model is as unlikely
    assert read["retrained"]["forget"]["median_nll"] == 8.0 and read["unlearned"]["retain"]["num"] == 30
    del by_model["retrained"]
    assert measures.guarded(by_model)[0] == {}  # new answers to forgotten prompts are not the original's
    by_model["unlearned"]["retain"] = free("an inn", nll=9.0)
    assert measures.guarded(by_model)[0] == {"retain": "median NLL under the original model 9.00 (original 0.50)"}
    del by_model["original"]
    assert measures.guarded(by_model)[0] is None


def test_records_of_another_program_get_the_units_of_the_tasks_probe(tmp_path: Path) -> None:
    """A log of TOFU's authors has the first 300 items of a probe, without their authors."""
    models = build_models(composed(tmp_path))
    probe = models.task.probes["forget"]
    given = {"forget": Answers(np.zeros(len(probe.items) - 5)), "facts": Answers(np.zeros(3))}
    answer_cache.write_answers(tmp_path / "records", given)
    known = scores.known_answers(replace(models, retrained_records=tmp_path / "records"))["retrained"]
    assert known["forget"].unit == list(probe.units or ())[:-5] and known["facts"].unit is None


def test_the_console_states_what_each_stage_of_each_evaluation_took_and_what_was_cached() -> None:
    seconds = {"original": {"suite": 3600.4}, "unlearned": {"generation": 12.34, "suite": 60}}
    seconds["retrained_1"] = {"suite": 9}
    text = " ".join(comparison(replace(made(), evaluation_seconds=seconds, cached=["original"])).split())
    stated = "before (cached) suite 3600; after generation 12.3, suite 60.0; retrained 1 suite 9.000"
    assert f"seconds of evaluation: {stated}" in text
    assert "seconds of evaluation" not in comparison(made())
