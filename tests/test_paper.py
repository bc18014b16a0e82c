"""The paper's columns, and published numbers beside ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from composing import job
from omegaconf import OmegaConf
from test_tables import UNLEARNED, left, made, tables_in

from soul_exp import compose, tables
from soul_exp.errors import UsageError
from soul_exp.report import paper
from soul_exp.report.console import summary
from soul_exp.report.page import html
from soul_exp.results import Results

TASKS = [path.stem for path in (compose.conf_dir() / "experiment").glob("table_*.yaml")]
FILE = Path(str(paper.PUBLISHED)) / "tofu.csv"
# What is confirmed. A number that stands in the file and not here was never checked against its source.
CONFIRMED = {
    "SOUL paper, figure 1 (TOFU)": {
        "forget quality": {"grad_diff_fo": "0.02", "grad_diff_so": "1.00", "po_fo": "0.72", "po_so": "0.92"},
        "utility": {"grad_diff_fo": "0.757", "grad_diff_so": "0.774", "po_fo": "0.858", "po_so": "0.864"},
    },
    "SIMU (third party), arXiv 2510.07822": {
        "forget EM": {"grad_diff_fo": "72.75", "grad_diff_so": "10.25"},
        "retain EM": {"grad_diff_fo": "76.50", "grad_diff_so": "72.25"},
        "world facts": {"grad_diff_fo": "79.49", "grad_diff_so": "82.05"},
    },
}
MEASURED = {**UNLEARNED, "forget_accuracy": 0.4, "facts_rouge": 0.9, "retain_rouge": 0.8}


def of_paper(loss: str, optimizer: str = "adam", seed: int = 0, *, task: str = "tofu", **config: Any) -> Results:
    run = made(loss, optimizer, seed, metrics=MEASURED)
    options = {**run.config["task"], "split": "forget10"}
    return replace(
        run, choices={**run.choices, "task": task}, config={**run.config, "task": options, "paper": True, **config}
    )


def published_in(folder: Path) -> list[dict[str, str]]:
    (found,) = (rows for rows in tables_in(tables.table(folder)) if "published" in rows[0])
    return found


# ---- the paper's columns


@pytest.mark.parametrize("task", ["tofu", "copyright", "detox"])
def test_the_papers_columns_are_metrics_of_the_task_and_a_preset_asks_for_them(task: str) -> None:
    entries = OmegaConf.load(compose.conf_dir() / "task" / f"{task}.yaml").metrics
    membership = OmegaConf.load(compose.conf_dir() / "metrics" / "membership.yaml").metrics
    assert set(paper.COLUMNS[task].split()) <= {*entries, *membership}
    assert job(f"experiment=table_{task}", "model=tiny")[0]["paper"] is True
    assert {f"table_{known}" for known in paper.COLUMNS} == set(TASKS)


def test_tables_of_a_preset_begin_with_the_papers_columns_in_its_order_and_have_all_others(tmp_path: Path) -> None:
    """Also those that a table has on demand only; `--metrics` names others."""
    folder = left(tmp_path, a=of_paper("grad_diff"), b=of_paper("npo"))
    own = ["forget quality ↑", "forget accuracy →", "forget ROUGE →", "MIA AUC →", "Δ (retrained − MIA AUC)"]
    (found,) = tables.comparisons(folder)
    first, *others, last = found.tables
    shown = [column.title for column in first.columns]
    assert shown == ["loss", "optimizer", *own, "retain ROUGE ↑", "facts ROUGE ↑", "n", "status"]
    assert first.title == paper.OWN and last.title == paper.BESIDE
    plain = left(tmp_path / "plain", a=of_paper("grad_diff", paper=False), b=of_paper("npo", paper=False))
    (before,) = tables.comparisons(plain)
    assert [table.title for table in others] == [table.title for table in before.tables]
    assert paper.OWN not in tables.table(plain) and paper.BESIDE not in tables.table(plain)
    (only,) = tables.comparisons(folder, ["utility"])
    assert [table.title for table in only.tables] == [""]


def test_the_console_shows_all_of_the_papers_columns_and_the_published_numbers(tmp_path: Path) -> None:
    folder = left(tmp_path, a=of_paper("grad_diff"))
    text = summary(folder)
    (head,) = (line for line in text.splitlines() if line.startswith("loss"))
    assert "forget accuracy →" in head and head.index("forget quality") < head.index("facts ROUGE")
    (row,) = (line for line in text.splitlines() if line.startswith("grad_diff_so  world facts"))
    assert "  82.05 %    Llama-2-7B  " in row and "  SIMU (third party), arXiv 2510.07822  not run" in row
    assert paper.BESIDE not in summary(folder, ["utility"])


# ---- published numbers


def test_the_file_holds_what_is_confirmed_and_nothing_else() -> None:
    found: dict[str, dict[str, dict[str, str]]] = {}
    for of in paper.read(FILE):
        found.setdefault(of.source, {}).setdefault(of.metric, {})[of.method] = of.value
    assert found == CONFIRMED


def test_a_method_of_the_file_is_the_loss_and_the_optimizer_that_method_chooses() -> None:
    entries = OmegaConf.load(compose.conf_dir() / "task" / "tofu.yaml").metrics
    for of in {of.method: of for of in paper.read(FILE)}.values():
        choices = job("experiment=table_tofu", "model=tiny", f"method={of.method}")[0]["choices"]
        assert (choices["loss"], choices["optimizer"]) == (of.loss, of.optimizer)
        assert not of.ours or of.ours in entries


def test_each_published_number_stands_beside_the_mean_of_our_runs_of_its_method(tmp_path: Path) -> None:
    """Geometric over two seeds: 0.1 of 0.01 and 1. A row of ours that diverged is a row of its own."""
    one = of_paper("grad_diff", "sophia_soul", 1)
    one = replace(one, metrics={**one.metrics, "unlearned": {**MEASURED, "forget_quality": 1.0}})
    diverged = replace(of_paper("grad_diff", seed=1), status="diverged", reason="loss is nan")
    folder = left(
        tmp_path, a=of_paper("grad_diff", "sophia_soul"), b=one, c=of_paper("grad_diff"), d=diverged,
        e=of_paper("po_release", stages=["evaluate"]), f=of_paper("npo"),
    )  # fmt: skip
    rows = {(row["method"], row["metric"], row["status"]): row for row in published_in(folder)}
    quality = rows["grad_diff_so", "forget quality", "finished"]
    assert (quality["published"], quality["source"]) == ("1.00", "SOUL paper, figure 1 (TOFU)")
    assert quality["ours"].startswith("0.100 [") and quality["their dialect"] == "soul_release"
    assert rows["grad_diff_fo", "forget quality", "DIVERGED"]["ours"] == "0.010"
    assert rows["grad_diff_fo", "forget quality", "finished, 1 of 2 diverged"]["ours"] == "0.010"
    assert rows["po_fo", "forget quality", ""]["ours"] == "not run"  # a checkpoint is of no method
    em = rows["grad_diff_so", "forget EM", "finished"]
    assert (em["published"], em["their model"], em["ours"]) == ("10.25 %", "Llama-2-7B", "no counterpart")
    assert {row["unequal or unknown"] for row in rows.values()} == {"all four", "—"}
    text = tables.table(folder)
    assert "Ours: model tiny, data tofu embedded forget10, dialect ours. Both are the same quantity where" in text
    assert f"in 0 of {len(published_in(folder))} rows" in text and "forget EM and retain EM (SIMU" in text


HEADER = "method,loss,optimizer,metric,value,unit,model,data,dialect,ours,definition,source\n"
SAME = "mine,npo,adam,utility,0.5,,tiny,tofu embedded forget10,ours,utility,,A paper\n"


def test_which_rows_are_the_same_quantity_follows_from_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tofu.csv").write_text(HEADER + SAME + SAME.replace(",tiny,", ",,"))
    monkeypatch.setattr(paper, "PUBLISHED", tmp_path)
    folder = left(tmp_path / "a", a=of_paper("npo"))
    assert [row["unequal or unknown"] for row in published_in(folder)] == ["nothing", "model"]
    assert "are: in 1 of 2 rows. — under theirs: not confirmed.\n" in tables.table(folder)
    folder = left(tmp_path / "b", a=of_paper("npo", dialect="tofu"))
    assert [row["unequal or unknown"] for row in published_in(folder)] == ["dialect", "model, dialect"]
    other = replace(of_paper("npo"), choices={**of_paper("npo").choices, "model": "other"})
    folder = left(tmp_path / "c", a=of_paper("npo"), b=other)  # a row of each, with the column that tells them apart
    found = [(row["model"], row["unequal or unknown"]) for row in published_in(folder)]
    assert found == [("tiny", "nothing"), ("other", "model"), ("tiny", "model"), ("other", "model")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with '': expected method,loss,"),
        ("method,value\n", "begins with 'method,value': expected method,loss,"),
        (HEADER + "a,b\n", "line 2 has 2 values: expected 12"),
        (HEADER + SAME.replace("0.5", "about 1"), "line 2: value is 'about 1'"),
        (HEADER + SAME.replace("0.5", "nan"), "line 2: value is 'nan'"),
        (HEADER + SAME + SAME.replace("A paper", ""), "line 3: source is empty"),
        (HEADER + SAME.replace(",ours,", ",theirs,"), "line 2: dialect is 'theirs', expected one of ours, tofu"),
        (HEADER + SAME.replace(",utility,,", ",,,"), "line 2: ours and definition are empty"),
        (HEADER + '"', "unexpected end of data"),
        ("\udcff", "tofu.csv"),
    ],
)
def test_a_broken_file_is_an_error_that_names_its_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tofu.csv").write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.setattr(paper, "PUBLISHED", tmp_path)
    with pytest.raises(UsageError) as error:
        tables.table(left(tmp_path / "runs", a=of_paper("npo")))
    assert message in str(error.value) and str(tmp_path / "tofu.csv") in str(error.value)


@pytest.mark.parametrize("task", ["copyright", "detox"])
def test_a_task_without_a_confirmed_number_says_so_everywhere(task: str, tmp_path: Path) -> None:
    folder = left(tmp_path / "runs", a=of_paper("npo", task=task))
    for text in (tables.table(folder), summary(folder), tables.latex(tables.comparisons(folder)), html(folder, folder)):
        assert paper.NONE_CONFIRMED in text


def test_the_page_has_the_published_numbers_and_shows_the_papers_columns(tmp_path: Path) -> None:
    folder = left(tmp_path / "runs", a=of_paper("grad_diff"), b=made())
    text = html(folder, folder)
    assert text.count(f"<h3>{paper.BESIDE}</h3>") == 1 and "<td>82.05 %</td><td>Llama-2-7B</td>" in text
    (head,) = {
        line.strip() for line in text.splitlines() if '<th scope="col"' in line and 'data-key="facts_rouge"' in line
    }
    assert "hidden" not in head
    assert paper.BESIDE not in html(left(tmp_path / "plain", a=made()), tmp_path)
