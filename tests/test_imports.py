"""Imports go one way: a module may import only from layers below its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from soul_exp import tune

PACKAGE = Path(__file__).parents[1] / "soul_exp"

# Lowest first. A module may import from strictly earlier lines, a package also from itself.
LAYERS: list[set[str]] = [
    {"__init__", "binding", "errors", "files", "ranks", "shards", "world"},
    {"checkpoints", "fulldisk", "interrupts", "options", "schedule"},
    {"progress"},
    {"results", "answers", "losses", "optim"},
    {"metrics", "watch"},
    {"data", "adapters", "attention", "layers", "weight_files"},
    {"models", "toxicity"},
    {"tasks", "reference", "passes"},
    {"trainer", "evaluate"},
    {"training", "suite"},
    {"recipes"},
    {"examine"},
    {"prepare", "optimizers"},
    {"measure", "disk", "rehearsal"},
    {"reasons"},
    {"best", "check", "mirror"},
    {"unlearn"},
    {"launch"},
    {"join"},
    {"tune"},
    {"experiment"},
    {"sequence"},
    {"display", "tables", "status", "verify", "report", "plan"},  # read run folders; ASIDE says what they may import
    {"cli", "ask"},
    {"sweep"},
    {"__main__"},
]
ASIDE = LAYERS[-4]
# Narrower than the layer: an optimizer is one copyable file, a metric a pure function of answers.
ONLY: dict[str, set[str]] = {
    "optim": set(),
    "metrics": {"answers"},
    **{name: {"results", "answers", "metrics", "errors", "files"} | ASIDE for name in ASIDE},
}

FILES = sorted(PACKAGE.rglob("*.py"))
# Imported by what carries out a trial of `tune`, but no edit of them changes its numbers.
NO_NUMBER = {
    *("best", "checkpoints", "errors", "files", "fulldisk", "mirror", "progress", "results"),
    *("suite", "toxicity"),  # a trial is asked for its forget quality and its retain probability only
}


def layer_name(file: Path) -> str:
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
    for layer in LAYERS:
        if name in layer:
            break
        earlier |= layer
    return ONLY.get(name, earlier) | {name, "__init__"}


def below(name: str) -> set[str]:
    """The names that the module or package `name` imports."""
    files = [file for file in FILES if layer_name(file) == name]
    sources = [(file.read_text(encoding="utf-8"), list(file.relative_to(PACKAGE).parent.parts)) for file in files]
    return {target for source, parts in sources for _, target in imported(source, ["soul_exp", *parts])}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_from_earlier_layers(file: Path) -> None:
    name = layer_name(file)
    assert any(name in layer for layer in LAYERS), f"soul_exp/{name} has no layer: add it to LAYERS in {__file__}"
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


def test_an_edit_of_anything_that_a_trial_imports_and_that_may_change_its_numbers_makes_it_anew() -> None:
    reached, new = {"unlearn"}, {"unlearn"}
    while new:
        new = {target for name in new for target in below(name)} - reached
        reached |= new
    hashed = {file for pattern in tune.CODE for file in PACKAGE.glob(pattern)}
    not_hashed = {layer_name(file) for file in FILES if file not in hashed}
    assert not_hashed & (reached - {"__init__"}) == NO_NUMBER


def test_no_name_stands_in_two_layers() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))
