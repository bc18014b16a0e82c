"""A cached model, answer or trial is used again while the VERSION of the code behind it stands.

So a change to that code must come with a decision: raise the version where a number changes, or keep it. Either is made
by writing the digests anew: `python tests/test_versions.py`.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from soul_exp.artifacts import answer_cache, attack_cache, code, prepared_models
from soul_exp.artifacts.code import code_hash
from soul_exp.evaluation import lm_eval_suite
from soul_exp.stages import tune
from soul_exp.tasks import scorers

PACKAGE, WRITTEN = code.PACKAGE, Path(__file__).with_name("versions.json")
SUITE = ("evaluation/lm_eval_*.py", "tasks/embedded/general_suite*.py")
SCORER = ("tasks/scorers.py",)
VERSIONS = {  # what is declared -> the version now, the files that it covers, and of these the ones of another version
    "prepared_models": (
        prepared_models.VERSION,
        (
            *("artifacts/*.py", "binding.py", "compat.py", "data.py", "evaluation/*.py", "losses/*.py", "metrics/*.py"),
            *("models/*.py", "optim/**/*.py", "optim/**/*.c", "stages/prepare.py", "stages/unlearn.py"),
            *("tasks/**/*.py", "training/*.py"),
        ),
        SUITE + SCORER,
    ),
    "tune": (tune.VERSION, ("stages/tune.py", "stages/selection.py"), ()),
    "lm_eval_suite": (lm_eval_suite.VERSION, SUITE, ()),
    "toxicity": (scorers.VERSION, SCORER, ()),
}


def digest(name: str) -> str:
    """Of the code that the version `name` covers; comments, layout, docstrings and messages do not matter."""
    _, patterns, without = VERSIONS[name]
    return code_hash(patterns, without)


@pytest.mark.parametrize("name", VERSIONS)
def test_the_code_behind_what_is_cached_has_not_changed_since_its_version_was_decided(name: str) -> None:
    found = {"version": VERSIONS[name][0], "digest": digest(name)}
    assert found == json.loads(WRITTEN.read_text())[name], (
        f"code that the VERSION of {name} covers has changed: raise it if a prepared weight, an answer, a trial or a "
        f"score may change with it; then, either way, write the digests anew: python tests/test_versions.py"
    )


@pytest.mark.parametrize("name", VERSIONS)
def test_every_pattern_matches_a_file(name: str) -> None:
    for pattern in VERSIONS[name][1] + VERSIONS[name][2]:
        assert list(PACKAGE.glob(pattern)), pattern


# What evaluating imports and no answer depends on: ranks, files, errors, types of options, losses, other metrics.
IDLE = (
    "__init__ binding distributed/__init__ distributed/ranks errors files hub losses/__init__ losses/terms "
    "metrics/membership metrics/scale ranges"
).split()


def modules_of(file: Path) -> set[Path]:
    """The files of the package that `file` imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        for name in dotted(node):
            path = PACKAGE.joinpath(*name.split(".")[1:])
            found |= {each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()}
    return found


def dotted(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.startswith("soul_exp")]
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("soul_exp"):
        return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


# What attacking imports and no point depends on: ranks, files, errors, types and names of options.
IDLE_OF_ATTACKS = (
    "__init__ binding distributed/__init__ distributed/ranks errors files hub options ranges schema".split()
)


def left_out(reached: set[Path], patterns: tuple[str, ...]) -> list[str]:
    """The modules that those `reached` import, directly or not, and that `patterns` do not match."""
    while (more := {each for file in reached for each in modules_of(file)} | reached) != reached:
        reached = more
    left = reached - set(code.files(patterns))
    return sorted(file.relative_to(PACKAGE).with_suffix("").as_posix() for file in left)


def test_cached_answers_are_keyed_by_all_code_that_evaluating_runs() -> None:
    reached = {PACKAGE / "evaluation" / "probing.py", PACKAGE / "tasks" / "scorers.py"}
    assert left_out(reached, answer_cache.CODE) == sorted(IDLE)


def test_cached_points_are_keyed_by_all_code_that_attacking_runs() -> None:
    assert left_out(set((PACKAGE / "attacks").glob("*.py")), attack_cache.CODE) == IDLE_OF_ATTACKS


def test_folders_among_the_code_such_as_compiled_files_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    (tmp_path / "a.c").write_text("int x;")
    before = code_hash.__wrapped__(("*",))
    (tmp_path / "__pycache__").mkdir()
    assert code_hash.__wrapped__(("*",)) == before


def test_a_hash_of_code_changes_with_the_code_and_not_with_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    found = []
    for number in ("1", "1  # one", "2"):
        (tmp_path / "a.py").write_text(f'"""Text {len(found)}."""\nx = {number}\n')
        found.append(code_hash.__wrapped__(("*.py",)))
    assert found[0] == found[1] != found[2]


if __name__ == "__main__":
    now = {name: {"version": version, "digest": digest(name)} for name, (version, *_) in VERSIONS.items()}
    WRITTEN.write_text(json.dumps(now, indent=1) + "\n")
