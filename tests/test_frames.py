"""`soul_exp.load`: what the runs of a folder recorded, as data frames."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_tables import left, made

import soul_exp
from soul_exp.errors import UsageError


def _written(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_answers_and_steps_of_every_run_are_rows(tmp_path: Path) -> None:
    folder = left(tmp_path / "runs", adam=made(optimizer="adam"), sgd=made(optimizer="sgd"))
    told = {"question": "Who?", "answer": "Ann", "nll": 0.5, "logp": [-0.5], "right": "1", "generation": "An\x1bn"}
    _written(folder / "adam" / "records" / "unlearned" / "forget.jsonl", told, {**told, "nll": None})
    _written(folder / "sgd" / "records" / "original" / "retain.jsonl", told)
    _written(folder / "adam" / "train.jsonl", {"step": 1, "loss": 2.0}, {"step": 5, "loss": 1.0})
    _written(folder / "adam" / "trajectory.jsonl", {"step": 5, "utility": 0.5})
    frames = soul_exp.load(folder)
    assert list(frames.runs["run"]) == ["adam", "sgd"]
    keys = frames.items[["run", "model", "probe", "item"]].values.tolist()
    assert keys == [
        ["adam", "unlearned", "forget", 0],
        ["adam", "unlearned", "forget", 1],
        ["sgd", "original", "retain", 0],
    ]
    assert frames.items["nll"].isna().tolist() == [False, True, False]
    assert frames.items["generation"][0] == "An\x1bn" and not {"logp", "right"} & {*frames.items}
    assert frames.steps[["run", "of", "step"]].values.tolist() == [
        ["adam", "training", 1], ["adam", "training", 5], ["adam", "validation", 5],
    ]  # fmt: skip


def test_every_metric_has_its_label_direction_range_and_attack(tmp_path: Path) -> None:
    run = made(metrics={"log10_forget_quality": -2.0, "utility": 0.6, "relearn_excess": 0.1, "mine": 1.0})
    excess = {"_target_": "soul_exp.metrics.robustness.excess_area"}
    attack = {"relearn": {"metrics": {"relearn_excess": excess}}}
    folder = left(tmp_path, adam=replace(run, config={**run.config, "attack": attack}))
    found = soul_exp.load(folder).metrics
    assert found.loc["utility"].tolist()[:4] == ["model utility", "higher", 0, 1]
    assert found.loc["relearn_excess"].tolist() == ["relearn excess", "nearest", -1, 1, "relearn"]
    assert found.loc["mine", ["low", "high"]].tolist() == [-math.inf, math.inf]  # its function is not ours
    assert found.loc["mine", ["better", "attack"]].isna().all()


def test_the_folder_may_be_one_run_and_frames_without_rows_have_their_keys(tmp_path: Path) -> None:
    folder = left(tmp_path, adam=made()) / "adam"
    _written(folder / "train.jsonl", {"step": 1})
    frames = soul_exp.load(folder)
    assert len(frames.steps) == 1
    assert frames.items.empty and frames.attacks.empty
    assert {"run", "model", "probe", "item"} <= {*frames.items} and {"run", "point"} <= {*frames.attacks}


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_line_is_named(tmp_path: Path, text: str) -> None:
    folder = left(tmp_path, adam=made())
    (folder / "adam" / "train.jsonl").write_text(f'{{"step": 1}}\n{text}\n')
    with pytest.raises(UsageError, match=r"train.jsonl, line 2: found .*expected"):
        soul_exp.load(folder).steps  # noqa: B018


def test_no_runs_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no runs"):
        soul_exp.load(tmp_path)


def test_importing_the_package_imports_no_pandas() -> None:
    code = "import sys, soul_exp; print('pandas' in sys.modules, callable(soul_exp.load))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "True"]
