"""Imports go one way, by package: a package may import only from levels below its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "soul_exp"

# Lowest first. A package or module may import from strictly earlier lines, a package also from itself.
LEVELS: list[set[str]] = [
    {"__init__", "binding", "compat", "errors", "metrics", "optim", "ranges"},
    {"distributed", "files", "hub", "losses", "options"},
    {"comparison", "data", "results", "schema"},
    {"models", "report"},
    {"figures", "tables", "tasks", "training"},
    {"evaluation"},
    {"attacks"},
    {"run"},
    {"artifacts", "build"},
    {"compose", "stages"},
    {"checks"},
    {"experiment", "help_page"},
    {"overrides", "sequence"},
    {"sweep"},
    {"forecast"},
    {"ask", "cli", "export", "preload", "verify"},
    {"__main__"},
]
# Narrower than the level: an optimizer is one copyable file, a metric a pure function of answers, a report reads files.
ONLY: dict[str, set[str]] = {
    "optim": set(),
    "metrics": set(),
    "report": {"options", "results", "metrics", "errors", "files"},
    "figures": {"distributed", "options", "results", "metrics", "errors", "files", "report"},
    "tables": {"distributed", "options", "results", "metrics", "errors", "files", "report"},
}

FILES = sorted(PACKAGE.rglob("*.py"))


def top_name(file: Path) -> str:
    """The first name below soul_exp: `metrics` for metrics/tofu.py, `data` for data.py."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(source: str, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, first name below soul_exp) of every import of soul_exp in `source`, wherever it stands.

    `package` is the dotted name, split, of the package that holds the source: what a relative import starts from.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            dotted = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for names in dotted:
            if names[0] == "soul_exp":
                below = names[1] if len(names) > 1 else "__init__"
                exists = (PACKAGE / below).is_dir() or (PACKAGE / f"{below}.py").is_file()
                yield node.lineno, below if exists else "__init__"  # else an attribute, such as __version__


def allowed(name: str) -> set[str]:
    """The names that module or package `name` may import."""
    earlier: set[str] = set()
    for level in LEVELS:
        if name in level:
            break
        earlier |= level
    return ONLY.get(name, earlier) | {name, "__init__"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_from_earlier_levels(file: Path) -> None:
    name = top_name(file)
    assert any(name in level for level in LEVELS), f"soul_exp/{name} has no level: add it to LEVELS in {__file__}"
    package = ["soul_exp", *file.relative_to(PACKAGE).parent.parts]
    for line, target in imported(file.read_text(encoding="utf-8"), package):
        choice = ", ".join(sorted(allowed(name) - {name, "__init__"})) or "nothing"
        assert target in allowed(name), (
            f"{file.relative_to(PACKAGE.parent)}:{line} imports soul_exp.{target}; "
            f"all that {name} may import of soul_exp is: {choice}"
        )


def test_every_form_of_import_is_seen() -> None:
    source = """
import soul_exp.data
from soul_exp import cli, __version__
from soul_exp.tasks.task import Task
def late():
    from . import losses
    from .optim import Sophia
    from ..models import load
"""
    assert list(imported(source, ["soul_exp"]))[:6] == [
        (2, "data"),
        (3, "cli"),
        (3, "__init__"),
        (4, "tasks"),
        (6, "losses"),
        (7, "optim"),
    ]
    assert (8, "models") in list(imported(source, ["soul_exp", "tasks"]))


def test_no_name_stands_in_two_levels() -> None:
    names = [name for level in LEVELS for name in level]
    assert len(names) == len(set(names))


def test_what_reads_results_waits_for_no_numerical_library() -> None:
    code = "import sys, soul_exp.results; print({'numpy', 'scipy', 'torch'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
