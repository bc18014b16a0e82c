"""Documents lead somewhere: links, the files and modules that commands name, and the length of the README."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

from soul_exp.metrics.answers import Answers
from soul_exp.results import Results
from soul_exp.tasks.tofu import tofu

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md"), *ROOT.glob("docs/*/*.md")])
NAMED = re.compile(r"(?:tests|docs|benchmarks|analysis|launchers|soul_exp)/[\w./]*\.(?:py|md|sh|ipynb|c)\b")


def anchors(text: str) -> set[str]:
    """The anchor that GitHub gives each heading of a Markdown text."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (document.parent / path).resolve() if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_and_module_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    assert [name for name in NAMED.findall(text) if not (ROOT / name).exists()] == []
    imported = re.findall(r"^ +from (soul_exp[\w.]*) import", text, flags=re.M)
    assert [name for name in imported if find_spec(name) is None] == []


def test_the_readme_is_shorter_than_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_the_readme_counts_the_choices_and_its_question_is_one_of_the_forgotten_rows() -> None:
    text = (ROOT / "README.md").read_text()
    losses, optimizers = (len([*(ROOT / "conf" / group).glob("*.yaml")]) for group in ("loss", "optimizer"))
    assert f"# {losses} losses, {optimizers} optimizers\n" in text
    (question,) = re.findall(r'soul_exp\.ask \S+ "(.*)"', text)
    assert question in [item.prompt for item in tofu().probes["forget"].items]


def test_every_page_that_quotes_the_main_job_quotes_the_run_that_is_printed() -> None:
    names = ("docs/results.md", "README.md", "docs/metrics.md", "docs/quick_start.md")
    main, readme, metrics, start = ((ROOT / name).read_text() for name in names)
    line = r"^(log10 f|model u|MIA|log10 F)[^\n]*? (-?[\d.]+) +(-?[\d.]+)(?: \[[^\n]*\])? +([\d.]+)  "
    printed = re.findall(line, main, flags=re.M)
    assert [name for name, *_ in printed] == ["log10 f", "model u", "MIA", "log10 F"]
    assert printed[:3] == re.findall(line, readme, flags=re.M) == re.findall(line, start, flags=re.M)
    quoted = re.findall(r"^\| `(?:ours|open_unlearning)` \| (-[\d.]+) \| (-[\d.]+) \| 0 \|$", metrics, flags=re.M)
    assert quoted == [printed[0][1:3], printed[3][1:3]]


def test_an_anchor_has_no_punctuation() -> None:
    assert anchors("# Real TOFU, 40 authors: `save=best`\n```\n# code\n```\n") == {"real-tofu-40-authors-savebest"}


def test_the_format_describes_every_key_of_results_and_records() -> None:
    described = set(re.findall(r"`(\w+)`", (ROOT / "docs/format.md").read_text()))
    assert {field.name for field in (*fields(Results), *fields(Answers))} <= described
