"""The site of docs/: it builds without a warning, its links lead somewhere, and it loads nothing from the network."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from soul_exp import attacks, losses, optim, tables

ROOT = Path(__file__).parents[1]
LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}
NO_FILE = {"canonical", "next", "prev"}  # rel of a <link> that loads nothing
OUTSIDE = r"[a-z]+:|//"  # how a link that leaves the site begins


class Page(HTMLParser):
    """The anchors of an HTML page, what its links lead to, and what a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.loaded = {""}, set[str](), set[str]()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        elif LOADED.get(tag) in found and found.get("rel") not in NO_FILE:
            self.loaded.add(found[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make site` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def targets(site: Path, pages: dict[Path, Page], attribute: str) -> Iterator[tuple[str, Path, str]]:
    """Each link of a page to the site itself, the file that it leads to, and its anchor."""
    for path, page in pages.items():
        for link in getattr(page, attribute):
            if not re.match(OUTSIDE, link):
                file, anchor = urldefrag(link)
                base = site if file.startswith("/") else path.parent  # 404.html is shown in any folder
                to = (base / unquote(file).lstrip("/")).resolve() if file else path
                yield f"{path.name} -> {link}", to / "index.html" if to.is_dir() else to, unquote(anchor)


def test_every_link_of_the_site_leads_to_a_page_and_an_anchor_of_it(site: Path, pages: dict[Path, Page]) -> None:
    found = [*targets(site, pages, "links")]
    assert len(found) > 1000
    assert [link for link, path, _ in found if not path.is_file()] == []
    assert [link for link, path, anchor in found if path in pages and anchor not in pages[path].anchors] == []


def test_a_page_loads_what_the_site_has_and_nothing_from_the_network(site: Path, pages: dict[Path, Page]) -> None:
    loaded = {file for page in pages.values() for file in page.loaded}
    assert len(loaded) > 3
    assert [file for file in loaded if re.match(OUTSIDE, file) and not file.startswith("data:")] == []
    assert [link for link, path, _ in targets(site, pages, "loaded") if not path.is_file()] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert len(styles) > 10_000
    assert re.findall(r"url\(\s*[\"']?(?:https?:)?//|@import", styles) == []


def test_every_page_of_docs_stands_in_the_navigation(site: Path, pages: dict[Path, Page]) -> None:
    index = site / "index.html"
    named = {path for _, path, _ in targets(site, {index: pages[index]}, "links")}
    sources = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert len(sources) > 20
    assert [name for name in sources if site / name not in named] == []


def test_the_site_documents_what_a_user_may_import(site: Path, pages: dict[Path, Page]) -> None:
    def shown(page: str, *names: str) -> list[str]:
        return [name for name in names if name not in pages[site / "api" / page].anchors]

    public = [name for name in vars(optim) if inspect.isclass(getattr(optim, name))]
    assert len(public) == 10 and shown("optim.html", *(f"soul_exp.optim.{name}" for name in public)) == []
    functions = [name for name in losses.__all__ if callable(getattr(losses, name))]
    assert shown("losses.html", *(f"soul_exp.losses.{name}" for name in functions)) == []
    assert shown("attacks.html", *(f"soul_exp.attacks.{name}" for name in attacks.__all__ if name != "Found")) == []
    callables = [name for name in tables.__all__ if callable(getattr(tables, name)) and name != "main"]
    frames = ["load", *(f"Frames.{name}" for name in ("runs", "items", "steps", "attacks", "trials"))]
    frames = [f"soul_exp.report.frames.{name}" for name in frames]
    assert shown("reading.html", *(f"soul_exp.tables.{name}" for name in callables), *frames) == []
    yaml = "".join(path.read_text() for path in (ROOT / "conf").rglob("*.yaml"))
    metrics = set(re.findall(r"_target_: (soul_exp\.metrics\.[\w.]+)", yaml))
    assert len(metrics) > 30 and shown("metrics.html", *metrics) == []


def num_pieces(text: str, program: str) -> int:
    """Of how many texts of the program `text` is made, cut between words and as long as possible; 99: of none."""
    count = 0
    while text:
        ends = [n for n in range(len(text), 0, -1) if not re.match(r"\w\w", text[n - 1 : n + 1])]
        end = next((n for n in ends if text[:n] in program), None)
        if end is None:
            return 99
        text, count = text[end:], count + 1
    return count


def test_every_message_of_troubleshooting_is_one_of_the_program() -> None:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "soul_exp").rglob("*.py")]
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    program = "\n".join(text for text in texts if isinstance(text, str))
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = re.findall(r"^\| message \|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", page, flags=re.M)
    messages = re.findall(r"^\| `([^`]+)`", "".join(rows), flags=re.M)
    assert len(messages) > 30
    parts = [part.strip() for message in messages for part in message.split("…")]
    assert [part for part in parts if num_pieces(part, program) > 3] == []
    assert num_pieces("type overwrite=true to replace them", program) == 1
    assert num_pieces("type ovrwrite=true to replace them", program) == 99
