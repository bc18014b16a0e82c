"""What mkdocs.yml needs of the repository: pages outside docs/ that a page links to, and pages that nav leaves out.

A link to a file outside docs/, which is right in the repository, leads to a copy of that file below `repository/` of
the site. A path below is relative to the root of the repository; `src_uri` is relative to docs/, and of a copy begins
with `repository/`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
COPIES = "repository/"
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def path_of(src_uri: str) -> str:
    """The path of a page of the site."""
    return src_uri.removeprefix(COPIES) if src_uri.startswith(COPIES) else f"docs/{src_uri}"


def src_uri_of(path: str) -> str:
    """Where the site has the file at `path`. A file that is no page becomes one, which shows its text."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return COPIES + (path if path.endswith(".md") else f"{path}.md")


def linked(path: str, text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Each link of the page at `path` to the repository, and the path of the file there; of a folder, its page."""
    for link in LINK.finditer(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        if (ROOT / target).is_dir():
            target += "/index.md" if target == "docs" else "/README.md"
        if ":" not in link[1] and (ROOT / target).is_file():
            yield link, target


def content(path: str) -> str:
    """The Markdown of the copy of the file at `path`."""
    text = (ROOT / path).read_text()
    return text if path.endswith(".md") else f"# {path}\n\n```{Path(path).suffix[1:]}\n{text.rstrip()}\n```\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of docs/ that nav does not name into a last section."""
    named = str(config.nav)
    pages = sorted(path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md"))
    if more := [page for page in pages if f"'{page}'" not in named]:
        config.nav = [*(config.nav or ()), {"More": more}]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the copy of each file outside docs/ to which a page, or such a copy, links."""
    found = [path_of(file.src_uri) for file in files.documentation_pages()]
    for path in found:  # which grows
        for _, target in linked(path, content(path) if path.endswith(".md") else ""):
            if target not in found and not target.startswith("docs/"):
                files.append(File.generated(config, src_uri_of(target), content=content(target)))
                found.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """The page with links that are right in the site."""
    folder = posixpath.dirname(page.file.src_uri)
    for link, target in reversed([*linked(path_of(page.file.src_uri), markdown)]):
        there = posixpath.relpath(src_uri_of(target), folder or ".")
        markdown = f"{markdown[: link.start()]}]({there}{link[2] or ''}){markdown[link.end() :]}"
    return markdown
