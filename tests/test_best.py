"""save=best: which of a training's weights are kept, and that they are the ones measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from starts import type_
from test_cli import SMALL, metrics_of

from soul_exp import results
from soul_exp.artifacts.scores import FORGET_QUALITY, RETAIN, Validated
from soul_exp.stages.selection import CANDIDATE, AtStep, KeepBest


def kept_of(folder: Path, measured: Sequence[tuple[float | None, float | None]]) -> KeepBest:
    """A `KeepBest` that has considered these (forget quality, retain probability) at steps 1, 2, ...; 0.9 is enough."""
    given = iter(measured)

    def validate(step: int) -> Validated:
        return Validated(dict(zip((FORGET_QUALITY, RETAIN), next(given), strict=True)), None)

    def save(place: Path) -> None:
        place.mkdir(parents=True)
        (place / "weights").write_text(place.name)

    best = KeepBest(folder, {RETAIN: 1.0}, validate, save, first=True, keep=0.9)
    for step in range(1, len(measured) + 1):
        best.consider(step)
    return best


@pytest.mark.parametrize(
    ("measured", "step"),
    [
        ([(-9, 0.99), (-3, 0.95), (-4, 0.97), (-1, 0.5)], 2),  # the last forgets most, and has lost too much
        ([(-9, 0.6), (-3, 0.8), (-1, 0.7)], 2),  # none keeps enough: the one that keeps most
        ([(-3, 0.95), (-3, 0.99)], 1),  # the earlier of equals
        ([(None, None), (-30, 0.1), (None, None)], 2),
        ([(None, None)], 1),
    ],
)
def test_the_best_forgets_most_of_those_that_keep_enough(
    measured: Sequence[tuple[float | None, float | None]], step: int, tmp_path: Path
) -> None:
    best = kept_of(tmp_path, measured)
    found = best.best_so_far()
    assert found is not None and found.step == step
    assert [path.name for path in tmp_path.iterdir()] == [f"best-{step}"]  # and no other weights are kept


def test_a_kill_between_two_candidates_loses_neither(tmp_path: Path) -> None:
    kept_of(tmp_path, [(-9, 0.99)])
    written = tmp_path / "best-2"  # and the former one was not removed yet
    written.mkdir()
    (written / CANDIDATE).write_text(json.dumps({"step": 2, "metrics": {FORGET_QUALITY: -3, RETAIN: 0.95}}))
    (tmp_path / "best-3").mkdir()  # cut off while it was written
    again = kept_of(tmp_path, [])
    assert again.best_so_far() == AtStep(step=2, metrics={FORGET_QUALITY: -3, RETAIN: 0.95})


def test_the_best_weights_are_saved_and_measured(place: Path) -> None:
    line = [*SMALL, "train.max_steps=6", "train.save_steps=2", "optimizer.lr=1e-2", "train.warmup_ratio=0"]
    run = type_(place, *line, "save=best", "best_keep=0", "name=best")
    assert run.returncode == 0, run.stderr
    folder = next((place / "runs" / "best").rglob("results.json")).parent
    found = results.read(folder)
    assert found is not None and found.num_steps == 6 and not (folder / "checkpoints").exists()
    note = next(line for line in found.notes if line.startswith("save=best: the weights of step"))
    values = [
        float(line.split("forget quality ")[1].split()[0]) for line in run.stdout.splitlines() if "best so far" in line
    ]
    assert len(values) >= 1 and values == sorted(values)
    ours = metrics_of(folder)["unlearned"]
    assert f"{ours[FORGET_QUALITY]:.3g} at retain probability {ours[RETAIN]:.3g}" in note
    again = type_(place, *line, "stages=[evaluate]", f"model.path={folder / 'model'}", "name=again")
    assert again.returncode == 0, again.stderr
    assert metrics_of(next((place / "runs" / "again").rglob("results.json")).parent)["unlearned"] == pytest.approx(ours)


def test_runs_that_keep_other_weights_are_other_runs(place: Path) -> None:
    """A finished run with save=final is not taken for one with save=best."""
    folder = next((place / "runs" / "best").rglob("results.json")).parent
    line = [*SMALL, "train.max_steps=6", "train.save_steps=2", "optimizer.lr=1e-2", "train.warmup_ratio=0"]
    run = type_(place, *line, "save=final", "name=best", f"hydra.run.dir={folder}")
    assert run.returncode == 1 and "best_keep: 0 before, None now" in run.stderr


def test_a_rule_that_asks_for_s_mia_needs_a_holdout(place: Path) -> None:
    run = type_(place, *SMALL, "save=best", "best_s_mia=0.5", "task.num_holdout_authors=0", "stages=[]")
    assert run.returncode == 1 and "compares by validation_s_mia, which is not available: task.num_hold" in run.stderr
