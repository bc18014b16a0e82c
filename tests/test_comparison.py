"""Which runs share a table, a row and a mean, in what order rows stand, and how methods are compared."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_tables import UNLEARNED, cells, left, made, tables_in

from soul_exp import results, tables
from soul_exp.errors import UsageError
from soul_exp.report import console, latex
from soul_exp.report.table import Cell, Column, Comparison, Row, Table
from soul_exp.results import Results

DIVERGED: dict[str, Any] = {"status": "diverged", "reason": "loss is nan"}


def with_config(run: Results, **sections: Any) -> Results:
    return replace(run, config={**run.config, **sections})


def methods_of(folder: Path) -> list[dict[str, str]]:
    """The rows of the only table, without those of the compared models."""
    (rows,) = cells(tables.table(folder))
    return [row for row in rows if row["n"]]


def notes_of(folder: Path) -> list[str]:
    return re.findall("^- (.*)$", tables.table(folder), flags=re.M)


# ---- what shares a mean


def test_runs_of_other_commits_code_or_libraries_share_a_row_that_says_so(tmp_path: Path) -> None:
    """Their metrics have the same definitions; that the numbers are the same is for the reader to judge."""
    later = replace(made(seed=1), commit="f" * 40 + "+changes", versions={"torch": "2.10", "scipy": "1.17"})
    folder = left(tmp_path / "a", a=replace(made(), versions={"torch": "2.9", "scipy": "1.17"}), b=later)
    assert [row["n"] for row in methods_of(folder)] == ["2"]
    assert [note for note in notes_of(folder) if note.startswith("DIFFERENT")] == [
        "DIFFERENT commit, also within a row: 0123456789: `a`; ffffffffff+changes: `b`",
        "DIFFERENT version of torch, also within a row: 2.9: `a`; 2.10: `b`",
    ]
    codes = [replace(made(seed=seed), sha256={"records": {}, "models": {}, "code": f"{seed}" * 64}) for seed in (0, 1)]
    folder = left(tmp_path / "b", a=codes[0], b=replace(codes[1], choices={**codes[1].choices, "optimizer": "sgd"}))
    assert [row["n"] for row in methods_of(folder)] == ["1", "1"]
    left(tmp_path / "machines", a=replace(made(), hardware="GPU A"), b=replace(made(seed=1), hardware="GPU B"))
    found = notes_of(tmp_path / "machines")
    assert "DIFFERENT hardware, also within a row: GPU A: `a`; GPU B: `b`" in found
    assert found[-1] == "commit 0123456789; GPU A; GPU B; torch 2.9.9"
    assert "DIFFERENT source code: SHA-256 0000000000: `a`; SHA-256 1111111111: `b`" in notes_of(folder)
    folder = left(tmp_path / "c", a=codes[0], b=replace(codes[0], commit="f" * 40, seeds={"seed": 1}))
    assert not [note for note in notes_of(folder) if note.startswith("DIFFERENT")]  # of documents, say


@pytest.mark.parametrize(("group", "column"), [("precision", "precision"), ("compute", "compute")])
def test_runs_of_another_precision_or_hardware_are_another_row(group: str, column: str, tmp_path: Path) -> None:
    run = made(seed=1)
    other = replace(run, choices={**run.choices, group: "other"})
    rows = methods_of(left(tmp_path, a=made(), b=other))
    assert [(row[column] == "other", row["n"]) for row in rows] == [(False, "1"), (True, "1")]


def test_runs_on_another_number_of_processes_are_another_row(tmp_path: Path) -> None:
    runs = {f"p{number}": with_config(made(seed=number), compute={"processes": number}) for number in (10, 2)}
    rows = methods_of(left(tmp_path, **runs))
    assert [row["compute.processes"] for row in rows] == ["2", "10"]  # numbers by size


def test_runs_tuned_on_other_data_are_another_row_with_a_column_that_says_which(tmp_path: Path) -> None:
    """Rows that were tuned on the same data have no such column: their caption names it."""
    runs = {"a": made(), "b": replace(made(seed=1), tuned="real TOFU"), "c": replace(made(seed=2), tuned=None)}
    rows = methods_of(left(tmp_path / "a", **runs))
    assert [(row["tuned on"], row["n"], row["status"]) for row in rows] == [
        ("validation", "1", "finished"),
        ("real TOFU", "1", "finished"),
        ("—", "1", "finished, untuned"),
    ]
    text = tables.table(left(tmp_path / "b", a=made(), b=made(seed=1)))
    assert "Tuned on: validation." in text and "tuned on" not in text


def tuned(seed: int, study: int, lr: float, grid: tuple[float, ...] = (0.5, 2.0)) -> Results:
    """A run whose learning rate a study of that seed chose among `grid`."""
    run = made(seed=seed, metrics={**UNLEARNED, "utility": 0.1 * study + 0.01 * seed})
    trials = [{"lr": each, "gamma": 1.0, "metrics": {}, "chosen": each == lr} for each in grid]
    of_study = {"seed": study, "lr": [*grid], "gamma": [1.0], "workers": seed}
    config = {**run.config, "optimizer": {**run.config["optimizer"], "lr": lr}, "tune": of_study}
    return replace(
        run,
        config=config,
        trials=trials,
        tuned=f"validation part, 2 trials a cell (2 learning rates x 1 gammas, seed {study}): it",
    )


def test_several_tuning_studies_are_one_row_whose_interval_is_over_studies(tmp_path: Path) -> None:
    """Whatever rate each chose. Study means of utility 0.105 and 0.205: 0.155 ± 12.706 · 0.05, in [0, 1]."""
    runs = {
        f"s{seed}-{study}": tuned(seed, study, 0.5 * 4**place) for seed in (0, 1) for place, study in enumerate((1, 2))
    }
    folder = left(tmp_path, **runs)
    (row,) = methods_of(folder)
    assert (row["n"], row["optimizer.lr"], row["model utility ↑"]) == ("4", "0.5, 2", "0.155 [0.000, 0.790]")
    text = tables.table(folder)
    assert "; 4 runs, seeds 0, 1, 2 tuning studies (seeds 1, 2), 2 trials per row." in text
    (averaged,) = csv.DictReader(io.StringIO(tables.csv(tables.aggregated(folder))))
    assert averaged["utility.n"] == "4" and float(averaged["utility.high"]) == pytest.approx(0.155 + 12.7062 * 0.05)


def test_runs_with_another_budget_of_trials_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    folder = left(tmp_path, a=tuned(0, 1, 0.5), b=tuned(1, 1, 0.5, (0.5, 1.0, 2.0)))
    assert len(cells(tables.table(folder))) == 2
    (why,) = (note for note in notes_of(folder) if note.startswith("NOT COMPARABLE"))
    assert "tuning: {'lr': [0.5, 2.0]" in why and why.endswith(" here")


def test_a_repeated_seed_with_other_numbers_is_not_called_the_same_result(tmp_path: Path) -> None:
    other = made(metrics={**UNLEARNED, "utility": 0.5})
    folder = left(tmp_path, a=made(), b=made(), c=other)
    (row,) = methods_of(folder)
    assert (row["n"], row["model utility ↑"]) == ("1", "0.600")
    assert notes_of(folder)[:2] == [
        "one result in several folders, counted once: `a` = `b`",
        "the same configuration and seed with OTHER NUMBERS, of which the first counts: `a` = `c`",
    ]


def test_a_run_that_was_attacked_stays_in_the_row_of_one_that_was_not(tmp_path: Path) -> None:
    entry = {"_target_": "soul_exp.metrics.robustness.excess_area", "_partial_": True}
    attack = {"relearn": {"lr": [1e-4], "metrics": {"relearn_excess": entry}}}
    run = with_config(made(seed=1, metrics={**UNLEARNED, "relearn_excess": 0.25}), attack=attack)
    run.config["task"]["metrics"].pop("relearn_excess")
    folder = left(tmp_path, a=with_config(made(), attack={}), b=run)
    (row,) = methods_of(folder)
    assert (row["n"], row["relearn excess →"]) == ("2", "0.250 (n=1)") and not [key for key in row if "." in key]


EXCESS = {"_target_": "soul_exp.metrics.robustness.excess_area", "_partial_": True}


def attacked(run: Results, **excess: float) -> Results:
    """`run` after relearning: what came back, model by model; `unmerged` is its adapter beside the base."""
    metrics = {model: {**run.metrics.get(model, {}), "relearn_excess": value} for model, value in excess.items()}
    attack = {"relearn": {"lr": [1e-4], "metrics": {"relearn_excess": EXCESS}}}
    return with_config(replace(run, metrics={**run.metrics, **metrics}), attack=attack)


def test_attacks_on_an_adapter_beside_its_base_have_a_row_below_that_of_the_merged_one(tmp_path: Path) -> None:
    """0.1 and 0.2 of two seeds: 0.15 ± 12.706 · 0.05; it is no rival of the best merged one."""
    for seed in (0, 1):
        run = attacked(made(seed=seed), unlearned=0.3, retrained=0.0, unmerged=0.1 * (1 + seed))
        left(tmp_path, **{f"adam{seed}": run})
    folder = left(tmp_path, sgd=attacked(made(optimizer="sgd"), unlearned=0.2, retrained=0.0))
    text = tables.table(folder)
    (rows,) = (rows for rows in tables_in(text) if "relearn excess →" in rows[0])
    assert [(row["optimizer"], row["relearn excess →"], row["status"]) for row in rows if row["n"]] == [
        ("adam", "0.300", "finished"),
        ("adam", "0.150 [-0.485, 0.785]", "unmerged"),
        ("sgd", "**0.200**", "finished"),
    ]
    assert text.count("| unmerged") == 1 and "\n- unmerged: attacked with the adapter beside its base" in text
    assert "& unmerged \\\\" in latex.latex(tables.comparisons(folder))
    (line,) = (line for line in console.summary(folder).splitlines() if line.endswith("unmerged"))
    assert line.split() == ["npo", "adam", "0.150", "[-0.485,", "0.785]", "2", "unmerged"]
    assert " unmerged" not in console.summary(folder, ["utility"])  # it has no such number
    first, second = csv.DictReader(io.StringIO(tables.csv(tables.aggregated(folder))))
    assert float(first["unmerged.relearn_excess"]) == pytest.approx(0.15) and second["unmerged.relearn_excess"] == ""
    request = left(tmp_path / "s", **{"request-1": attacked(made(), unlearned=0.3, unmerged=0.1)})
    (rows,) = tables_in(tables.table(request, ["relearn_excess"]))
    assert [(row["model"], row["relearn excess"]) for row in rows] == [
        ("unlearned", "0.300"),
        ("unmerged", "0.100"),
    ]


# ---- order


def test_rows_stand_as_their_values_were_typed_and_numbers_by_size(tmp_path: Path) -> None:
    gammas = {"10": 10.0, "2": 2.0, "0.5": 0.5}
    for optimizer, (name, gamma) in itertools.product(("adam", "lion", "sgd"), gammas.items()):
        run = with_config(made(optimizer=optimizer), loss={"gamma": gamma})
        left(tmp_path, **{f"{optimizer}-{name}": run})
    typed = {
        "sweeper": {"params": {"optimizer": "sgd,adam"}},
        "overrides": {"task": ["loss.gamma=10,2,0.5", "loss=glob(*)"]},
    }
    assert [row["optimizer"] for row in methods_of(tmp_path)][::3] == ["adam", "lion", "sgd"]  # as their folders
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": typed}))
    rows = [(row["optimizer"], row["loss.gamma"]) for row in methods_of(tmp_path)]
    assert rows == [*itertools.product(("sgd", "adam", "lion"), ("0.5", "2", "10"))]


def test_rows_of_a_group_that_has_no_column_stand_as_their_sweep_numbered_them(tmp_path: Path) -> None:
    """`method=po_so,npo_fo` chooses a loss and an optimizer in one word."""
    left(tmp_path, a=made("npo", "adam"), b=made("po", "sophia"), c=made("dpo", "lion"))
    for name, number in (("a", 10), ("b", 9)):
        (tmp_path / name / ".hydra").mkdir()
        (tmp_path / name / ".hydra" / "hydra.yaml").write_text(f"hydra:\n  job:\n    id: x\n    num: {number}\n")
    assert [row["loss"] for row in methods_of(tmp_path)] == ["po", "npo", "dpo"]


@pytest.mark.parametrize("text", ["[", "hydra: 5", "hydra: {sweeper: {params: {a: '{'}}, overrides: {task: []}}"])
def test_a_broken_multirun_yaml_is_named(text: str, tmp_path: Path) -> None:
    (left(tmp_path, a=made()) / "multirun.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"multirun\.yaml .*remove it, and rows keep the order"):
        tables.table(tmp_path)


# ---- methods


def recorded(folder: Path, probability: float) -> None:
    """Records of two items for each of six authors: the answers' probability, 0 or 1, and extraction strength 1/2."""
    (folder / "records" / "unlearned").mkdir(parents=True)
    nll = 0.0 if probability == 1 else 50.0
    records = [{"nll": nll, "unit": f"author {item // 2}", "right": "0000011111"} for item in range(12)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "records" / "unlearned" / "forget.jsonl").write_text(lines)


def test_methods_are_compared_by_unit_from_the_records_of_their_runs(tmp_path: Path) -> None:
    """Six authors, all of which SGD still answers and adam does not: all six differences are 1, p = 2 / 2**6."""
    entries = {
        "forget_probability": {"_target_": "soul_exp.metrics.tofu.probability", "answers": "forget"},
        "forget_extraction_strength": {
            "_target_": "soul_exp.metrics.memorisation.extraction_strength",
            "answers": "forget",
        },
    }
    metrics = {"forget_probability": 0.5, "forget_extraction_strength": 0.5}
    for optimizer, probability in (("adam", 0.0), ("sgd", 1.0)):
        run = made(optimizer=optimizer, metrics=metrics)
        run = replace(with_config(run, task={**run.config["task"], "metrics": entries}), unit="author")
        recorded(left(tmp_path, **{optimizer: run}) / optimizer, probability)
    text = tables.table(tmp_path)
    (paired,) = (rows for rows in tables_in(text) if "forget probability" in rows[0])
    assert "#### Difference from adam, paired by author" in text
    assert paired == [
        {
            "optimizer": "sgd",
            "forget extraction strength": "0.000 [0.000, 0.000] (p 1.000)",
            "forget probability": f"1.000 [1.000, 1.000] (p {2 / 2**6:.3f})",
        }
    ]
    (profile,) = (rows for rows in tables_in(text) if "> 0.3" in rows[0])
    assert [*profile[0].values()] == ["adam", "1.000", "1.000", "1.000", "0.000", "0.000"]  # 1/2
    (tmp_path / "adam" / "records" / "unlearned" / "forget.jsonl").write_text('{"nll": "x"}\n')
    with pytest.raises(UsageError, match=r"adam/records/unlearned/forget\.jsonl has no records"):
        tables.table(tmp_path)


def test_runs_whose_records_are_gone_have_the_same_table_and_a_note(tmp_path: Path) -> None:
    stated = {"records": {"unlearned/forget.jsonl": "0" * 64}, "models": {}, "code": "0" * 64}
    folder = left(tmp_path, a=replace(made(), sha256=stated), b=replace(made(optimizer="sgd"), sha256=stated))
    (folder / "b" / "records").mkdir()
    before = tables.table(folder)
    note = "without records, and so without a test by unit in metrics of their answers: `a`"
    assert [each for each in notes_of(folder) if "without records" in each] == [note]
    (folder / "a" / "records").mkdir()
    assert tables.table(folder) == before.replace(f"- {note}\n", "")


def test_a_difference_by_unit_stays_where_that_of_two_values_of_its_metric_does(tmp_path: Path) -> None:
    """SGD answers all of six authors with one seed and none with another: 1/2 ± 12.706 · 1/2, in [-1, 1]."""
    entry = {"_target_": "soul_exp.metrics.tofu.probability", "answers": "forget"}
    for name, seed, probability in (("adam", 0, 0.0), ("sgd", 0, 0.0), ("sgd", 1, 1.0)):
        run = made(optimizer=name, seed=seed, metrics={"forget_probability": 0.5})
        run = with_config(run, task={**run.config["task"], "metrics": {"forget_probability": entry}})
        recorded(left(tmp_path, **{f"{name}{seed}": run}) / f"{name}{seed}", probability)
    text = tables.table(tmp_path, ["forget_probability"])
    (paired,) = (rows for rows in tables_in(text) if "status" not in rows[0])
    assert paired == [{"optimizer": "sgd", "forget probability": f"0.500 [-1.000, 1.000] (p {2 / 2**6:.3f})"}]


def test_trade_offs_name_who_dominates_and_how_often_a_run_is_better_than_the_baselines(tmp_path: Path) -> None:
    """sgd is worse than adam in both; lion forgets more and keeps less. Of lion's utilities one of four pairs ties."""
    values = {"adam": [(-2, 0.6), (-2, 0.8)], "sgd": [(-3, 0.5), (-3, 0.5)], "lion": [(-1, 0.6), (-1, 0.3)]}
    for optimizer, seeds in values.items():
        for seed, (quality, utility) in enumerate(seeds):
            metrics = {**UNLEARNED, "log10_forget_quality": float(quality), "utility": utility}
            left(tmp_path, **{f"{optimizer}{seed}": made(optimizer=optimizer, seed=seed, metrics=metrics)})
    (found,) = (rows for rows in tables_in(tables.table(tmp_path)) if "Pareto" in rows[0])
    assert [(row["optimizer"], row["Pareto"]) for row in found] == [
        ("adam", "on the front"),
        ("lion", "on the front"),
        ("sgd", "dominated by adam"),
    ]
    better = "P(log10 forget quality better than adam's)", "P(model utility better than adam's)"
    assert [[row[name] for name in better] for row in found] == [["—", "—"], ["1.000", "0.125"], ["0.000", "0.000"]]


def test_what_lost_a_seed_or_collapsed_is_not_best_and_is_named_among_the_trade_offs(tmp_path: Path) -> None:
    better = {**UNLEARNED, "utility": 0.9}
    lost = {"sam0": made(optimizer="sam", metrics=better), "sam1": replace(made(optimizer="sam", seed=1), **DIVERGED)}
    ruined = replace(made(optimizer="lion", metrics=better), collapsed={"forget": "ruined"})
    folder = left(tmp_path, adam=made(), sgd=made(optimizer="sgd"), lion=ruined, **lost)
    found = tables.comparisons(folder)[0]
    (utility,) = (table for table in found.tables if "utility" in [column.key for column in table.columns])
    place = [column.key for column in utility.columns].index("utility")
    marks = {row.cells[1].text: row.cells[place].mark for row in utility.rows}
    assert marks["sam"] == marks["lion"] == ""
    (trade,) = (table for table in found.tables if table.title == "Trade-offs")
    said = {row.cells[0].text: row.cells[1].text for row in trade.rows}
    assert said["sam"] == "not compared: finished, 1 of 2 diverged" and said["lion"].endswith("COLLAPSED")


def test_runs_are_found_whatever_their_folders_are_called_and_through_links(tmp_path: Path) -> None:
    names = ("model", "wandb", "request-study")
    folder = left(tmp_path / "runs", **{name: made(seed=seed) for seed, name in enumerate(names)})
    elsewhere = left(tmp_path / "elsewhere", linked=made(seed=3))
    (folder / "linked").symlink_to(elsewhere / "linked")
    (folder / "again").symlink_to(folder)
    left(folder / "model", **{"model": made(seed=4), "request-1": made(seed=5)})  # of a run: not runs of their own
    assert sorted(tables.load(folder)["run"]) == ["linked", "model", "request-study", "wandb"]


def test_each_loss_has_the_baseline_of_its_own(tmp_path: Path) -> None:
    """And where several rows have optimizer=adam with one loss, no table says that one of them is the baseline."""
    shares = {("npo", "adam"): 0.0, ("npo", "sgd"): 1.0, ("po", "adam"): 5.0, ("po", "sgd"): 3.0}
    for (loss, optimizer), share in shares.items():
        run = made(loss, optimizer, metrics={**UNLEARNED, "relearn_excess": share})
        run = replace(run, unit_values={"relearn_excess": {f"author {i}": share for i in range(6)}}, unit="author")
        left(tmp_path, **{f"{loss}-{optimizer}": run})

    def differences() -> list[tuple[str, str]]:
        found = [
            rows for rows in tables_in(tables.table(tmp_path)) if "relearn excess" in rows[0] and "n" not in rows[0]
        ]
        return [(row["loss, optimizer"], row["relearn excess"]) for rows in found for row in rows]

    assert differences() == [
        ("npo, sgd", "1.000 [1.000, 1.000] (p 0.031)"),
        ("po, sgd", "-2.000 [-2.000, -2.000] (p 0.031)"),
    ]
    again = results.read(tmp_path / "npo-adam")
    assert again is not None
    left(tmp_path, other=with_config(again, optimizer={"lr": 1.0, "betas": [0.9, 0.95]}))
    text = tables.table(tmp_path)
    assert "Not compared by unit: 2 rows have optimizer=adam (`npo, adam, 0.0001`; `npo, adam, 1`)." in text
    assert text.count("#### Difference from ") == 1


# ---- CSV and LaTeX


def test_the_csv_of_methods_has_a_row_for_each_with_exact_means_intervals_and_n(tmp_path: Path) -> None:
    for seed, utility in enumerate((0.25, 0.5, None)):
        left(tmp_path, **{f"s{seed}": made(seed=seed, metrics={**UNLEARNED, "utility": utility})})
    left(tmp_path, z=made(optimizer="sgd"))
    rows = [*csv.DictReader(io.StringIO(tables.csv(tables.aggregated(tmp_path))))]
    assert [(row["loss"], row["optimizer"], row["n"], row["table"]) for row in rows] == [
        ("npo", "adam", "3", "1"),
        ("npo", "sgd", "1", "1"),
    ]
    first = rows[0]
    assert (float(first["utility"]), first["utility.n"], first["num_steps"]) == (0.375, "2", "50")
    assert [float(first[f"utility.{end}"]) for end in ("low", "high")] == [0.0, 1.0]  # 0.375 ± 1.588
    assert float(first["forget_quality"]) == pytest.approx(0.01) and first["seconds.unlearn"] == "2.0"
    assert rows[1]["utility.low"] == "" and rows[1]["utility.n"] == "1"


HOSTILE = "50% of $x_1$ & #2 {a} ~b^c \\input{/etc/passwd} <i> \"q\" `r` 'é' — − ± × ½ α ↑ ↓ → ≈ 中 \n\t %"
COMMAND = re.compile(
    r"\\(?:[&%$#_{}]|\\|(?:textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|textquotedblright|"
    r"textasciigrave|textquotesingle)\{\}|'e|item|toprule|midrule|bottomrule|centering|textwidth|footnotesize|"
    r"textheight|scriptsize|shortstack\[[lr]\]|nobreakspace\{\}|"
    r"cmidrule\(lr\)\{\d+-\d+\}|multicolumn\{\d+\}\{c\}|(?:begin|end)\{(?:table|sidewaystable|tabular|adjustbox|itemize)\}|"
    r"(?:caption|textbf)(?=\{)|(?:pm|times|Delta|alpha|rho|tau|uparrow|downarrow|rightarrow|approx|frac\{1\}\{2\}))"
)


def parsed(text: str) -> list[list[str]]:
    """The rows of each tabular, after checks that LaTeX can read `text` and that it does nothing but print.

    Only known commands, balanced braces, environments and $; no bare special character; as many cells in each row as
    columns.
    """
    assert text.isascii() and text.startswith("% needs \\usepackage{booktabs,adjustbox,rotating}\n")
    text = text.partition("\n")[2]
    plain = COMMAND.sub(" ", text)
    plain = re.sub(
        r"\[htbp\]|\{max width= , max totalheight=0\.8 \}|\[2pt\]|\$[-^2 ]*\$", "", re.sub(r"\{[lr]+\}\n", "\n", plain)
    )
    assert "\\" not in plain and not set("%#_~^<>|\"`'") & set(plain), re.findall(r".{20}[\\%#_~^<>|\"`'].{20}", plain)
    assert plain.count("$") == 0
    depth = [*itertools.accumulate({"{": 1, "}": -1}.get(char, 0) for char in re.sub(r"\\[{}\\]", "", text))]
    assert min(depth) == 0 == depth[-1]
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        assert kind == "begin" or opened.pop() == name
        opened += [name] if kind == "begin" else []
    assert not opened
    rows = []
    for spec, body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\\end\{tabular\}", text, flags=re.S):
        for line in (line for line in body.splitlines() if line.endswith(("\\\\", "\\\\[2pt]"))):
            found = [cell.strip() for cell in re.split(r"(?<!\\)&", line[: line.rindex("\\\\")])]
            spans = [int(span[0]) if (span := re.findall(r"\\multicolumn\{(\d+)\}", cell)) else 1 for cell in found]
            assert sum(spans) == len(spec), line
            rows.append(found)
    return rows


def hostile() -> Comparison:
    """A comparison of texts that LaTeX would obey."""
    columns = (
        Column("a", HOSTILE),
        Column("b", "utility", "utility", "higher"),
        Column("c", "FQ", "efficacy", "lower"),
    )
    rows = (
        Row((Cell(HOSTILE), Cell(None, -0.5, -1.0, 0.25), Cell()), is_reference=True),
        Row((Cell("sgd"), Cell(None, 0.5, mark="best"), Cell(None, 1e-9, mark="tied"))),
    )
    return Comparison(
        HOSTILE, HOSTILE, (Table(HOSTILE, columns, rows, HOSTILE), Table("", (), (), HOSTILE)), (HOSTILE,)
    )


def test_latex_escapes_whatever_stands_in_a_table() -> None:
    text = latex.latex([hostile()])
    groups, header, original, sgd = parsed(text)
    assert groups == [r"\multicolumn{1}{c}{}", r"\multicolumn{1}{c}{utility}", r"\multicolumn{1}{c}{efficacy}"]
    assert header[1:] == [r"utility\nobreakspace{}$\uparrow$", r"FQ\nobreakspace{}$\downarrow$"]
    assert original[1:] == [r"\shortstack[r]{$-$0.500 \\ \scriptsize {[}$-$1.000, 0.250{]}}", "---"]
    assert sgd == ["sgd", r"\textbf{0.500}", r"1.0e$-$09 $\approx$"]
    shown = latex.escaped(HOSTILE)
    assert shown.startswith(
        r"50\% of \$x\_1\$ \& \#2 \{a\} \textasciitilde{}b\textasciicircum{}c \textbackslash{}input\{"
    )
    assert "{[}U+4E2D{]}" in shown and "\n" not in shown


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex (Debian: texlive-latex-extra)")
def test_latex_typesets_the_tables_of_runs_and_whatever_stands_in_them(tmp_path: Path) -> None:
    """Without an error, and with a glyph for each character."""
    run = with_config(made("grad_diff"), paper=True)
    folder = left(tmp_path / "runs", **{"a_1": run, "b&2": made(optimizer="sophia_soul"), "c": made(seed=1)})
    every = Comparison("", "", (), ("".join(latex.SPECIAL),))
    text = latex.latex([*tables.comparisons(folder), hostile(), every])
    document = ("\\documentclass{article}", latex.PREAMBLE, "\\begin{document}", text, "\\end{document}", "")
    (tmp_path / "document.tex").write_text("\n".join(document))
    typeset = ("pdflatex", "-draftmode", "-halt-on-error", "-interaction=nonstopmode", "-no-shell-escape", "document")
    done = subprocess.run(typeset, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]
    log = (tmp_path / "document.log").read_text(errors="replace")
    assert "Missing character" not in log and "Published numbers beside ours" in text


def relearned(optimizer: str, shares: Sequence[float], value: float, seed: int = 0, **changes: Any) -> Results:
    """A run whose relearn excess is `value`, of units with these `shares` in it."""
    run = made(optimizer=optimizer, seed=seed, metrics={**UNLEARNED, "relearn_excess": value})
    units = {"relearn_excess": {f"author {i}": share for i, share in enumerate(shares)}}
    return replace(run, unit_values=units, unit="author", **changes)


def paired(folder: Path) -> Table:
    (found,) = tables.comparisons(folder, ["relearn_excess"])
    return found.tables[1]


def test_an_attack_whose_units_do_not_add_up_to_its_metric_is_not_tested(tmp_path: Path) -> None:
    """Else the table would state a difference that is not that of the two means above it."""
    adam, sgd = relearned("adam", [0.5] * 6, 0.5), relearned("sgd", [0.25] * 6, 0.25)
    sum_up = paired(left(tmp_path / "a", adam=adam, sgd=sgd))
    assert sum_up.rows[0].cells[1].value == -0.25 and "No test" not in sum_up.about
    off = relearned("lion", [-0.25] * 5 + [0.5], 0.25)
    found = paired(left(tmp_path / "b", adam=adam, lion=off, sgd=sgd))
    assert [(row.cells[0].text, row.cells[1].value) for row in found.rows] == [("lion", None), ("sgd", -0.25)]
    assert "No test of relearn excess of lion: the units' shares do not add up to it." in found.about
    interval = {"unlearned": {"relearn_excess": [-1.0, 2.0]}}  # noise beside which this is nothing
    near = relearned("lion", [0.125] * 6, 0.25, intervals=interval)
    assert paired(left(tmp_path / "c", adam=adam, lion=near)).rows[0].cells[1].value == -0.375
    none = paired(left(tmp_path / "d", adam=relearned("adam", [0.5] * 6, 0.1), lion=off))
    assert not none.columns and none.about.startswith("No test of relearn excess of any method: the units' shares")


def test_a_test_by_unit_states_how_the_runs_of_a_method_ended(tmp_path: Path) -> None:
    lost, collapsed = {"status": "diverged", "reason": "loss is nan"}, {"collapsed": {"forget": "half are commas"}}
    folder = left(
        tmp_path,
        a=relearned("adam", [0.5] * 6, 0.5), b=relearned("adam", [0.5] * 6, 0.5, 1, **collapsed),
        c=relearned("sgd", [0.25] * 6, 0.25), d=relearned("sgd", [0.25] * 6, 0.25, 1, **lost),
    )  # fmt: skip
    found = paired(folder)
    assert found.title == "Difference from adam (finished, 1 of 2 collapsed), paired by author"
    assert [row.cells[0].text for row in found.rows] == ["sgd (finished, 1 of 2 diverged)"]


def test_a_table_of_requested_metrics_may_have_costs_which_the_compared_models_lack(tmp_path: Path) -> None:
    folder = left(tmp_path, a=made(), b=replace(made(seed=1), seconds={"unlearn": 4.0}))
    (found,) = tables.comparisons(folder, ["utility", "seconds.unlearn", "num_steps"])
    written = [[cell.written for cell in row.cells] for row in found.tables[0].rows]
    assert [row[-4:-2] for row in written[:2]] == [["", ""]] * 2
    assert written[2][-4].startswith("3.0 [0.0, ") and written[2][-3] == "50"
    assert found.tables[0].about.startswith("Wall-clock seconds by stage")
    with pytest.raises(
        UsageError, match=r"no run has 'seconds\.attack', choose from .*, utility, .*, seconds\.unlearn, "
    ):
        tables.comparisons(folder, ["seconds.attack"])


def test_a_wide_latex_table_has_intervals_below_numbers_and_one_of_many_columns_is_turned() -> None:
    def text(num_metrics: int) -> str:
        metrics = [Column(f"m{n}", "share of answers", "utility", "higher") for n in range(num_metrics)]
        row = Row((Cell("npo"), *[Cell(value=0.5, low=0.25, high=0.75, n=1, mark="best")] * num_metrics))
        return latex.latex([Comparison("", "", (Table("", (Column("loss", "loss"), *metrics), (row,)),), ())])

    narrow, wide, turned = text(2), text(5), text(14)
    assert r"npo & \textbf{0.500 {[}0.250, 0.750{]}}" in narrow and "shortstack" not in narrow
    below = r"\shortstack[r]{\textbf{0.500} \\ \scriptsize {[}0.250, 0.750{]}}"
    title = r"\shortstack[r]{share of \\ answers\nobreakspace{}$\uparrow$}"
    assert wide.count(below) == wide.count(title) == 5 and "sidewaystable" not in wide
    assert turned.count(below) == 14 and turned.count("{sidewaystable}") == 2
    assert [len(row) for row in parsed(turned)] == [15, 15]


def test_latex_of_runs_has_a_tabular_for_each_group_and_a_rule_after_the_compared_models(tmp_path: Path) -> None:
    folder = left(tmp_path, **{"a_1": made(), "b_1": made(optimizer="sgd", metrics={**UNLEARNED, "utility": 0.7})})
    text = latex.latex(tables.comparisons(folder))
    rows = parsed(text)
    assert (
        text.count("\\begin{tabular}") == 4 and text.count("\\midrule") == 4 + 2
    )  # efficacy, utility, cost, trade-offs
    (best,) = (row for row in rows if any("textbf{0.700}" in cell for cell in row))
    assert best[:2] == ["npo", "sgd"]
    (one,) = re.findall(
        r"\\begin\{tabular\}.*?\\end\{tabular\}",
        latex.latex(tables.comparisons(folder, ["utility", "mia_auc"])),
        flags=re.S,
    )
    assert r"\multicolumn{1}{c}{utility} & \multicolumn{2}{c}{efficacy}" in one
