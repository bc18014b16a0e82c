"""A cached model, answer or trial is used again while the VERSION of the code behind it stands.

So a change to that code must come with a decision: raise the version where a number changes, or keep it. Either is made
by writing the digests anew: `python tests/test_versions.py`.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

import pytest

from soul_exp.artifacts import prepared_models
from soul_exp.evaluation import lm_eval_suite
from soul_exp.stages import tune
from soul_exp.tasks import scorers

PACKAGE, WRITTEN = Path(__file__).parents[1] / "soul_exp", Path(__file__).with_name("versions.json")
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


def files(patterns: tuple[str, ...], without: tuple[str, ...]) -> list[Path]:
    left_out = {file for pattern in without for file in PACKAGE.glob(pattern)}
    return sorted({file for pattern in patterns for file in PACKAGE.glob(pattern)} - left_out)


class Texts(ast.NodeTransformer):
    """Takes out what changes no number: docstrings, log lines and the texts of errors."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        is_log = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith("log.")
        return None if is_text or is_log else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise(exc=None, cause=None)


def digest(name: str) -> str:
    """Of the code that the version `name` covers; comments, layout, docstrings and messages do not matter."""
    _, patterns, without = VERSIONS[name]
    code = [
        ast.dump(Texts().visit(ast.parse(file.read_text()))) if file.suffix == ".py" else file.read_text()
        for file in files(patterns, without)
    ]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


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


if __name__ == "__main__":
    now = {name: {"version": version, "digest": digest(name)} for name, (version, *_) in VERSIONS.items()}
    WRITTEN.write_text(json.dumps(now, indent=1) + "\n")
