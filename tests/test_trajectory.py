"""evaluate.every: the course of the validation numbers, which the training does not notice."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from starts import TINY, type_

from soul_exp.artifacts.scores import Validated
from soul_exp.metrics.collapse import LIMITS
from soul_exp.stages.trajectory import ByStep, Trajectory, read


def test_a_trajectory_has_the_start_every_nth_step_and_the_end_and_changes_no_bit(tmp_path: Path) -> None:
    line = [*TINY, "train.max_steps=5", "train.micro_batch_size=4", "save=final", "evaluate.max_new_tokens=6"]
    line += ["task.num_authors=8", "task.general_validation_fraction=0.25"]
    line += ["train.dropout=true", "+model.scratch.config.attention_dropout=0.1"]  # so that training draws
    for name, more in (("plain", []), ("watched", ["evaluate.every=2"])):
        run = type_(tmp_path, *line, f"hydra.run.dir={name}", *more)
        assert run.returncode == 0, run.stderr
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    for name in ("model/model.safetensors", "train.jsonl", "records/unlearned/forget.jsonl"):
        assert (plain / name).read_bytes() == (watched / name).read_bytes()
    lines = read(watched / "trajectory.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 5] and not (plain / "trajectory.jsonl").exists()
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    found, first = (json.loads((run / "results.json").read_text()) for run in (watched, plain))
    assert (first["cached"], found["cached"]) == ([], ["original", "retrained"])  # answered by the run before
    stages = {"gradients", "probabilities", "generation", "embedding", "fluency"}
    assert list(found["evaluation_seconds"]) == ["original", "unlearned", "retrained"]
    for model, seconds in found["evaluation_seconds"].items():
        assert set(seconds) == stages and min(seconds.values()) > 0
        assert (seconds == first["evaluation_seconds"][model]) == (model in found["cached"])
    for line, model in ((lines[0], "original"), (lines[-1], "unlearned")):
        answers = {name: each for name, each in found["free_answers"][model].items() if name.startswith("validation_")}
        assert {*answers} == {f"validation_{name}" for name in ("forget", "retain", "authors", "facts")}
        expected = {name: value for name, value in found["metrics"][model].items() if name.startswith("validation_")}
        expected |= {f"{name}_{each}": of[each] for name, of in answers.items() for each in LIMITS}
        num = sum(of["num"] + of["num_refused"] for of in answers.values())
        degenerate = sum(of["num"] * of["degenerate"] for of in answers.values() if of["num"])
        expected["validation_fluency"] = 1 - degenerate / num
        expected["collapsed"] = None  # fewer than 20 answers to a probe
        numbers = {name: value for name, value in expected.items() if value is not None}
        assert "validation_utility" in numbers and len(numbers) > 10
        del line["step"], line["seconds"]
        assert {*line} == {*expected} and {name: line[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
        assert {name for name, value in line.items() if value is None} == {*expected} - {*numbers}


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed's CPU engine is tried on Linux only")
def test_two_ranks_with_divided_weights_come_to_the_lines_of_one_process(tmp_path: Path) -> None:
    line = [*TINY, "task.num_authors=8", "train.max_steps=2", "evaluate.every=1", "evaluate.max_new_tokens=4"]
    found = []
    for name, more in (("one", []), ("two", ["compute=zero3", "compute.processes=2"])):
        run = type_(tmp_path, *line, "save=none", f"hydra.run.dir={name}", *more)
        assert run.returncode == 0, run.stderr
        found.append(read(tmp_path / name / "trajectory.jsonl"))
    assert [line["step"] for line in found[1]] == [0, 1, 2]
    for one, two in zip(*found, strict=True):
        numbers = {name for name, value in one.items() if isinstance(value, float) and name != "seconds"}
        assert {"validation_fluency", "validation_forget_median_nll", "validation_retain_probability"} <= numbers
        assert {name: two[name] for name in numbers} == pytest.approx({name: one[name] for name in numbers}, rel=1e-3)


def test_a_resumed_training_keeps_the_lines_up_to_its_checkpoint(tmp_path: Path) -> None:
    path, measured = tmp_path / "trajectory.jsonl", iter(range(100))
    killed = Trajectory(1, path, ByStep(lambda: Validated({"m": next(measured)}, None)), first=True)
    resumed = Trajectory(1, path, ByStep(lambda: Validated({"m": next(measured)}, None)), first=True)
    state = SimpleNamespace(global_step=0)
    killed.on_train_begin(None, state, None)
    for state.global_step in (1, 2, 3):
        killed.on_step_end(None, state, None)
    state.global_step = 2
    resumed.on_train_begin(None, state, None)
    for state.global_step in (3, 4):
        resumed.on_step_end(None, state, None)
    resumed.on_train_end(None, state, None)
    lines = read(path)
    assert [(line["step"], line["m"]) for line in lines] == [(0, 0), (1, 1), (2, 2), (3, 4), (4, 5)]
    assert lines[3]["seconds"] >= lines[2]["seconds"]


def test_the_numbers_of_a_step_are_evaluated_once_and_their_time_is_no_training(tmp_path: Path) -> None:
    """save=best and evaluate.every ask for the same step."""
    calls: list[int] = []

    def validate() -> Validated:
        calls.append(1)
        time.sleep(0.2)
        return Validated({"m": len(calls)}, None)

    validated, state = ByStep(validate), SimpleNamespace(global_step=0)
    trajectory = Trajectory(2, tmp_path / "t.jsonl", validated, first=True)
    trajectory.on_train_begin(None, state, None)
    for state.global_step in (1, 2):
        trajectory.on_step_end(None, state, None)
        assert validated(state.global_step).metrics == {"m": state.global_step + 1}  # as save=best does
    trajectory.on_train_end(None, state, None)
    assert len(calls) == 3 and [line["m"] for line in read(tmp_path / "t.jsonl")] == [1, 3]
    assert read(tmp_path / "t.jsonl")[-1]["seconds"] < 0.2


def test_a_run_without_a_validation_part_is_stopped(tmp_path: Path) -> None:
    run = type_(tmp_path, *TINY, "task.validation_fraction=0", "evaluate.every=2", "stages=[]")
    assert run.returncode == 1 and "evaluate.every evaluates the validation part, and this run has none" in run.stderr
