"""Every notebook of analysis/ runs from beginning to end on the folders that runs leave."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from soul_exp import results
from soul_exp.results import Results

ROOT = Path(__file__).parents[1]
ANALYSIS = ROOT / "analysis"
NOTEBOOKS = sorted(ANALYSIS.glob("*.ipynb"))


def made(loss: str, optimizer: str, seed: int, source: str = "embedded", status: str = "finished") -> Results:
    """Results of a run whose numbers follow from its choices."""
    shift = 0.02 * seed + (0.1 if optimizer == "sophia" else 0.0) + (0.05 if loss == "npo" else 0.0)
    measured = {"utility": 0.5 + shift, "mia_auc": 0.6, "log10_forget_quality": -10 + 20 * shift}
    original = {"utility": 0.8, "mia_auc": 1.0, "log10_forget_quality": -30.0}
    retrained = {"utility": 0.79, "mia_auc": 0.5, "log10_forget_quality": 0.0}
    models = {"unlearned": measured, "original": original, "retrained": retrained}
    choices = {"model": "tiny", "task": "tofu", "loss": loss, "optimizer": optimizer}
    return Results(
        name="tofu",
        status=status,
        reason="loss 99" if status == "diverged" else None,
        caption=f"TOFU ({source}): 4 of 24 authors forgotten",
        choices=choices,
        tuned=None,
        config={"task": {"source": source}, "stages": ["unlearn", "evaluate"]},
        metrics={
            model: {**values, "forget_quality": math.pow(10, values["log10_forget_quality"])}
            for model, values in models.items()
        },
        reasons={},
        training={},
        num_steps=10,
        seconds={"unlearn": 1.0},
        peak_memory_gib=0.5,
        seeds={"seed": seed},
        data_hashes={},
        commit=None,
        versions={},
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Run folders of two losses, two optimizers and two seeds, one diverged, and of another source."""
    folder = tmp_path / "runs"
    all_runs = [
        made(loss, optimizer, seed) for loss in ("npo", "po") for optimizer in ("adam", "sophia") for seed in (0, 1)
    ]
    all_runs += [made("po", "sgd", 0, status="diverged"), made("npo", "adam", 0, source="hub")]
    for number, found in enumerate(all_runs):
        (folder / str(number)).mkdir(parents=True)
        results.write(folder / str(number), found)
    return folder


def executed(path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, then: str = "") -> nbformat.NotebookNode:
    """The notebook after it ran on `runs`, and after it a cell with the code `then`."""
    monkeypatch.setenv("SOUL_EXP_RUNS", str(runs))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("SOUL_EXP_FIGURE", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(then))
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ANALYSIS)}}
    ).execute()
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_a_table_and_a_figure(path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {found for found in ANALYSIS.rglob("*") if ".ipynb_checkpoints" not in found.parts}
    notebook = executed(path, runs, monkeypatch)
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in data for data in shown) == 1
    text = "\n".join(data["text/markdown"] for data in shown if "text/markdown" in data)
    assert "| sophia" in text and "DIVERGED" in text and f"\n{text}".count("\n### ") == 2
    assert {
        found for found in ANALYSIS.rglob("*") if ".ipynb_checkpoints" not in found.parts
    } == before  # saves nothing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def trial(lr: float, forget: float | None, retain: float | None, chosen: bool = False) -> dict[str, object]:
    """A trial as results.json holds it; without numbers it diverged."""
    metrics = {"validation_log10_forget_quality": forget, "validation_retain_probability": retain}
    why = "loss 99" if forget is None else None
    return {
        "lr": lr,
        "gamma": 10.0,
        "metrics": metrics,
        "diverged": why,
        "num_steps": 10,
        "seconds": 1.0,
        "chosen": chosen,
    }


def test_the_ablation_figure_has_each_trial_once_the_chosen_ringed_and_the_cells_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = {
        0.1: [trial(1e-4, -10.0, 0.9), trial(1e-3, -4.0, 0.8, chosen=True), trial(1e-2, None, None)],
        10: [trial(1e-4, -9.0, 0.9), trial(1e-3, -3.0, 0.7, chosen=True)],
    }
    reported = {(0.1, 0): -6.0, (0.1, 1): -8.0, (10, 0): -1.0, (10, 1): -2.0, (10, 2): -50.0}  # the last diverged
    for (rho, seed), quality in reported.items():
        base = made("npo", "sophia", seed, status="diverged" if quality == -50 else "finished")
        lr = next(one["lr"] for one in tried[rho] if one["chosen"])
        run = replace(
            base,
            tuned="validation part, 3 trials a cell: the best that keeps enough (keep=0.75)",
            config={**base.config, "optimizer": {"rho": rho, "lr": lr}, "loss": {"gamma": 10.0}},
            metrics={**base.metrics, "unlearned": {**base.metrics["unlearned"], "log10_forget_quality": quality}},
            training={"win_rate": 0.25 if rho == 0.1 else 0.75, "m_norm": 0.5},
            trials=tried[rho],
        )
        run.metrics["original"]["validation_retain_probability"] = 0.8
        (tmp_path / f"{rho}-{seed}").mkdir()
        results.write(tmp_path / f"{rho}-{seed}", run)

    code = """import json
left, right = figure.axes
clouds = {one.get_label(): one.get_offsets().tolist() for one in left.collections}
drawn = [point for name, points in clouds.items() if name not in ("chosen", "diverged") for point in points]
lines = [line.get_label() for line in left.lines]
means = [one.get_segments()[0][0][0] for one in right.collections if hasattr(one, "get_segments")]
cells = [label.get_text() for label in right.get_yticklabels()]
end = ends.loc[[("0.1", "finished"), ("10", "finished")], "training.win_rate"].tolist()
print(json.dumps([drawn, clouds["chosen"], lines, left.get_title(), cells, means, right.get_ylabel(), end]))"""
    notebook = executed(ANALYSIS / "ablations.ipynb", tmp_path, monkeypatch, code)
    printed = "".join(output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout")
    drawn, ringed, lines, title, cells, means, varied, win_rates = json.loads(printed)
    assert sorted(map(tuple, drawn)) == [(0.7, -3.0), (0.8, -4.0), (0.9, -10.0), (0.9, -9.0)]
    assert sorted(map(tuple, ringed)) == [(0.7, -3.0), (0.8, -4.0)]
    assert lines == ["the rule's line: 0.600"]  # 0.75 of 0.8
    assert "tried: 5 trials, 1 without numbers" in title
    assert cells == ["0.1", "10"] and means == [-7.0, -1.5] and varied == "optimizer.rho"  # best on top
    assert win_rates == [0.25, 0.75]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", sorted((ANALYSIS / "published").glob("*.csv")), ids=lambda path: path.stem)
def test_every_published_number_has_a_source(path: Path) -> None:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["source"].strip() and math.isfinite(float(row["value"])) for row in rows)
