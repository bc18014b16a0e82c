"""Lines, modules, and imports between the top-level modules and packages of a checkout: `size.py [CHECKOUT ...]`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def modules(package: Path) -> list[Path]:
    """The modules of the package, the tables of embedded data apart."""
    return sorted(file for file in package.rglob("*.py") if not file.stem.endswith("_tables"))


def imported(file: Path, package: Path) -> Iterator[str]:
    """The top-level module or package below soul_exp of each import in `file`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "soul_exp":
            for alias in node.names:
                name = f"{node.module}.{alias.name}".split(".")[1]
                if (package / name).is_dir() or (package / f"{name}.py").is_file():
                    yield name


def levels(edges: dict[str, set[str]]) -> int:
    """The number of levels: a module is one above the highest that it imports. There are no cycles."""

    def level(name: str) -> int:
        return 1 + max((level(below) for below in edges.get(name, ())), default=0)

    return max(map(level, edges))


def main() -> None:
    print(f"{'checkout':<40} {'lines':>7} {'code':>7} {'modules':>8} {'top':>5} {'levels':>7} {'imports':>8}")
    for checkout in [Path(path) for path in sys.argv[1:]] or [HERE]:
        package = checkout / "soul_exp"
        lines, code, edges = 0, 0, dict[str, set[str]]()
        for file in modules(package):
            source = file.read_text(encoding="utf-8")
            texts = {
                line
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
            }
            written = [line.strip() for number, line in enumerate(source.splitlines(), 1) if number not in texts]
            lines += len(source.splitlines())
            code += sum(bool(line) and not line.startswith("#") for line in written)
            top = file.relative_to(package).with_suffix("").parts[0]
            edges.setdefault(top, set()).update(set(imported(file, package)) - {top})
        count = sum(map(len, edges.values()))
        row = (lines, code, len(modules(package)), len(edges), levels(edges), count)
        print(f"{checkout.name:<40} {row[0]:>7} {row[1]:>7} {row[2]:>8} {row[3]:>5} {row[4]:>7} {row[5]:>8}")


if __name__ == "__main__":
    main()
