"""Tuning: what the rule picks from numbers worked out by hand, and trials that are shared, resumed and recognised."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from conftest import start
from starts import type_

from soul_exp import build, results, tables
from soul_exp.artifacts.scores import FLUENCY, FORGET_QUALITY, RETAIN, S_MIA, UTILITY, Validated
from soul_exp.checks.check import check
from soul_exp.errors import UsageError
from soul_exp.stages.selection import Candidate, KeepBest, Trial, best_forgetting, lost, order
from soul_exp.stages.tune import code_of

START = {RETAIN: 0.8}
keeping_half = functools.partial(best_forgetting, start=START, keep=0.5)  # 0.4 is enough


def trial(
    lr: float, quality: float | None, retain: float | None, gamma: float = 1.0, diverged: str | None = None
) -> Trial:
    metrics = {FORGET_QUALITY: quality, RETAIN: retain}
    return Trial(lr=lr, gamma=gamma, metrics=metrics, diverged=diverged, num_steps=10, seconds=1.0)


def test_the_rule_picks_the_best_forgetting_among_those_that_keep_enough() -> None:
    trials = [trial(1e-4, -9.0, 0.8), trial(3e-4, -2.0, 0.4), trial(1e-3, -0.1, 0.39)]
    assert keeping_half(trials) is trials[1]
    assert best_forgetting(trials, START, keep=0.48) is trials[2]  # 0.384 is enough


def test_a_tie_goes_to_the_smaller_learning_rate_and_then_to_the_gamma_named_first() -> None:
    trials = [
        trial(1e-3, -1.0, 0.8), trial(1e-4, -1.0, 0.5, gamma=3.0), trial(1e-4, -1.0, 0.6, gamma=10.0),
        trial(1e-5, -2.0, 0.8),
    ]  # fmt: skip
    assert keeping_half(trials) is trials[1]


def test_a_trial_that_diverged_or_lost_a_metric_is_not_picked() -> None:
    diverged, lost = trial(1e-4, -0.1, 0.8, diverged="the loss is nan"), trial(2e-4, None, 0.8)
    sound = trial(3e-4, -5.0, 0.5)
    assert keeping_half([diverged, lost, sound]) is sound


def test_where_none_keeps_enough_the_one_that_keeps_most_is_picked() -> None:
    trials = [trial(1e-4, -3.0, 0.2), trial(3e-4, -0.1, 0.1), trial(2e-4, -4.0, 0.2)]
    assert keeping_half(trials) is trials[0]  # a tie again goes to the smaller rate


def test_where_all_diverged_the_smallest_learning_rate_is_picked() -> None:
    trials = [trial(3e-4, None, None, diverged="lost"), trial(1e-4, None, None, diverged="lost")]
    assert keeping_half(trials) is trials[1]


# --- what counts: the numbers of a target, and of weights that would forget most -----------------------------------

TARGET = {RETAIN: 0.8, UTILITY: 0.6, FLUENCY: 1.0}  # 0.9 of it: 0.72, 0.54, 0.9
SOUND = {FORGET_QUALITY: -9.0, RETAIN: 0.72, UTILITY: 0.54, FLUENCY: 0.9, S_MIA: 0.5}
BEST = {**SOUND, FORGET_QUALITY: -1.0}


@pytest.mark.parametrize(
    ("changed", "collapsed", "why"),
    [
        ({}, None, None),
        ({RETAIN: 0.71}, None, "validation_retain_probability 0.71, expected 0.72 or more"),
        ({UTILITY: 0.0}, None, "validation_utility 0, expected 0.54 or more"),  # with 0.9 of the retain probability
        ({UTILITY: None}, None, "validation_utility lost, expected 0.54 or more"),
        ({FLUENCY: 0.89}, None, "validation_fluency 0.89, expected 0.9 or more"),
        ({}, "validation_forget: commas", "collapsed (validation_forget: commas)"),
    ],
)
def test_what_lost_general_knowledge_fluency_or_retain_probability_or_collapsed_is_not_selected(
    changed: Mapping[str, float | None], collapsed: str | None, why: str | None, tmp_path: Path
) -> None:
    """One function judges the trials of tuning and the checkpoints of save=best."""
    given = [Validated(SOUND, None), Validated({**BEST, **changed}, collapsed)]
    trials = [Trial(**vars(each), lr=i, gamma=1, num_steps=1, seconds=1) for i, each in enumerate(given)]
    assert lost(trials[1], TARGET, 0.9) == why
    assert best_forgetting(trials, TARGET, keep=0.9) is trials[why is None]
    left = iter(given)
    keeper = KeepBest(tmp_path, TARGET, lambda step: next(left), lambda place: place.mkdir(), first=True, keep=0.9)
    keeper.consider(1)
    _, note = keeper.end(2)
    assert note.startswith(f"save=best: the weights of step {1 + (why is None)} of 2") and "kept enough" not in note


def test_a_number_that_the_target_lacks_is_not_asked_for() -> None:
    known = {name: value for name, value in BEST.items() if name not in (UTILITY, S_MIA)}
    assert lost(Candidate(metrics=known), {RETAIN: 0.8, FLUENCY: 1.0}, 0.9) is None


def test_what_shows_no_membership_comes_before_what_has_the_better_forget_quality() -> None:
    open_, closed = Candidate(metrics={**BEST, S_MIA: 0.49}), Candidate(metrics=SOUND)
    assert order(open_, TARGET, keep=0.9) > order(closed, TARGET, keep=0.9)
    assert order(open_, TARGET, keep=0.9, s_mia=0.5) < order(closed, TARGET, keep=0.9, s_mia=0.5)
    assert order(open_, TARGET, keep=0.9) < order(Candidate(metrics=BEST), TARGET, keep=0.9)  # a tie
    lost_more = Candidate(metrics={**BEST, RETAIN: 0.1})
    assert order(open_, TARGET, keep=0.9, s_mia=0.5) > order(lost_more, TARGET, keep=0.9, s_mia=0.5)


def test_where_nothing_counts_the_one_that_lost_least_is_selected_and_the_note_says_why(tmp_path: Path) -> None:
    """The least share decides: 0.5 of the utility, a quarter of the probability, 0.8 of the fluency but collapsed."""
    given = [
        Validated({**BEST, RETAIN: 0.2}, None), Validated({**BEST, UTILITY: 0.3}, None),
        Validated({**BEST, FLUENCY: 0.8}, "commas"), Validated({**BEST, RETAIN: None}, None),
    ]  # fmt: skip
    left = iter(given)
    keeper = KeepBest(tmp_path, TARGET, lambda step: next(left), lambda place: place.mkdir(), first=True, keep=0.9)
    for step in range(1, 4):
        keeper.consider(step)
    _, note = keeper.end(4)
    assert "step 2 of 4" in note and note.endswith(
        "no checkpoint kept enough, this one the most (validation_utility 0.3, expected 0.54 or more)"
    )


RULE = {"_target_": "soul_exp.stages.selection.best_forgetting", "_partial_": True, "keep": 0.9}
CONFIG: Mapping[str, Any] = {
    "stages": ["prepare", "unlearn", "evaluate"],
    "seed": 0,
    "optimizer": {"lr": 3e-4},
    "loss": {"gamma": 1.0, "retain_term": "nll"},
    "choices": {"optimizer": "adam", "loss": "npo", "task": "tofu"},
    "tune": {"seed": 1000, "lr": [0.1, 1], "gamma": [3, 10], "rule": RULE},
}


def test_the_grid_is_factors_of_the_optimizers_own_rate_times_common_gammas() -> None:
    assert build.tried(CONFIG) == [(3e-5, 3.0), (3e-5, 10.0), (3e-4, 3.0), (3e-4, 10.0)]


def test_a_run_that_unlearns_nothing_has_no_trials() -> None:
    assert build.tried({**CONFIG, "stages": ["evaluate"]}) == [] == build.tried({**CONFIG, "tune": None})


def test_words_tell_the_budget_and_the_rule_with_its_constants() -> None:
    summary = str(build.build_tuning(CONFIG))
    assert summary.startswith("validation part, 4 trials a cell (2 learning rates x 2 gammas, seed 1000): the largest")
    assert summary.endswith("(keep=0.9)")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"tune": {**CONFIG["tune"], "rule": None}}, "tune.rule is missing: choose a preset"),
        ({"tune": {**CONFIG["tune"], "lr": []}}, r"tune.lr=\[\]: expected a list, each a number above 0"),
        ({"tune": {**CONFIG["tune"], "lr": [0.1, -1]}}, "each a number above 0"),
        ({"tune": {**CONFIG["tune"], "gamma": [3, 3]}}, "a value stands there twice"),
        ({"tune": {**CONFIG["tune"], "seed": 0}}, "tune.seed=0 is the run's own seed"),
        ({"tune": {**CONFIG["tune"], "workers": 0}}, "tune.workers=0: expected a whole number of 1 or more"),
        ({"tune": {**CONFIG["tune"], "rule": {**RULE, "kep": 1}}}, "tune.rule: "),
        (
            {"tune": {**CONFIG["tune"], "rule": {**RULE, "_target_": "soul_exp.stages.selection.nothing"}}},
            "tune.rule: .*nothing",
        ),
        ({"optimizer": {}}, "optimizer=adam states no lr"),
        ({"loss": {"retain_term": None}}, "loss=npo has no retain term"),
    ],
)
def test_what_cannot_be_tuned_is_reported_in_one_sentence(changed: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        build.build_tuning({**CONFIG, **changed})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (["task.validation_fraction=0"], r"is not available: task\.validation_fraction=0"),
        (
            [f"~task.metrics.{RETAIN}"],
            "validation_retain_probability, which task=tofu does not report: choose task=tofu",
        ),
        (
            ["+tune.rule.s_mia=0.5", "task.num_holdout_authors=0"],
            "validation_s_mia, which is not available: task.num_h",
        ),
        (["stages=[unlearn,evaluate]"], "stages=.*add prepare to stages"),
    ],
)
def test_a_run_without_a_validation_part_or_prepared_models_cannot_be_tuned(
    changed: list[str], sentence: str, tmp_path: Path
) -> None:
    line = ("experiment=ablation_rho", "budget=smoke", "task.num_authors=8")
    check(composed(tmp_path, *line), tmp_path / "run")
    with pytest.raises(UsageError, match=sentence):
        check(composed(tmp_path, *line, *changed), tmp_path / "run")


def test_a_trial_draws_none_of_the_runs_own_random_numbers() -> None:
    optimizer = {"lr": 1e-3, "zeroth_order": {"seed": 0, "lr": 1e-6}, "seed": 0}
    loss = {**CONFIG["loss"], "forget_term": {"_target_": "soul_exp.losses.rmu", "seed": 0}}
    given = {**CONFIG, "optimizer": optimizer, "loss": loss, "train": {"save_steps": 50}}
    made = build.trial(given, 1e-4, 3.0)
    assert made["seed"] == 1000 and made["loss"]["gamma"] == 3.0 and made["train"]["save_steps"] is None
    assert made["loss"]["forget_term"]["seed"] == 1000
    assert made["optimizer"] == {"lr": 1e-4, "zeroth_order": {"seed": 1000, "lr": 1e-6}, "seed": 1000}


def test_an_edited_method_begins_its_trials_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "loss_of_a_user.py"
    file.write_text("def term(forget):\n    return forget.nll.mean()\n")
    loss = {"_target_": "soul_exp.losses.Objective", "forget_term": {"_target_": "loss_of_a_user.term"}}
    before = code_of([loss])
    assert code_of([loss]) == before
    file.write_text("def term(forget):\n    return forget.nll.sum()\n")
    assert code_of([loss]) != before


# --- the real door ------------------------------------------------------------------------------------------------

SMALL = [
    "experiment=ablation_rho", "budget=smoke", "task.num_authors=8", "task.train_varied=false",
    "prepare.epochs=1", "evaluate.max_new_tokens=4",
    "train.max_steps=2", "train.logging_steps=1", "tune.lr=[1]", "wandb.mode=disabled", "save=none", "-m",
]  # fmt: skip
SWEEP = [*SMALL, "tune.gamma=[1,10]", "optimizer.rho=0.1,10", "seed=0,1"]


def printed_by(place: Path, *arguments: str) -> str:
    """What a command that succeeds prints."""
    done = type_(place, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def printed(place: Path) -> str:
    """Two cells of two seeds, two trials a cell."""
    return printed_by(place, *SWEEP)


@pytest.fixture(scope="module")
def runs(place: Path, printed: str) -> dict[str, results.Results]:
    found = {path.parent.name: results.read(path.parent) for path in (place / "runs").rglob("results.json")}
    assert len(found) == 4, printed
    return {name: run for name, run in found.items() if run is not None}


def trial_files(place: Path) -> list[Path]:
    return sorted((place / "cache" / "trials").glob("*.json"))


def test_every_cell_has_its_trials_and_runs_with_the_numbers_that_the_rule_picks(
    runs: Mapping[str, results.Results],
) -> None:
    for found in runs.values():
        trials = [Trial(**{key: value for key, value in t.items() if key != "chosen"}) for t in found.trials]
        assert [(t.lr, t.gamma) for t in trials] == [(3e-4, 1.0), (3e-4, 10.0)]
        target = {RETAIN: found.metrics["original"][RETAIN] or 0.0}
        assert all(0 <= (t.metrics[FLUENCY] or 0) <= 1 and "validation_forget_median_nll" in t.metrics for t in trials)
        known = [each for name, each in found.free_answers["original"].items() if name.startswith("validation_")]
        total = sum((each["num"] or 0) + (each["num_refused"] or 0) for each in known)
        target[UTILITY] = found.metrics["original"][UTILITY] or 0.0  # of general questions that no test probe has
        target[FLUENCY] = 1 - sum((each["num"] or 0) * (each["degenerate"] or 0) for each in known) / total
        picked = best_forgetting(trials, target, keep=0.9)
        why = lost(picked, target, 0.9)
        noted = [note for note in found.notes if note.startswith("tune: no trial kept enough")]
        assert noted == ([f"tune: no trial kept enough, the chosen one the most ({why})"] if why else [])
        assert (found.config["optimizer"]["lr"], found.config["loss"]["gamma"]) == (picked.lr, picked.gamma)
        assert [t["chosen"] for t in found.trials] == [t is picked for t in trials]
        assert found.tuned is not None and "2 trials a cell" in found.tuned and found.seconds["tune"] > 0


def test_trials_are_shared_between_seeds_and_measured_at_another_seed(
    runs: Mapping[str, results.Results], printed: str, place: Path
) -> None:
    assert len(trial_files(place)) == 4  # two cells of two trials, whatever the number of seeds
    assert printed.count("tune: 2 trials (0 in the cache)") == 2 == printed.count("tune: 2 trials (2 in the cache)")
    assert {found.config["tune"]["seed"] for found in runs.values()} == {1000}
    assert {found.config["seed"] for found in runs.values()} == {0, 1}


def test_a_finished_tuned_run_is_recognised_and_skipped(
    runs: Mapping[str, results.Results], printed: str, place: Path
) -> None:
    files = {path: path.stat().st_mtime_ns for path in [*trial_files(place), *(place / "runs").rglob("results.json")]}
    assert printed_by(place, *SWEEP).count("finished before, skipped") == 4
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_a_run_of_other_trials_is_not_taken_for_this_one(runs: Mapping[str, results.Results], place: Path) -> None:
    name = next(iter(runs))
    process = start(
        place, *SMALL, "tune.gamma=[1,30]", "optimizer.rho=0.1", "seed=0", f"hydra.sweep.subdir={name}",
    )  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "loss.gamma: [1.0, 10.0] before, [1.0, 30.0] now" in err and "overwrite=true" in err


def test_a_run_killed_between_trials_goes_on_at_the_first_missing_and_order_changes_no_number(
    runs: Mapping[str, results.Results], place: Path
) -> None:
    found = next(found for name, found in runs.items() if "rho-10+" in name)
    for path in trial_files(place):
        path.unlink()
    line = [*SMALL, "tune.gamma=[100,1,10]", "tune.workers=1", "optimizer.rho=10", "seed=0", "name=killed"]
    process = start(place, *line)
    deadline = time.time() + 120
    while time.time() < deadline and not trial_files(place):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    time.sleep(1)  # its worker has noticed
    done = {path: path.stat().st_mtime_ns for path in trial_files(place)}
    assert 1 <= len(done) < 3
    assert f"tune: 3 trials ({len(done)} in the cache)" in printed_by(place, *line)
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    numbers = {
        (t["lr"], t["gamma"]): t["metrics"] for t in (json.loads(path.read_text()) for path in trial_files(place))
    }
    assert len(numbers) == 3
    for t in found.trials:  # there each was the first of its process, here they came one after the other
        assert numbers[t["lr"], t["gamma"]] == t["metrics"]


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed's CPU engine is tried on Linux only")
def test_under_deepspeed_a_trial_runs_on_all_ranks_and_comes_to_the_same(
    runs: Mapping[str, results.Results], place: Path
) -> None:
    found = next(found for name, found in runs.items() if "rho-10+" in name)
    for path in trial_files(place):
        path.unlink()
    printed = printed_by(
        place, *SMALL, "tune.gamma=[1,10]", "optimizer.rho=10", "seed=0", "name=zero", "compute=zero2",
        "compute.processes=2", "stages=[prepare,unlearn]",
    )  # fmt: skip
    assert "tune: trial 2 of 2" in printed
    numbers = {t["gamma"]: t["metrics"] for t in (json.loads(path.read_text()) for path in trial_files(place))}
    for t in found.trials:
        pair = (numbers[t["gamma"]], t["metrics"])  # some are null
        known, expected = ({name: value for name, value in each.items() if value is not None} for each in pair)
        assert len(known) > 2 and known == pytest.approx(expected, rel=1e-3)


def test_the_table_names_the_rule_and_the_number_of_trials(
    runs: Mapping[str, results.Results], place: Path, tmp_path: Path
) -> None:
    folder = place / "runs" / "ablation_rho"
    text = tables.table(folder)
    assert f"\n{text}".count("\n### ") == 1 and "untuned" not in text
    assert "2 trials a cell (1 learning rates x 2 gammas): the largest validation log10" in text
    assert "the largest learning rate tried was the best" not in text  # there was one only
    assert "optimizer.lr 0.0003" in text and ("| loss.gamma |" in text or "loss.gamma 1" in text)  # what was chosen
    tried = tables.trials(folder)
    assert len(tried) == 8 and tried["chosen"].sum() == 4 and {"run", "lr", "gamma", RETAIN} <= set(tried)


def test_remarks_stand_below_the_table_each_once_with_its_runs(
    runs: Mapping[str, results.Results], tmp_path: Path
) -> None:
    tried = [{**next(iter(runs.values())).trials[0], "lr": lr, "chosen": lr == 1e-3} for lr in (1e-4, 1e-3)]
    for name, found in runs.items():
        (tmp_path / name).mkdir()
        notes, trials = (["a remark"], tried) if "seed-0" in name else ([], found.trials)
        results.write(tmp_path / name, replace(found, notes=notes, trials=trials))
    text = tables.table(tmp_path)
    first, second = sorted(f"`{name}`" for name in runs if "seed-0" in name)
    assert text.count("a remark") == 1 and f"- a remark ({first}, {second})" in text
    assert f"- the smallest or the largest learning rate tried was the best: {first}, {second}" in text
