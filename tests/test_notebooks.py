"""Every notebook of analysis/ runs from beginning to end on the folders that runs leave."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_figures import attacked, trial, watched

from soul_exp import results
from soul_exp.results import Results

ROOT = Path(__file__).parents[1]
ANALYSIS = ROOT / "analysis"
NOTEBOOKS = sorted(ANALYSIS.glob("*.ipynb"))


def made(loss: str, optimizer: str, seed: int, source: str = "embedded", status: str = "finished") -> Results:
    """Results of a run whose numbers follow from its choices."""
    shift = 0.02 * seed + (0.1 if optimizer == "sophia" else 0.0) + (0.05 if loss == "npo" else 0.0)
    measured = {"utility": 0.5 + shift, "mia_auc": 0.6, "log10_forget_quality": -10 + 20 * shift}
    measured |= {"mia_loss_auc": 0.7, "mia_loss_tpr_10": 0.3, "prompts_jailbreak_rules": 0.25}
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of two losses, two optimizers and two seeds, one diverged, and of another source."""
    folder = tmp_path_factory.mktemp("runs")
    all_runs = [
        made(loss, optimizer, seed) for loss in ("npo", "po") for optimizer in ("adam", "sophia") for seed in (0, 1)
    ]
    all_runs += [made("po", "sgd", 0, status="diverged"), made("npo", "adam", 0, source="hub")]
    for number, found in enumerate(all_runs):
        (folder / str(number)).mkdir(parents=True)
        tried = [trial(lr, 10.0, -3.0, chosen=lr > 1e-4) for lr in (1e-4, 1e-3)]
        results.write(folder / str(number), replace(attacked(found, 0.1), trials=tried))
        watched(folder / str(number))
    return folder


@pytest.fixture(scope="module")
def executed(runs: Path) -> dict[str, list[nbformat.NotebookNode]]:
    """The cells of each notebook after they ran on `runs`: in one kernel, which forgets everything in between."""
    notebook, ends = nbformat.v4.new_notebook(), {}
    for path in NOTEBOOKS:
        start = len(notebook.cells)
        notebook.cells += [*nbformat.read(path, as_version=4).cells, nbformat.v4.new_code_cell("%reset -f")]
        ends[path.stem] = (start, len(notebook.cells))
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    execute(notebook, runs)
    return {name: notebook.cells[start:end] for name, (start, end) in ends.items()}


def execute(notebook: nbformat.NotebookNode, runs: Path) -> None:
    """Run the cells on the folder `runs`; they save nothing."""
    before = left_in_analysis()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOUL_EXP_RUNS", str(runs))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.delenv("MPLBACKEND", raising=False)
        where = {"metadata": {"path": str(ANALYSIS)}}
        NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    assert left_in_analysis() == before


def left_in_analysis() -> set[Path]:
    return {found for found in ANALYSIS.rglob("*") if ".ipynb_checkpoints" not in found.parts}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_a_table_and_figures_with_captions(
    path: Path, executed: dict[str, list[nbformat.NotebookNode]]
) -> None:
    outputs = [output for cell in executed[path.stem] for output in cell.get("outputs", ())]
    shown = [output.get("data", {}) for output in outputs]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    text = "\n".join(data["text/markdown"] for data in shown if "text/markdown" in data)
    assert "| sophia" in text and "DIVERGED" in text and text.count("\n### ") + text.startswith("### ") == 2
    assert sum("image/png" in data for data in shown) == printed.count("Seeds: ") > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_thin(path: Path) -> None:
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert 2 <= len(cells) <= 6 and sum(len(cell.splitlines()) for cell in cells) <= 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_each_table_of_the_paper_has_a_notebook() -> None:
    assert {"tofu", "copyright", "detox", "cost", "mia"} <= {path.stem for path in NOTEBOOKS}


def test_the_notebook_of_attacks_shows_every_auc_every_form_and_the_rates(
    executed: dict[str, list[nbformat.NotebookNode]],
) -> None:
    table, _, rates = (cell["outputs"] for cell in executed["mia"] if cell.get("outputs"))
    shown = table[0]["data"]["text/markdown"]
    assert "| MIA AUC" in shown and "| mia loss AUC" in shown and "| prompts jailbreak rules" in shown
    assert "mia_loss_tpr_10" in rates[0]["data"]["text/plain"]
