"""The presets of ablations: every cell composes, can run, and has the same number of trials under a declared rule."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from composing import job
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from soul_exp import compose
from soul_exp.build import build_tuning, trial, tried
from soul_exp.checks.check import check

PRESETS = sorted(path.stem for path in (compose.conf_dir() / "experiment").glob("ablation_*.yaml"))


@functools.cache
def jobs(preset: str, budget: str) -> list[dict[str, Any]]:
    """The configuration of every job of a preset; not to be changed."""
    typed = [f"experiment={preset}", f"budget={budget}", "wandb.mode=disabled"]
    _, sweep = job(*typed)
    lines = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in sweep.items()])
    (cells,) = BasicSweeper.split_arguments(lines, max_batch_size=None)
    return [job(*typed, *cell)[0] for cell in cells]


def test_the_six_ablations_are_there() -> None:
    assert {name.removeprefix("ablation_") for name in PRESETS} == {
        "optimizer", "estimator", "rho", "k", "curvature_on", "precision",
    }  # fmt: skip


@pytest.mark.parametrize("budget", ["smoke", "full"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_cell_can_run_and_has_as_many_trials_as_the_others(preset: str, budget: str, tmp_path: Path) -> None:
    configs = jobs(preset, budget)
    for config in configs:
        config = {**config, "cache": str(tmp_path / "cache")}
        check(config, tmp_path / "run")
    assert {len(tried(config)) for config in configs} == {4 if budget == "smoke" else 10}
    assert len({str(build_tuning(config)) for config in configs}) == 1  # one rule, one budget
    seeds = {config["seed"] for config in configs}
    assert seeds == ({0} if budget == "smoke" else {0, 1, 2}) and configs[0]["tune"]["seed"] not in seeds
    cells = {str(trial(config, 1.0, 1.0)) for config in configs}  # the seeds of a cell share its trials
    assert len(cells) * len(seeds) == len(configs)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_cell_of_a_preset_starts_from_numbers_tuned_elsewhere(preset: str) -> None:
    for config in jobs(preset, "smoke"):
        assert config["tuned"] is None and config["train"]["epochs"] == 10


def test_values_typed_on_the_command_line_win_over_the_presets_sweep() -> None:
    config, sweep = job("experiment=ablation_rho", "budget=smoke", "train.epochs=1", "tune.lr=[1]")
    assert config["train"]["epochs"] == 1 and config["tune"]["lr"] == [1]
    assert config["name"] == "ablation_rho" and set(sweep) == {"optimizer.rho", "seed"}


def test_a_preset_without_a_budget_is_the_full_one() -> None:
    config, sweep = job("experiment=ablation_k")
    assert len(tried(config)) == 10 and sweep["seed"] == "0,1,2"


def test_the_gradient_estimator_looks_at_every_step() -> None:
    config, _ = job("experiment=ablation_estimator", "optimizer=sophia_gradient")
    assert config["optimizer"]["interval"] == 1 and config["optimizer"]["curvature_on"] is None


def test_the_documented_budgets_are_the_budgets() -> None:
    text = (Path(__file__).parents[1] / "docs" / "ablations.md").read_text()
    for budget in ("smoke", "full"):
        config, sweep = job("experiment=ablation_rho", f"budget={budget}")
        row = next(line for line in text.splitlines() if line.startswith(f"| {budget} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == str(config["train"]["epochs"]) and cells[2].split(":")[0] == str(len(tried(config)))
        assert cells[3].replace(" ", "") == str(sweep["seed"])
