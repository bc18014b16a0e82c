"""What is installed runs from anywhere: the wheel holds conf/, and neither it nor a checkout has to be the cwd."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import soul_exp

ROOT = Path(__file__).parents[1]


def test_a_file_that_hides_a_python_module_stops_a_command_before_it_imports_anything(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("x = 1\n")
    for module in ("soul_exp", "soul_exp.tables"):
        done = subprocess.run(
            [sys.executable, "-m", module, "runs"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        expected = f"soul_exp: {tmp_path}/random.py hides the Python module random: rename it, or type the command in "
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{expected}another folder\n")


def test_only_what_python_would_import_hides_a_module(tmp_path: Path) -> None:
    for harmless in ("random.txt", "code.py", "mine.py", "test.py", "soul_exp.py"):
        (tmp_path / harmless).touch()
    for folder in ("datasets", "wandb"):  # without __init__.py
        (tmp_path / folder).mkdir()
    assert soul_exp.hidden_module(str(tmp_path)) is None
    (tmp_path / "datasets" / "__init__.py").touch()
    assert soul_exp.hidden_module(str(tmp_path)) == "datasets"


def test_the_modules_of_every_dependency_may_be_hidden() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split("[<>=]", line)[0].lower().replace("_", "-") for line in dependencies}
    found = packages_distributions().items()
    modules = {module for module, of in found if names & {name.lower().replace("_", "-") for name in of}}
    unused = {"_plotly_utils", "_yaml", "functorch", "mpl_toolkits", "pydevd_plugins", "pylab", "torchgen"}
    assert modules - unused == set(soul_exp.LIBRARIES)


def python(*arguments: str, cwd: Path, path: Path) -> str:
    """The output of this interpreter with `path` as the first place where it looks for packages."""
    environment = {**os.environ, "PYTHONPATH": str(path), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", str(out), cwd=ROOT, path=ROOT)
    (built,) = out.glob("soul_exp-*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_module_and_every_yaml_of_conf(unpacked: Path) -> None:
    def names(folder: Path, pattern: str) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern)}

    assert (unpacked / "soul_exp" / "conf" / "config.yaml").is_file()
    assert names(unpacked / "soul_exp" / "conf", "*.yaml") == names(ROOT / "conf", "*.yaml")
    for kind in ("*.py", "*.mplstyle", "*.css", "*.html", "*.js", "*.csv"):
        assert names(unpacked / "soul_exp", kind) == names(ROOT / "soul_exp", kind)


def test_the_wheel_holds_nothing_but_the_package(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("soul_exp-*.dist-info")
    assert {path.name for path in unpacked.iterdir()} == {"soul_exp", metadata.name}
    assert not list(unpacked.rglob("test_*"))


def test_the_wheel_installs_the_command_and_carries_the_licence(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("soul_exp-*.dist-info")
    assert "soul_exp = soul_exp.cli:main" in (metadata / "entry_points.txt").read_text()
    assert "License-Expression: MIT" in (metadata / "METADATA").read_text()
    assert (metadata / "licenses" / "LICENSE").is_file()


def test_a_wheel_runs_from_another_folder_with_its_own_conf(unpacked: Path, tmp_path: Path) -> None:
    where = python("-c", "from soul_exp import compose; print(compose.conf_dir())", cwd=tmp_path, path=unpacked)
    assert where.strip() == str(unpacked / "soul_exp" / "conf")
    assert_composes_and_checks(unpacked, tmp_path)


def test_a_checkout_runs_from_another_folder(tmp_path: Path) -> None:
    where = python("-c", "from soul_exp import compose; print(compose.conf_dir())", cwd=tmp_path, path=ROOT)
    assert where.strip() == str(ROOT / "conf")
    assert_composes_and_checks(ROOT, tmp_path)


def test_the_lock_pins_every_dependency_and_names_no_machine() -> None:
    first, *lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert first.startswith("# ") and "make lock" in first
    assert all(line.count("==") == 1 and not set(line) & set("+ @/") for line in lines), lines
    assert any(line.startswith("torch==") for line in lines)


def assert_composes_and_checks(path: Path, cwd: Path) -> None:
    printed = python("-m", "soul_exp", "stages=[]", f"cache={cwd / 'cache'}", cwd=cwd, path=path)
    assert "nothing to run" in printed
    assert not (cwd / "runs").exists()
