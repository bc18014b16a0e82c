"""Run folders as console output, Markdown tables and data frames."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from markdown_it import MarkdownIt
from omegaconf import OmegaConf

from soul_exp import results, tables
from soul_exp.errors import UsageError
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.scale import Scale
from soul_exp.report import console, labels
from soul_exp.results import Results

TASKS = Path(__file__).parents[1] / "conf" / "task"
ATTACKS = OmegaConf.load(TASKS.parent / "metrics" / "membership.yaml").metrics
METRICS = {task: {**OmegaConf.load(TASKS / f"{task}.yaml").metrics, **ATTACKS} for task in ("tofu", "custom")}
CAPTION = "TOFU (embedded): 4 of 24 authors forgotten, 18 retained, 2 held out"
ORIGINAL = {
    "forget_quality": 1e-30, "log10_forget_quality": -30.0, "utility": 0.8, "mia_auc": 1.0,
    "forget_probability": 0.9, "forget_rouge": 0.95, "retain_probability": 0.85, "holdout_probability": 0.01,
}  # fmt: skip
UNLEARNED = {
    "forget_quality": 0.01, "log10_forget_quality": -2.0, "utility": 0.6, "mia_auc": 0.7,
    "forget_probability": 0.2, "forget_rouge": 0.3, "retain_probability": 0.75, "holdout_probability": 0.02,
}  # fmt: skip
RETRAINED = {
    "forget_quality": 1.0, "log10_forget_quality": 0.0, "utility": 0.78, "mia_auc": 0.4,
    "forget_probability": 0.05, "forget_rouge": 0.2, "retain_probability": 0.84, "holdout_probability": 0.015,
}  # fmt: skip


SUITE = {"boolean": {"acc": 0.75, "acc_norm": 0.5, "acc_stderr": 0.1, "n": 24.0}, "text": {"word_perplexity": 31.5}}


def made(
    loss: str = "npo",
    optimizer: str = "adam",
    seed: int = 0,
    *,
    metrics: Mapping[str, float | None] = UNLEARNED,
    original: Mapping[str, float | None] | None = ORIGINAL,
    retrained: Mapping[str, float | None] | None = RETRAINED,
    source: str = "embedded",
    stages: tuple[str, ...] = ("prepare", "unlearn", "evaluate"),
    suite: str = "none",
    limit: int | None = None,
    **train: Any,
) -> Results:
    """Results as a run of TOFU writes them, without what no table reads."""
    choices = {
        "model": "tiny", "task": "tofu", "loss": loss, "optimizer": optimizer, "compute": "cpu", "precision": "fp32",
    }  # fmt: skip
    config = {
        "task": {"source": source, "metrics": {name: METRICS["tofu"].get(name, {}) for name in metrics}},
        "optimizer": {"lr": {"adam": 1e-4, "sgd": 1e-2}.get(optimizer, 1e-3), "betas": [0.9, 0.95]},
        "train": {"epochs": 5, **train},
        "seed": seed,
        "cache": f"/somewhere/{seed}",
        "stages": list(stages),
        "choices": choices,
        "utility_suite": suite,
        "utility_limit": limit,
        "utility_data": None,
    }
    models = {"unlearned": metrics, "original": original, "retrained": retrained}
    return Results(
        name="tofu",
        status="finished",
        reason=None,
        caption=CAPTION,
        choices=choices,
        tuned="validation",
        config=config,
        suite={} if suite == "none" else {model: SUITE for model, measured in models.items() if measured is not None},
        metrics={model: dict(measured) for model, measured in models.items() if measured is not None},
        reasons={},
        training={"win_rate": 0.25, "effective_update": 0.5},
        num_steps=50,
        seconds={"prepare": 3.0, "unlearn": 2.0, "evaluate": 1.0},
        peak_memory_gib=0.5,
        seeds={"seed": seed, "prepare.seed": 0},
        data_hashes={"part.forget": "abc"},
        commit="0123456789abcdef0123456789abcdef01234567",
        versions={"torch": "2.9.9"},
    )


def left(folder: Path, **runs: Results) -> Path:
    """`folder` with one run folder for each of `runs`."""
    for name, found in runs.items():
        (folder / name).mkdir(parents=True)
        results.write(folder / name, found)
    return folder


def cells(text: str) -> list[list[dict[str, str]]]:
    """Each comparison in Markdown as a list of rows: column -> cell without its mark, of all tables by group."""
    return [rows_of(part) for part in re.split("^### ", text, flags=re.M) if "| status" in part]


def rows_of(part: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for table in tables_in(part):
        if "status" in table[0]:
            rows = rows or [{} for _ in table]
            before = len(rows) - len(table)  # the table of costs has no row of the original model
            merged = [{**row, **(table[place - before] if place >= before else {})} for place, row in enumerate(rows)]
            rows = [{key: cell.strip("*").removesuffix(" ≈") for key, cell in row.items()} for row in merged]
    return rows


def tables_in(text: str) -> list[list[dict[str, str]]]:
    """Each Markdown table in `text` as a list of rows: column -> cell."""
    found: list[list[dict[str, str]]] = []
    head: list[str] = []
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = row
            found.append([])
        elif set(row[0]) != {"-"}:
            found[-1].append(dict(zip(head, row, strict=True)))
    return found


def called(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "soul_exp.tables", *map(str, args)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)


# ---- one run


def test_comparison_sets_before_after_and_retrained_side_by_side() -> None:
    text = console.comparison(made())
    lines = {line.strip().split("  ")[0]: line.split() for line in text.splitlines()}
    assert text.startswith(CAPTION)
    assert lines["before"] == ["before", "after", "retrained"]
    assert lines["log10 forget quality"][3:6] == ["-30.0", "-2.000", "0.000"]
    assert "higher is better" in next(line for line in text.splitlines() if line.startswith("model utility"))
    assert "retrained = target value" in next(line for line in text.splitlines() if line.startswith("MIA AUC"))
    kept = next(line for line in text.splitlines() if "share of before" in line)
    assert "75.0 %" in kept and "97.5 %" in kept  # 0.6 / 0.8 and 0.78 / 0.8
    assert text.splitlines()[-1] == (
        "prepare 3.000 s, unlearn 2.000 s, evaluate 1.000 s; 50 steps; win_rate 0.250, effective_update 0.500"
    )


def test_the_input_based_baseline_is_a_column_beside_the_others_in_100_columns() -> None:
    names = {**UNLEARNED, "validation_log10_forget_quality": -2.0, "validation_retain_probability": 0.5}
    run = made(metrics=names)
    text = console.comparison(replace(run, metrics={**run.metrics, "input_based": {**ORIGINAL, "utility": 0.4}}))
    lines = text.splitlines()
    assert max(map(len, lines)) <= console.WIDTH
    assert next(line for line in lines if "before" in line).split() == ["before", "input-based", "after", "retrained"]
    assert next(line for line in lines if line.startswith("model utility")).split()[2:6] == [
        *("0.800", "0.400", "0.600", "0.780"),
    ]
    assert "50.0 %" in next(line for line in lines if "share of before" in line)


def test_the_input_based_baseline_is_a_row_after_the_original_and_a_column_of_load(tmp_path: Path) -> None:
    """Also if only some runs measured it; all stand in one table."""
    with_it = made(seed=1)
    with_it = replace(with_it, metrics={**with_it.metrics, "input_based": {**ORIGINAL, "mia_auc": 0.9}})
    folder = left(tmp_path, first=made(), second=with_it)
    (rows,) = cells(tables.table(folder))
    assert [row["loss"] for row in rows] == ["original", "input-based", "retrained", "npo"]
    assert rows[1]["MIA AUC →"] == "0.900" and rows[1]["Δ (retrained − MIA AUC)"] == "-0.500"
    assert rows[3]["n"] == "2"
    frame = tables.load(folder)
    assert frame["input_based.mia_auc"].dropna().tolist() == [0.9] and len(frame) == 2


def test_details_of_membership_attacks_are_counted_on_the_console_and_a_column_only_where_they_are_named(
    tmp_path: Path,
) -> None:
    attacks = {"mia_zlib_auc": 0.61, "mia_zlib_tpr_1": 0.05, "muse_privleak": -75.0, "privleak": 50.0, "s_mia": 0.25}
    run = made(metrics={**UNLEARNED, **attacks}, original=None, retrained=None)
    text = console.comparison(run)
    lines = {line[:28].rstrip(): line.split() for line in text.splitlines()}
    assert lines["  zlib AUC" if "  zlib AUC" in lines else "mia zlib AUC"][-1] == "0.610"
    assert lines["PrivLeak %"][2] == "50.0" and lines["s_MIA"][1] == "0.250"
    assert "2 more metrics are in results.json" in text and "0.050" not in text and "-75" not in text
    folder = left(tmp_path, first=run)
    ((*_, row),) = cells(tables.table(folder))
    assert {"MIA AUC →", "s_MIA ↑", "PrivLeak % →"} <= set(row) and not [title for title in row if "zlib" in title]
    ((*_, row),) = cells(tables.table(folder, ["mia_zlib_auc", "mia_zlib_tpr_1"]))
    assert row["mia zlib AUC →"] == "0.610" and row["mia zlib TPR at 1 % →"] == "0.050"
    assert tables.load(folder)["muse_privleak"].tolist() == [-75.0]


def test_comparison_has_the_headline_first_and_then_each_probe_together() -> None:
    scrambled = dict(reversed(UNLEARNED.items()))
    text = console.comparison(made(metrics=scrambled, original=None, retrained=None))
    labels = [line[:30].rstrip() for line in text.splitlines()[5:]]
    assert labels[:4] == ["log10 forget quality", "forget quality", "model utility", "MIA AUC"]
    at = labels.index("forget")
    assert sorted(labels[at + 1 : at + 3]) == ["  ROUGE", "  probability"]


def test_a_null_is_a_dash_and_its_reason_stands_below() -> None:
    reason = (
        "the task has no holdout, because every author of it was trained on, and so there is nothing to compare with"
    )
    with_null = {**UNLEARNED, "mia_auc": None}
    text = console.comparison(replace(made(metrics=with_null), reasons={"mia_auc": reason}))
    row = next(line for line in text.splitlines() if line.startswith("MIA AUC"))
    assert row.split()[2:5] == ["1.000", "—", "0.400"]
    assert f"— MIA AUC (after): {reason}" in " ".join(text.splitlines())


def test_a_metric_that_no_model_has_is_named_with_its_reason_and_has_no_row_or_column(tmp_path: Path) -> None:
    without: dict[str, Any] = {name: None for name in ("mia_auc", "holdout_probability")}
    run = made(metrics={**UNLEARNED, **without}, original={**ORIGINAL, **without}, retrained={**RETRAINED, **without})
    run = replace(run, reasons=dict.fromkeys(without, "no 100 % unseen text"))
    text = console.comparison(run)
    assert not any(line.lstrip().startswith(("MIA AUC", "holdout")) for line in text.splitlines())
    assert "not measured: MIA AUC, holdout probability: no 100 % unseen text\n" in text
    folder = left(tmp_path, a=run, b=replace(run, notes=["x"]))
    table = tables.table(folder)
    assert not any("MIA AUC" in title for title in cells(table)[0][0])
    assert table.count("- not measured: MIA AUC: no 100 % unseen text\n") == 1
    requested = tables.table(folder, ["mia_auc", "holdout_probability"])
    assert cells(requested)[0][0]["MIA AUC →"] == "—" and "- — MIA AUC, holdout probability: no 100 %" in requested


def test_without_a_retrained_model_the_difference_to_it_has_no_column(tmp_path: Path) -> None:
    table = tables.table(left(tmp_path, a=made(retrained=None)))
    assert "MIA AUC →" in cells(table)[0][0] and "| Δ" not in table
    assert "- not measured: Δ (retrained − MIA AUC): no run has the retrained model's\n" in table


def test_a_note_of_several_runs_is_listed_once_with_the_range_of_its_numbers(tmp_path: Path) -> None:
    def noted(number: int) -> results.Results:
        notes = [f"kept 0.{number} of checkpoint-5", *(["only 7"] * (number < 5)), *(["rare"] * (number > 3))]
        return replace(made(seed=number), notes=notes)

    table = tables.table(left(tmp_path, **{f"run{number}": noted(number) for number in range(1, 6)}))
    assert "\n- kept 0.1 to 0.5 of checkpoint-5 (all runs)\n" in table
    assert "\n- only 7 (4 of 5 runs, see table.csv)\n" in table and "\n- rare (`run4`, `run5`)\n" in table
    assert tables.load(tmp_path)["notes"][4] == "['kept 0.5 of checkpoint-5', 'rare']"


def test_comparison_of_a_measured_checkpoint_has_one_column_called_model() -> None:
    text = console.comparison(made(original=None, retrained=None, stages=("evaluate",)))
    assert "before" not in text and "after" not in text and "retrained" not in text and "untuned" not in text
    assert any(line.split() == ["model"] for line in text.splitlines())


def test_comparison_shows_the_metrics_of_any_task_in_their_order() -> None:
    text = console.comparison(made(metrics={"toxicity": 0.25, "perplexity": 12.34}, original=None, retrained=None))
    assert text.index("toxicity") < text.index("perplexity") and "12.3" in text


def test_comparison_states_divergence_and_missing_tuning() -> None:
    text = console.comparison(replace(made(), status="diverged", reason="retain loss 80 exceeds 50", tuned=None))
    assert "*** DIVERGED: retain loss 80 exceeds 50 ***" in text
    assert "untuned" in text


INTERVALS = {
    "unlearned": {"log10_forget_quality": None, "utility": [0.5512, 0.64], "forget_rouge": [0.0, 0.61]},
    "original": {"utility": [0.75, 0.85], "forget_rouge": None},
    "retrained": {"utility": None},
}
SAMPLES = {
    "forget": {"examples": 60, "units": 12}, "retain": {"examples": 40, "units": 8},
    "facts": {"examples": 32, "units": 32}, "validation_forget": {"examples": 20, "units": 12},
}  # fmt: skip
TEST = "a p-value is a test"
OVER = "[low, high]: 95 % interval over authors (forget 12, retain 8) and items (facts 32)"


def with_intervals(**given: Any) -> Results:
    return replace(
        made(**given), intervals=INTERVALS, samples=SAMPLES, unit="author", no_interval={"log10_forget_quality": TEST}
    )


@pytest.mark.parametrize("input_based", [False, True])
def test_comparison_shows_the_intervals_of_the_unlearned_model_in_100_columns(input_based: bool) -> None:
    """With a fourth column there is room for them, but for arrows only beside them."""
    run = with_intervals()
    run = replace(run, metrics={**run.metrics, "input_based": ORIGINAL}) if input_based else run
    lines = console.comparison(run).splitlines()
    assert max(map(len, lines)) <= console.WIDTH
    row = next(line for line in lines if line.startswith("model utility"))
    assert "0.800" in row and "0.600 [0.551, 0.640]" in row and "0.75" not in row
    assert next(line for line in lines if line.startswith("log10 forget quality, n=60")).split()[5] != "["
    assert OVER in lines and f"no interval: log10 forget quality: {TEST}" in lines
    assert any(line.startswith("↑ higher is better, ↓ lower") for line in lines) == input_based
    assert row.endswith("↑" if input_based else "higher is better")


def test_comparison_and_headline_state_what_collapsed() -> None:
    ruined = {"forget": "share of degenerate answers 0.95 (retrained 0.00)"}
    run = replace(made(), collapsed=ruined, forget_quality=0.01)
    text = " ".join(console.comparison(run).split())
    assert "*** COLLAPSED: the model's free answers are those of a ruined one *** forget: share of degenerate" in text
    assert console.headline(run).startswith("COLLAPSED, forget quality 0.010")
    assert "COLLAPSED" not in console.comparison(replace(made(), collapsed={})) + console.headline(made())
    unknown = console.comparison(replace(made(), reasons={"collapsed": "no probe has 20 free answers"}))
    assert "— whether it collapsed: no probe has 20 free answers" in unknown


def test_the_cell_of_a_single_run_has_its_interval_and_that_of_several_their_spread(tmp_path: Path) -> None:
    single, several = left(tmp_path / "a", one=with_intervals()), tmp_path / "b"
    left(several, one=with_intervals(), two=with_intervals(seed=1))
    (rows,) = cells(tables.table(single))
    assert [row["model utility ↑"] for row in rows] == ["0.800 [0.750, 0.850]", "0.780", "0.600 [0.551, 0.640]"]
    assert rows[-1]["log10 forget quality ↑"] == "-2.000" and f"- {OVER}" in tables.table(single)
    tested = left(tmp_path / "c", one=replace(with_intervals(), forget_quality=0.01))
    assert "- forget quality tests n=60 answers" in tables.table(tested)
    (rows,) = cells(tables.table(several))
    # the seeds agree; both have the interval of the same authors, which a second seed does not make more certain
    assert rows[-1]["model utility ↑"] == "0.600 [0.551, 0.640]"
    frame = tables.load(single)
    assert frame["utility.low"].tolist() == [0.5512] and frame["original.utility.high"].tolist() == [0.85]


def test_a_collapsed_run_is_marked_in_its_row_and_explained_below(tmp_path: Path) -> None:
    ruined = {"forget": "share of the commonest answer 1.00 (retrained 0.03)"}
    runs = {f"seed{seed}": replace(made(seed=seed), collapsed=ruined if seed < 2 else {}) for seed in range(3)}
    text = tables.table(left(tmp_path / "a", **runs))
    assert cells(text)[0][-1]["status"] == "finished, 2 of 3 collapsed"
    assert f"- COLLAPSED: `seed1`: forget: {ruined['forget']}" in text and "`seed2`: forget" not in text
    one = tables.table(left(tmp_path / "b", one=runs["seed0"]))
    assert cells(one)[0][-1]["status"] == "finished, COLLAPSED"
    assert tables.load(tmp_path / "a")["collapsed"].tolist() == [True, True, False]


def test_requests_in_sequence_show_intervals_and_what_collapsed(tmp_path: Path) -> None:
    runs = {"request-1": with_intervals(), "request-2": replace(made(), collapsed={"forget": "ruined"})}
    text = tables.table(left(tmp_path, **runs))
    assert "0.600 [0.551, 0.640]" in text and f"- {OVER}" in text and "- COLLAPSED: `request-2`: forget: ruined" in text


@pytest.mark.parametrize("broken", [
    {"intervals": {"unlearned": {"utility": [0.5]}}}, {"intervals": {"unlearned": {"utility": ["a", "b"]}}},
    {"samples": {"forget": {"examples": 3}}}, {"collapsed": ["forget"]},
])  # fmt: skip
def test_intervals_samples_and_collapses_of_another_form_are_broken(broken: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a results file of format 1"):
        results.read(left(tmp_path, one=replace(made(), **broken)) / "one")


def politeness(answers: Answers) -> float:
    """A user's own metric, without a declaration."""
    return float(len(answers))


@Scale("lower", 0, 1, "points")
def rudeness(answers: Answers) -> float:
    """A user's own metric, with one."""
    return float(len(answers))


@pytest.mark.parametrize(
    ("entry", "direction"),
    [
        ({"_target_": "soul_exp.metrics.tofu.probability", "answers": "retain"}, "higher"),
        ({"_target_": "soul_exp.metrics.tofu.probability", "answers": "validation_retain"}, "higher"),
        ({"_target_": "soul_exp.metrics.tofu.probability", "answers": "forget"}, "nearest"),
        ({"_target_": "soul_exp.metrics.tofu.rouge", "answers": "forget_100"}, "nearest"),
        ({"_target_": "soul_exp.metrics.tofu.rouge", "answers": "holdout"}, "nearest"),
        ({"_target_": "soul_exp.metrics.tofu.probability", "answers": "a_probe_of_the_users"}, None),
        ({"_target_": "soul_exp.metrics.general.perplexity", "answers": "general"}, "lower"),
        ({"_target_": "soul_exp.metrics.membership.mia_auc", "k": 0.2, "holdout": "prompts"}, "nearest"),
        ({"_target_": "soul_exp.metrics.suite.perplexity"}, "lower"),
        ({"_target_": "soul_exp.metrics.general.choice_accuracy"}, "higher"),  # of older results, removed since
        ({"_target_": "test_tables.rudeness", "answers": "retain"}, "lower"),
        ({"_target_": "test_tables.rudeness", "answers": "forget"}, "nearest"),
        ({"_target_": "test_tables.politeness", "answers": "retain"}, None),
        ({"_target_": "not_installed.on.this.machine", "answers": "retain"}, None),
        ({}, None),
    ],
)
def test_a_direction_follows_from_the_declaration_and_the_probe(entry: dict[str, Any], direction: str | None) -> None:
    """Never from the metric's name: here all are called utility, of which more is better."""
    run = made(metrics={"utility": 0.5}, original=None)
    run.config["task"]["metrics"] = {"utility": entry}
    assert labels.declared(run.config["task"]["metrics"], "utility")[1] == direction
    line = next(line for line in console.comparison(run).splitlines() if line.startswith("model utility"))
    hints = {"higher": "higher is better", "lower": "lower is better", "nearest": "retrained = target value"}
    assert line.endswith(hints[direction] if direction else "0.780")


def test_nothing_is_compared_with_a_retrained_model_that_was_not_measured() -> None:
    text = console.comparison(made(retrained=None))
    assert "higher is better" in text and "target value" not in text


def test_a_unit_stands_after_the_name_of_its_metric() -> None:
    run = made(metrics={"rudeness": 0.5}, original=None, retrained=None)
    run.config["task"]["metrics"] = {"rudeness": {"_target_": "test_tables.rudeness", "answers": "retain"}}
    assert any(line.startswith("rudeness points ") for line in console.comparison(run).splitlines())


def test_comparison_is_at_most_100_columns_wide() -> None:
    long = {f"probe_{'long_' * 12}{i}": 0.5 for i in range(3)} | {"authors_truth_ratio": None}
    text = console.comparison(replace(made(metrics=long, original=long, retrained=long), caption="word " * 60))
    assert max(map(len, text.splitlines())) <= 100


# ---- many runs


def test_seeds_are_aggregated_to_mean_and_t_interval(tmp_path: Path) -> None:
    runs = {f"s{seed}": made(seed=seed, metrics={**UNLEARNED, "utility": 0.4 + 0.1 * seed}) for seed in range(3)}
    (rows,) = cells(tables.table(left(tmp_path, **runs)))
    assert [row["loss"] for row in rows] == ["original", "retrained", "npo"]
    # mean of 0.4, 0.5, 0.6; standard error 0.1 / sqrt(3); t of 2 degrees of freedom 4.303: 0.2484
    assert rows[2]["model utility ↑"] == "0.500 [0.252, 0.748]"
    assert rows[2]["n"] == "3"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((3.04e38, "3.0e+38"), (1e7, "1.0e+07"), (75470.2, "75470"), (26.44, "26.4"), (0.2644, "0.264")),
        *((2.1e-5, "2.1e-05"), (-34.66, "-34.7"), (0.0, "0.000"), (-0.0, "0.000"), (None, labels.NULL)),
    ],
)
def test_a_number_has_the_digits_that_suit_its_size(value: float | None, shown: str) -> None:
    assert labels.number(value) == shown


def test_one_seed_is_a_number_without_interval(tmp_path: Path) -> None:
    (rows,) = cells(tables.table(left(tmp_path, only=made())))
    assert (rows[2]["model utility ↑"], rows[2]["n"], rows[2]["steps"]) == ("0.600", "1", "50")


def test_delta_is_the_retrained_auc_minus_the_models(tmp_path: Path) -> None:
    (rows,) = cells(tables.table(left(tmp_path, only=made())))
    assert [row["Δ (retrained − MIA AUC)"] for row in rows] == ["-0.600", "0.000", "-0.300"]


def test_a_null_seed_is_left_out_of_the_mean_and_the_cell_gives_n(tmp_path: Path) -> None:
    with_null = replace(made(seed=2, metrics={**UNLEARNED, "utility": None}), reasons={"utility": "no facts"})
    text = tables.table(left(tmp_path, a=made(seed=0), b=made(seed=1), c=with_null))
    assert cells(text)[0][2]["model utility ↑"] == "0.600 (n=2)"
    assert "- — model utility: no facts" in text


def test_a_repeated_seed_is_not_counted_twice(tmp_path: Path) -> None:
    text = tables.table(left(tmp_path, a=made(), b=made()))
    assert cells(text)[0][2]["n"] == "1"
    assert text.count("one result in several folders, counted once: `a` = `b`") == 1


def test_only_keys_that_differ_and_that_no_choice_implies_are_columns(tmp_path: Path) -> None:
    runs = {"a": made(epochs=5), "b": made(epochs=10), "c": made(optimizer="sgd", epochs=5)}
    (rows,) = cells(tables.table(left(tmp_path, **runs)))
    assert list(rows[0])[:3] == ["loss", "optimizer", "train.epochs"]  # optimizer.lr goes with the optimizer
    assert [(r["optimizer"], r["train.epochs"]) for r in rows[2:]] == [("adam", "5"), ("adam", "10"), ("sgd", "5")]


def test_a_swept_learning_rate_is_a_column(tmp_path: Path) -> None:
    other = made()
    other = replace(other, config={**other.config, "optimizer": {"lr": 3e-5, "betas": [0.9, 0.95]}})
    (rows,) = cells(tables.table(left(tmp_path, a=made(), b=other)))
    assert [row["optimizer.lr"] for row in rows[2:]] == ["3e-05", "0.0001"]


def test_an_option_of_the_loss_is_a_column_even_if_it_follows_another_choice(tmp_path: Path) -> None:
    runs = {}
    for optimizer, gamma in (("adam", 1.0), ("sgd", 10.0)):
        found = made(optimizer=optimizer)
        runs[optimizer] = replace(found, config={**found.config, "loss": {"gamma": gamma}})
    (rows,) = cells(tables.table(left(tmp_path, **runs)))
    assert [(row["optimizer"], row["loss.gamma"]) for row in rows[2:]] == [("adam", "1"), ("sgd", "10")]


@pytest.mark.parametrize(
    "other",
    [
        replace(made(seed=1), caption="TOFU (embedded): 8 of 24 authors forgotten"),
        made(seed=1, source="hub"),
        replace(made(seed=1), data_hashes={"part.forget": "def"}),
        made(seed=1, original={**ORIGINAL, "utility": 0.81}),
        made(seed=1, retrained=None),
        replace(made(seed=1), config={**made(seed=1).config, "dialect": "muse"}),
        replace(made(seed=1), metric_versions={"mia_auc": 2}),
    ],
    ids=["caption", "source", "data", "original model", "retrained model", "dialect", "version of a metric"],
)
def test_runs_that_are_not_comparable_stand_in_separate_tables_that_say_why(tmp_path: Path, other: Results) -> None:
    folder = left(tmp_path, a=made(seed=0), b=other)
    text = tables.table(folder)
    assert [[row["n"] for row in rows if row["n"]] for rows in cells(text)] == [["1"], ["1"]]
    assert len(re.findall("^### ", text, flags=re.M)) == 2
    assert list(tables.load(folder)["table"]) == [1, 2]
    (why,) = re.findall(r"^- NOT COMPARABLE with the table of `a`: (.*?) there", text, flags=re.M) or ["caption"]
    differs = {
        "caption": "caption", "source: 'embedded'": "source", "hash of the data's part.forget: 'abc'": "data",
        "utility of the original model: '0.8'": "original model", "dialect: 'ours'": "dialect",
        "compared models: ['original', 'retrained']": "retrained model", "version of mia_auc: 'unknown'": "version",
    }  # fmt: skip
    assert why in differs and (why == "caption") == (other.caption != CAPTION)


@pytest.mark.parametrize(
    ("dialect", "test"),
    [
        ("ours", "a two-sample KS test against the retrained model"),
        ("soul_release", "a two-sample KS test of the model's forget answers against its own retain answers"),
        ("of a later version", "the test of the dialect of a later version"),
    ],
)
def test_the_caption_says_which_test_forget_quality_is_in_its_dialect(tmp_path: Path, dialect: str, test: str) -> None:
    text = tables.table(left(tmp_path, a=replace(made(), config={**made().config, "dialect": dialect})))
    assert re.findall(r"Forget quality is the p-value of (.*?); its mean over runs is geometric\.", text) == [test]


def test_a_run_with_one_metric_more_stays_in_its_table(tmp_path: Path) -> None:
    """The mean of that metric is over the runs that have it, and its cell says so."""
    more = made(seed=1, metrics={**UNLEARNED, "facts_rouge": 0.5})
    (rows,) = cells(tables.table(left(tmp_path, a=made(), b=more), ["utility", "facts_rouge"]))
    assert [(row["model utility ↑"], row["facts ROUGE ↑"], row["n"]) for row in rows[2:]] == [
        ("0.600", "0.500 (n=1)", "2")
    ]
    assert list(tables.load(tmp_path)["table"]) == [1, 1] and list(rows[0])[:2] == ["loss", "optimizer"]


def test_options_that_differ_between_tables_stand_above_each(tmp_path: Path) -> None:
    runs = {}
    for epochs in (3, 12):
        found = made(original={**ORIGINAL, "utility": epochs / 20})
        runs[f"p{epochs}"] = replace(found, config={**found.config, "prepare": {"epochs": epochs}})
    text = tables.table(left(tmp_path, **runs))
    assert "prepare.epochs 3" in text and "prepare.epochs 12" in text


def test_a_diverged_run_keeps_a_row_and_stays_out_of_the_mean(tmp_path: Path) -> None:
    lost = replace(made(seed=1, metrics={**UNLEARNED, "utility": 0.0}), status="diverged", reason="loss 99")
    text = tables.table(left(tmp_path, fine=made(), lost=lost))
    rows = cells(text)[0][2:]
    assert [(row["status"], row["n"], row["model utility ↑"]) for row in rows] == [
        ("finished, 1 of 2 diverged", "1", "0.600"),
        ("DIVERGED", "1", "0.000"),
    ]
    assert "DIVERGED: `lost`: loss 99" in text


def test_a_null_of_the_original_model_has_its_reason_under_the_table(tmp_path: Path) -> None:
    run = made(original={**ORIGINAL, "utility": None})
    text = tables.table(left(tmp_path, a=replace(run, reasons={"original.utility": "its value is inf"})))
    assert "— model utility of the original model: its value is inf" in text


def test_an_untuned_combination_is_marked(tmp_path: Path) -> None:
    (rows,) = cells(tables.table(left(tmp_path, a=replace(made(), tuned=None), b=made(loss="po"))))
    assert {row["loss"]: row["status"] for row in rows[2:]} == {"npo": "finished, untuned", "po": "finished"}


def test_a_measured_checkpoint_has_no_loss_and_no_optimizer(tmp_path: Path) -> None:
    text = tables.table(left(tmp_path / "a", a=made(stages=("evaluate",))))
    (rows,) = cells(text)
    assert text.startswith(f"### Checkpoints, measured as they are: {CAPTION}")
    assert [row["model"] for row in rows] == ["original", "retrained", "checkpoint"] and "loss" not in rows[0]
    assert (rows[2]["status"], "untuned" in text, "Tuned on" in text) == ("finished", False, False)
    (rows,) = cells(tables.table(left(tmp_path / "b", a=made(stages=("evaluate",)), b=made())))
    assert [(row["loss"], row["optimizer"]) for row in rows[2:]] == [("checkpoint", "—"), ("npo", "adam")]


def test_runs_without_results_are_listed_with_their_error(tmp_path: Path) -> None:
    folder = left(tmp_path, fine=made())
    (folder / "bad").mkdir()
    (folder / "bad" / "error.txt").write_text("train.batch_size=0: expected 1 or more\nand much more\n")
    (folder / "killed" / ".hydra").mkdir(parents=True)
    for hidden in ("fine/wandb/x", "fine/model/x", ".trash/x"):
        (folder / hidden).mkdir(parents=True)
        (folder / hidden / "error.txt").write_text("not a run")
        results.write(folder / hidden, made(seed=5))
    text = tables.table(folder)
    assert "- without results: `bad` (train.batch_size=0: expected 1 or more)\n" in text
    assert "- without results: `killed` (no error.txt" in text
    assert "not a run" not in text and list(tables.load(folder)["run"]) == ["fine"]


def test_runs_are_found_at_any_depth(tmp_path: Path) -> None:
    left(tmp_path / "x" / "y", deep=made())
    assert list(tables.load(tmp_path)["run"]) == ["x/y/deep"]


def test_commit_and_versions_stand_below_the_table(tmp_path: Path) -> None:
    later = replace(made(seed=1), commit="f" * 40 + "+changes")
    assert "- commit 0123456789, ffffffffff+changes; torch 2.9.9" in tables.table(left(tmp_path, a=made(), b=later))


def test_values_of_several_definitions_are_said_not_to_be_comparable(tmp_path: Path) -> None:
    old, new = {"task": 1, "mia_auc": 1}, {"task": 1, "mia_auc": 2}
    runs = {f"s{seed}": replace(made(seed=seed), metric_versions=old) for seed in range(2)}
    assert "NOT COMPARABLE" not in tables.table(left(tmp_path, **runs))
    more = {"s2": replace(made(seed=2), metric_versions=new), "s3": replace(made(seed=3), metric_versions={})}
    text = tables.table(left(tmp_path, **more))
    assert "NOT COMPARABLE with the table of `s0`: version of mia_auc: '1' there, '2' here\n" in text
    assert "NOT COMPARABLE with the table of `s0`: version of task: '1' there, 'unknown' here" in text
    assert [row["n"] for rows in cells(text) for row in rows if row["n"]] == ["2", "1", "1"]


def test_load_is_tidy_and_exact(tmp_path: Path) -> None:
    third = {**UNLEARNED, "utility": 1 / 3, "mia_auc": None}
    frame = tables.load(left(tmp_path, a=made(metrics=third), b=made(optimizer="sgd", seed=1)))
    assert list(frame["optimizer"]) == ["adam", "sgd"] and list(frame["config.optimizer.lr"]) == [1e-4, 1e-2]
    assert frame["utility"][0] == 1 / 3 and frame["original.utility"][0] == 0.8 and pd.isna(frame["mia_auc"][0])
    assert not {"config.train.epochs", "config.cache", "config.seed"} & set(frame)  # the same, or not of interest
    assert list(frame["seeds.seed"]) == [0, 1] and list(frame["training.win_rate"]) == [0.25, 0.25]


def test_columns_may_be_chosen_and_a_mistyped_one_is_an_error(tmp_path: Path) -> None:
    folder = left(tmp_path, a=made())
    (rows,) = cells(tables.table(folder, ["holdout_probability", "utility"]))
    assert list(rows[0])[2:4] == ["holdout probability →", "model utility ↑"]
    with pytest.raises(UsageError, match=r"no run has 'utilty', choose from .*utility"):
        tables.table(folder, ["utilty"])


def test_other_tasks_have_their_own_metrics_as_columns(tmp_path: Path) -> None:
    other = {"utility": 0.5, "forget_bleu": 30.0, "retain_perplexity": 4.0, "politeness": 0.1}
    run = made(metrics=other, original=None, retrained=None)
    task = {**run.config["task"], "metrics": {**METRICS["custom"], "politeness": {"_target_": "not.here"}}}
    (rows,) = cells(tables.table(left(tmp_path, a=replace(run, config={**run.config, "task": task}))))
    assert list(rows[0])[2:] == [
        *("forget BLEU →", "n", "status", "model utility ↑", "retain perplexity per token ↓", "politeness"),
        *("steps", "prepare seconds", "unlearn seconds", "evaluate seconds", "peak memory GiB", "win_rate"),
    ]
    order = ["Efficacy: what is forgotten", "Utility: what is kept", "Other numbers", "Cost"]
    assert re.findall("^#### (.*)$", tables.table(tmp_path), flags=re.M) == order


def test_the_table_of_costs_has_the_mean_passes_of_a_step_and_names_runs_without_them(tmp_path: Path) -> None:
    """Steps of other numbers make other shares of a curvature pass, so that seeds may differ."""
    sophia = [made(optimizer="sophia", seed=seed) for seed in (0, 1)]
    stated = [
        replace(run, passes={"forward": 1 + x, "backward": 1 + 2 * x})
        for x, run in zip((0.25, 0.75), sophia, strict=True)
    ]
    folder = left(tmp_path, a=stated[0], b=stated[1], mezo=replace(made("po"), passes={"forward": 2, "backward": 0}))
    (rows,) = cells(tables.table(folder))
    columns = [f"{kind} passes per step" for kind in ("forward", "backward")]
    assert [[row[column].split(" ")[0] for column in columns] for row in rows if row["n"]] == [
        ["1.500", "2.000"],
        ["2.000", "0.000"],
    ]
    assert not re.search("does not state", tables.table(folder))
    left(tmp_path, old=made("po", "sgd"), checkpoint=replace(made(stages=("evaluate",)), num_steps=0))
    text = tables.table(folder)
    assert "loss reads in a step. results.json does not state the passes: `old`." in text
    assert list(tables.load(folder)["passes.forward"].dropna()) == [1.25, 1.75, 2.0]
    left(tmp_path / "before", old=made())
    text = tables.table(tmp_path / "before")
    assert "passes per step" not in text and "mean step" not in text and "does not state the passes: `old`." in text


# ---- the command


def test_the_command_prints_what_it_writes_to_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left(tmp_path, a=made(), b=made(seed=1))
    (folder / "table.md").write_text("old")
    done = called(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 100  # few columns that fit; the last line names the folder
    assert done.stdout.splitlines()[2].split()[:4] == ["loss", "optimizer", "log10", "forget"]
    with (folder / "table.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["a", "b"]
    names = ["a", "b", "methods.csv", "table.csv", "table.md", "table.tex"]
    assert sorted(path.name for path in folder.iterdir()) == names  # nothing half-written
    for shown, name in (("markdown", "table.md"), ("latex", "table.tex"), ("csv", "methods.csv")):
        monkeypatch.setattr(sys, "argv", ["tables", str(folder), "--format", shown])
        tables.main()
        assert capsys.readouterr().out == (folder / name).read_text()
    assert "| npo" in (folder / "table.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a folder"),
        ({}, "has no runs"),
        ({"a/.hydra/x": ""}, "without results: a"),
        ({"a/results.json": "{"}, "a/results.json"),
        ({"a/results.json": "[]"}, "a/results.json"),
        ({"a/results.json": '{"name": "tofu"}'}, "a/results.json"),
        ({"a/results.json": "\udcff"}, "a/results.json"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    tmp_path: Path,
    content: dict[str, str] | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "runs"
    for name, text in (content or {}).items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    if content is not None:
        folder.mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "argv", ["tables", str(folder)])
    with pytest.raises(SystemExit) as end:
        tables.main()
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics", {"unlearned": None}), ("metrics", {}), ("notes", None), ("reasons", None), ("versions", None),
        ("commit", 5), ("data_hashes", None), ("trials", [{}]), ("num_steps", "2"), ("config", {"task": None}),
    ],
)  # fmt: skip
def test_a_results_file_with_a_field_of_another_type_is_broken(field: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    results.write(tmp_path / "a", made())
    path = tmp_path / "a" / results.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(UsageError, match=r"a/results\.json is not a results file of format 1 .*: remove it and run"):
        results.read(tmp_path / "a")
    path.write_text("[" * 100_000)
    with pytest.raises(UsageError, match="recursion"):
        results.read(tmp_path / "a")


def test_a_results_file_of_another_format_is_broken(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a/results\.json is not a results file of format 1 \(its format is 2"):
        tables.load(left(tmp_path, a=replace(made(), format=2)))


def test_help_names_the_files_and_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tables", "--help"])
    with pytest.raises(SystemExit, match="0"):
        tables.main()
    shown = capsys.readouterr().out
    assert "table.md" in shown and "table.tex" in shown and "methods.csv" in shown and "--metrics" in shown


# ---- the utility suite


def test_comparison_shows_the_main_measure_of_each_task_of_the_suite() -> None:
    text = console.comparison(made(suite="embedded"))
    lines = text.splitlines()
    start = lines.index("utility suite embedded")
    assert lines[start + 1].split() == "boolean acc 0.750 0.750 0.750 higher is better".split()
    assert lines[start + 2].split() == "text word perplexity 31.5 31.5 31.5 lower is better".split()
    assert "utility suite" not in console.comparison(made())


def test_runs_with_different_suites_or_limits_stand_in_different_tables(tmp_path: Path) -> None:
    folder = left(
        tmp_path, a=made(suite="embedded"), b=made(suite="embedded", optimizer="sgd"), c=made(),
        d=made(suite="embedded", limit=5), e=made(suite="paper"),
    )  # fmt: skip
    found = tables.load(folder)
    assert found.groupby("table")["run"].apply(list).tolist() == [["a", "b"], ["c"], ["d"], ["e"]]
    text = tables.table(folder)
    assert text.count("utility_suite paper") == 1 and len(re.findall("^### ", text, flags=re.M)) == 4
    assert "utility_suite embedded" in tables.table(left(tmp_path / "alone", a=made(suite="embedded")))


def test_the_suite_survives_a_round_trip_and_a_file_without_it_reads_as_none(tmp_path: Path) -> None:
    results.write(tmp_path, made(suite="embedded"))
    found = results.read(tmp_path)
    assert found is not None and found.suite["unlearned"]["boolean"]["acc"] == 0.75
    old = json.loads((tmp_path / "results.json").read_text())
    del old["suite"]
    for option in ("utility_suite", "utility_limit", "utility_data"):
        del old["config"][option]
    (tmp_path / "results.json").write_text(json.dumps(old))
    read = results.read(tmp_path)
    assert read is not None and read.suite == {} and read.config["utility_suite"] == "none"


HOSTILE = (
    "=cmd|' /C calc'!A0<img src=x onerror=alert(1)>\x1b[2J\n| new | row |\u202egnp [a](http://b) ![c](http://d)\x00\x9b"
    "\ud800"
)
INERT = "&lt;img src=x onerror=alert(1)>\\x1b[2J\\n"


def hostile(folder: Path) -> Path:
    """A folder of two runs in which every text that somebody else could have written is hostile."""
    for seed in (0, 1):
        run = made(seed=seed)
        choices = {**run.choices, "optimizer": HOSTILE, "model": f"{HOSTILE}{seed}"}
        config = {**run.config, "model": {HOSTILE: HOSTILE, "path": f"{HOSTILE}{seed}"}}
        texts: dict[str, Any] = dict.fromkeys(("caption", "tuned", "commit", "reason"), HOSTILE)
        texts |= {"notes": [HOSTILE], "reasons": {"utility": HOSTILE}, "versions": {HOSTILE: HOSTILE}}
        metrics = {**run.metrics, "unlearned": {**UNLEARNED, "utility": None}}
        changed = replace(run, **texts, choices=choices, config=config, status="diverged", metrics=metrics)
        out = folder / f"=run{seed}\x1b[31m<b>"
        out.mkdir()
        results.write(out, changed)
    failed = folder / "failed\n# heading"
    failed.mkdir()
    (failed / "error.txt").write_bytes(b"\x1b]0;title\x07<script>\xff")
    return folder


def test_texts_of_others_are_inert_in_the_table_on_the_terminal_and_in_a_spreadsheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tables", str(hostile(tmp_path)), "--format", "markdown"])
    tables.main()
    printed, written = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    assert printed == written and INERT in written and "failed\\n# heading" in written
    assert not [line for line in written.split("\n") if line.startswith(("| new", "# heading"))]
    assert "<" not in written and "](" not in written and labels.printable(written) == written
    lines = [line.replace("\\|", "") for line in written.split("\n") if line.startswith("|")]
    assert {len(tables_in("\n".join(of))) for of in (lines[:4], lines[-4:])} == {1}  # as many cells in each row
    text = (tmp_path / "table.csv").read_text()
    assert labels.printable(text) == text and "'=cmd|" in text
    cells = [cell for row in csv.reader(text.splitlines()) for cell in row]
    assert "\\x1b[2J\\n" in text and not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t"))]


TYPED = r"my_*run*_ `a` ``b`` __init__ 5*3*2 a_b_c \* \_x_ x\ $1$ ~~no~~ [l](u) <i> &lt; * end"


def read_as_markdown(line: str) -> tuple[str, set[str]]:
    """The text of a line as a reader of Markdown shows it, and what markup it has."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parseInline(line)[0].children or []
    return "".join(token.content for token in tokens), {token.type for token in tokens} - {"text", "text_special"}


def test_names_that_users_chose_are_shown_as_typed_and_are_no_markup(tmp_path: Path) -> None:
    """The name of a model in a row and above it, the name of a run in a note, and the caption."""
    names = ("a", TYPED, "<b>", "`x` _y_")
    runs = {name: replace(made(seed=seed), caption=TYPED) for seed, name in enumerate(names)}
    runs["a"] = replace(runs["a"], status="diverged", reason="loss 99")
    for place, name in enumerate(names):
        config = {**runs[name].config, "model": {"path": f"{place} {TYPED}"}}
        runs[name] = replace(runs[name], config=config, commit=f"{place}" * 40)
    text = tables.table(left(tmp_path, **runs))
    lines = text.split("\n")
    assert read_as_markdown(lines[0].removeprefix("### ")) == (TYPED, set())
    (rows,) = cells(text)
    shown = [read_as_markdown(row["model.path"].replace("\\|", "|"))[0] for row in rows if row["n"]]
    assert sorted(shown) == sorted(f"{place} {TYPED}" for place in range(4))
    (note,) = (line for line in lines if line.startswith("- DIFFERENT commit"))
    expected = f"DIFFERENT commit: 2222222222: `<b>`; 3333333333: `x` _y_; 0000000000: a; 1111111111: ``` {TYPED} ```"
    assert read_as_markdown(note.removeprefix("- ")) == (expected, {"code_inline"})


def test_a_run_of_somebody_else_is_inert_on_the_console() -> None:
    shown = labels.printable(console.comparison(replace(made(), caption=HOSTILE, notes=[HOSTILE])))
    assert "\\x1b[2J" in shown and not set("\x1b\x00\x9b\u202e\ud800") & set(shown)


def test_running_text_of_any_language_stays_as_it_is() -> None:
    for text in ("two\nlines\tand a tab", "क्\u200dष می\u200cخواهم \u3000全角 \u00a0é 😀", "a & b < c | d"):
        assert labels.printable(text) == text
    assert labels.on_one_line("a\r\nb\tc") == "a\\r\\nb\\tc"
