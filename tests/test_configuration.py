"""Configuration stops at build.py: which modules may read the plain configuration, and that a run holds none of it."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from soul_exp import run

PACKAGE = Path(__file__).parents[1] / "soul_exp"
FILES = sorted(PACKAGE.rglob("*.py"))
READERS = {
    *(
        "compose.py",
        "build.py",
        "comparison.py",
        "options.py",
        "schema.py",
        "forecast.py",
    ),  # they make it, or derive from it
    *("experiment.py", "sequence.py"),  # what a finished run, and each request, is compared by
    "stages/tune.py",  # derives trials
}
OF_LIBRARIES = {  # fields of a run's parts that are mappings, each with the library whose options it holds
    ("Scratch", "config"): "transformers",
    ("Preparation", "adamw"): "torch",
    ("Compute", "deepspeed"): "deepspeed",
    ("ModelSettings", "training_form"): "what is hashed for the cache's key, never read by name",
    ("Schedule", "lr_scheduler_kwargs"): "transformers",
    ("Preparation", "identity"): "what is hashed for the cache's key, never read by name",
    ("Models", "metrics"): "functions by name, no options",
    ("Run", "metrics"): "functions by name, no options",
    ("Run", "attacks"): "attacks by name, no options",
    ("Run", "attack_metrics"): "functions by name, no options",
}


def reads(source: str) -> Iterator[int]:
    """The lines that index a variable called config, or call its get."""
    for node in ast.walk(ast.parse(source)):
        is_read = isinstance(node, ast.Subscript) or (
            isinstance(node, ast.Attribute) and node.attr in ("get", "items", "values", "keys")
        )
        if is_read and isinstance(node.value, ast.Name) and node.value.id == "config":
            yield node.lineno


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_what_composes_builds_checks_and_compares_reads_the_configuration(file: Path) -> None:
    name = name_of(file)
    if name in READERS or name.startswith("checks/"):
        return
    assert list(reads(file.read_text())) == [], f"soul_exp/{name} reads config[...]: take a field of the Run instead"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_build_instantiates_a_target(file: Path) -> None:
    assert ("hydra.utils" in file.read_text()) is (name_of(file) == "build.py")


def parts(kind: Any) -> Iterator[tuple[str, str, Any]]:
    """(class, field, type) of `kind` and of every dataclass of soul_exp that it holds, tasks and losses apart."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        annotation = hints[field.name]
        yield kind.__name__, field.name, annotation
        for inner in (annotation, *typing.get_args(annotation)):
            if dataclasses.is_dataclass(inner) and inner.__module__ in ("soul_exp.run", "soul_exp.training.schedule"):
                yield from parts(inner)


def test_no_part_of_a_run_is_a_mapping_of_options() -> None:
    found = {(owner, name): kind for owner, name, kind in parts(run.Run)}
    assert len(found) > 40
    for key, kind in found.items():
        kinds = (kind, *typing.get_args(kind))
        is_mapping = any((typing.get_origin(each) or each) in (dict, Mapping) for each in kinds)
        assert not is_mapping or key in OF_LIBRARIES, f"{key} is a mapping: give its options types of their own"


def test_a_run_and_its_parts_are_frozen() -> None:
    kinds = [kind for kind in vars(run).values() if dataclasses.is_dataclass(kind) and kind.__module__ == run.__name__]
    assert len(kinds) > 8 and all(kind.__dataclass_params__.frozen for kind in kinds)
