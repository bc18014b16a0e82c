"""`python -m soul_exp.verify`: a run folder proves its own numbers, and says which file or number is not its own."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import starts
from starts import TINY

from soul_exp import results, verify
from soul_exp.evaluation.records import read_records
from soul_exp.metrics import membership
from soul_exp.metrics.scale import Scale


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that kept its model."""
    place = tmp_path_factory.mktemp("verify")
    run = starts.type_(place, *TINY, "hydra.run.dir=finished", "save=final", "input_based=true")
    assert run.returncode == 0, run.stderr
    return place / "finished"


@pytest.fixture
def out(finished: Path) -> Iterator[Path]:
    copy = Path(shutil.copytree(finished, finished.with_name("copy")))
    yield copy
    shutil.rmtree(copy)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Types the command in this process; returns exit code, standard output and standard error."""

    def typed(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            verify.main()
        return int(end.value.code or 0), *capfd.readouterr()

    return typed


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / results.NAME).read_text())
    change(content)
    (folder / results.NAME).write_text(json.dumps(content))


def test_the_records_of_every_compared_model_give_every_number_again(finished: Path, command: Run) -> None:
    run = results.read(finished)
    assert run is not None and {path.name for path in (finished / "records").iterdir()} == set(run.metrics)
    assert set(run.metrics) == {"original", "input_based", "unlearned", "retrained"}
    code, text, error = command(finished)
    assert code == 0 and not error and (code, text, error) == command(finished.parent)
    agreement = re.fullmatch(rf"{finished}: (\d+) of (\d+) numbers agree with the records\n", text)
    assert agreement is not None and agreement[1] == agreement[2]
    stated = [value for values in run.metrics.values() for value in values.values() if value is not None]
    assert int(agreement[1]) > len(stated) + 3


def test_stored_numbers_are_not_read_to_recompute_them(out: Path, command: Run) -> None:
    edited(out, lambda run: run["metrics"]["retrained"].update(mia_auc=0.25))
    records = [read_records(out / "records" / "retrained" / f"{name}.jsonl") for name in ("forget", "holdout")]
    value = membership.mia_auc(*records, k=0.2)
    code, text, _ = command(out)
    assert code == 1 and f"  metrics.retrained.mia_auc: stated 0.25, its records give {value}\n" in text


@pytest.mark.parametrize(
    "name", ["records/original/forget.jsonl", "records/unlearned/COMPLETE", "model/model.safetensors"]
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), ""),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"1", b"2", 1)), ""),
    ],
)
def test_a_file_that_is_gone_cut_or_changed_is_named(
    name: str, damage: Callable[[Path], Any], message: str, out: Path, command: Run
) -> None:
    damage(out / name)
    code, text, _ = command(out)
    (line,) = (line for line in text.splitlines() if line.startswith(f"  {name}: "))
    assert code == 1 and message in line
    model = Path(name).parts[1]
    assert (f"  {model}: not recomputed" in text) == name.startswith("records/")


def test_a_foreign_file_is_named_and_the_numbers_are_recomputed(out: Path, command: Run) -> None:
    (out / "records" / "unlearned" / "extra.jsonl").write_text('{"nll": 1}\n')
    code, text, _ = command(out)
    assert code == 1 and "  records/unlearned/extra.jsonl: a file that this run did not write\n" in text
    assert "not recomputed" not in text


def test_a_metric_of_another_version_is_named_with_its_history(
    finished: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Scale("nearest", 0, 1, history=("first definition", "2: ties count one half"))
    monkeypatch.setattr(membership.mia_auc, "scale", changed)
    code, text, _ = command(finished)
    line = "  mia_auc: stored by version 1 of its definition, here is 2 (2: ties count one half)\n"
    assert code == 1 and line in text


def test_a_headline_number_that_is_not_the_metric_is_named(out: Path, command: Run) -> None:
    edited(out, lambda run: run.update(utility=1.5))
    code, text, _ = command(out)
    assert code == 1 and "  utility: 1.5, but 0." in text and "in metrics.unlearned\n" in text


def test_code_that_conf_does_not_list_is_called_with_trust_only(out: Path, command: Run) -> None:
    entry = {"_target_": "test_verify.constant", "_partial_": True}
    edited(out, lambda run: run["config"]["task"]["metrics"].update(mine=entry))
    code, text, _ = command(out)
    assert code == 1 and "names code that conf/ does not list: test_verify.constant" in text
    code, text, error = command(out, "--trust")
    assert "metrics.unlearned.mine: stated None, its records give 7.0" in text and "test_verify.constant" in error


def constant() -> float:
    return 7.0


def test_a_run_without_records_of_all_models_is_named_and_the_others_are_verified(out: Path, command: Run) -> None:
    other = Path(shutil.copytree(out, out / "other"))
    edited(other, lambda run: run.pop("sha256"))
    code, text, _ = command(out)
    assert code == 1 and "by a version that did not keep the records of all models: run it again" in text
    assert text.count("numbers agree") == 2


def test_a_folder_without_runs_is_one_message(tmp_path: Path, command: Run) -> None:
    assert command(tmp_path) == (2, "", f"soul_exp.verify: found no results.json in {tmp_path} or below it\n")
