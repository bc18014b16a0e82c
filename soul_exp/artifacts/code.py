"""A hash of source code: what is kept of some code's results is found again only while that code stands."""

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@functools.cache
def code_hash(patterns: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """16 hex digits of the files of this package that match `patterns` and none of `without`.

    Comments, layout, docstrings, log lines and the texts of errors do not matter.
    """
    return hashlib.sha256("\n".join(map(_code, files(patterns, without))).encode()).hexdigest()[:16]


def files(patterns: tuple[str, ...], without: tuple[str, ...] = ()) -> list[Path]:
    left_out = {file for pattern in without for file in PACKAGE.glob(pattern)}
    found = {file for pattern in patterns for file in PACKAGE.glob(pattern) if file.is_file()}  # no __pycache__
    return sorted(found - left_out)


def _code(file: Path) -> str:
    text = file.read_text()
    return ast.dump(_Texts().visit(ast.parse(text))) if file.suffix == ".py" else text


class _Texts(ast.NodeTransformer):
    """Takes out what changes no number."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        is_log = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith("log.")
        return None if is_text or is_log else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise(exc=None, cause=None)
