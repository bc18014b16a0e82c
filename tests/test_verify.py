"""`python -m soul_exp.verify`: a run folder proves its own numbers, and says which file or number is not its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import starts
from starts import TINY

from soul_exp import results, verify
from soul_exp.evaluation.records import read_records, write_records
from soul_exp.files import hashes, read_sealed, seal, write_sealed
from soul_exp.metrics import membership, tofu
from soul_exp.metrics.scale import Scale
from soul_exp.training.checkpoints import COMPLETE


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
    agreement = re.fullmatch(
        rf"{finished}: (\d+) of (\d+) numbers agree with the records\n(  note: stated as not .*\n)?", text
    )
    assert agreement is not None and agreement[1] == agreement[2]
    stated = [value for values in run.metrics.values() for value in values.values() if value is not None]
    assert int(agreement[1]) > len(stated) + 3


def test_accuracy_comes_from_the_recorded_cosines_and_the_releases_truth_ratio_from_records(out: Path) -> None:
    run = results.read(out)
    path = out / "records" / "unlearned" / "forget.jsonl"
    forget = read_records(path)
    assert run is not None and run.metrics["unlearned"]["forget_accuracy"] == tofu.accuracy(forget)
    assert set(forget.embedding or ()) == {"character n-grams of 2, 3, 4, version 1"}
    release = verify.in_dialect(out, "soul_release").metrics["unlearned"]["forget_truth_ratio"]
    assert release == tofu.soul_release_truth_ratio(forget) != run.metrics["unlearned"]["forget_truth_ratio"]
    cosines = forget.numbers("similarity") + np.array([2, 0, 0, 0, 0, 0])  # the first is the nearest now
    write_records(path, replace(forget, similarity=cosines))
    (path.parent / COMPLETE).unlink()
    resealed(out)
    value = run.metrics["unlearned"]["forget_accuracy"]
    line = f"metrics.unlearned.forget_accuracy: stated {value}, its records give 1.0"
    assert value != 1 and line in verify.verify(out).problems


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


def without_model(run: dict[str, Any]) -> None:
    for key in [key for key in run["sha256"]["records"] if key.startswith("original/")]:
        del run["sha256"]["records"][key]


def in_metrics(name: str, **entry: Any) -> Callable[[dict[str, Any]], None]:
    return lambda run: run["config"]["task"]["metrics"][name].update(entry)


@pytest.mark.parametrize(
    ("change", "line"),
    [  # a wrong number that is hidden, and one that a field beside the metrics states
        (lambda run: (run["metrics"]["unlearned"].update(mia_auc=0.9), run["reasons"].update(mia_auc="none")),
         r"metrics\.unlearned\.mia_auc: stated 0\.9, its records give 0\..*"),
        (lambda run: run["metrics"]["unlearned"].update(mine=1.0), r"metrics\.unlearned\.mine: stated 1\.0, .* None"),
        (lambda run: run["config"]["task"].update(metrics={}), r"metrics\.original\.mia_auc: .* give None"),
        (without_model, "original: it has no records, which its numbers must come from"),
        (lambda run: run.update(suite={"unlearned": {"boolq": {"acc": 0.9}}}), r"suite\.unlearned\.boolq\.acc: .*"),
        (lambda run: run["no_interval"].update(forget_quality="mine"), r"no_interval\.forget_quality: stated mine, .*"),
        (lambda run: run.update(status="great"), "status: great with the reason None, expected .*"),
        (lambda run: run["config"].update(seed=5), r"seeds\.seed: 0, but 5 in config"),
        (lambda run: run["sha256"]["models"].pop("retrained"), r"retrained: .* sha256\.models does not name it"),
        (lambda run: run.update(unit="item"), "unit: item, but its records name author"),
        (lambda run: run["metric_versions"].update(mine=1), "metric_versions.mine: no metric of this run .*"),
        (lambda run: run["metric_versions"].pop("mia_auc"), "mia_auc: stored by version None of its definition, .*"),
        (lambda run: run["reasons"].update({"unlearned.mine": "none"}), "reasons.unlearned.mine: no metric .*"),
        # what cannot be computed or read
        (lambda run: run["sha256"].pop("models"), r".* is not a results file of format 1 \(sha256 is .*"),
        (lambda run: run["metrics"]["unlearned"].update(mia_auc=10**400), ".* is not a results file of format 1 .*"),
        (lambda run: run.update(seeds={}), r".*: seeds\.seed is None, expected a whole number .*"),
        (lambda run: run["config"].update(dialect="zulu"), r".*: config\.dialect is zulu, expected one of ours, .*"),
        (lambda run: run["config"]["task"].pop("metrics"), r"task\.metrics=None: expected names with .*"),
        (in_metrics("mia_auc", k="a"), r"metrics: they cannot be computed from the records \(.*"),
    ],
)  # fmt: skip
def test_what_does_not_come_from_the_records_is_one_line(
    change: Callable[[dict[str, Any]], Any], line: str, out: Path, command: Run
) -> None:
    edited(out, change)
    code, text, error = command(out)
    assert code == 1 and not error and any(re.fullmatch(f"  {line}", each) for each in text.splitlines()), text


def resealed(folder: Path) -> None:
    """Makes COMPLETE and results.json agree with the records of the unlearned model."""
    seal(folder / "records" / "unlearned" / COMPLETE, {})
    edited(folder, lambda run: run["sha256"].update(records=hashes(folder / "records", "*")))


def test_records_that_are_changed_with_all_their_hashes_are_read_again(out: Path, command: Run) -> None:
    marker, forget = (out / "records" / "unlearned" / name for name in (COMPLETE, "forget.jsonl"))
    content = forget.read_text()
    forget.write_text("".join(content.splitlines(keepends=True)[:-1]))
    marker.unlink()
    resealed(out)
    code, text, _ = command(out)
    assert code == 1 and "  metrics.unlearned.forget_probability: stated " in text
    forget.write_text(content[:-9])
    marker.unlink()
    resealed(out)
    code, text, _ = command(out)
    assert code == 1 and "  unlearned: not recomputed, as its records cannot be read (" in text


def test_a_marker_that_leaves_out_a_file_of_the_records_is_named(out: Path, command: Run) -> None:
    marker = out / "records" / "unlearned" / COMPLETE
    content = read_sealed(marker)
    assert isinstance(content, dict) and content["files"].pop("holdout.jsonl")
    write_sealed(marker, {"files": content["files"]})
    edited(out, lambda run: run["sha256"].update(records=hashes(out / "records", "*")))
    code, text, _ = command(out)
    assert code == 1 and "records/unlearned/COMPLETE: it does not list the files that results.json does" in text


def test_notes_say_what_was_not_compared(out: Path, command: Run) -> None:
    shutil.rmtree(out / "model")
    edited(out, in_metrics("mia_loss_tpr_10", rate=0.1000001))
    edited(out, lambda run: run["metrics"].update({m: {**v, "utility": None} for m, v in run["metrics"].items()}))
    edited(out, lambda run: (run["reasons"].update(utility="none"), run.update(utility=None)))
    edited(out, lambda run: run["intervals"].update({m: {**v, "utility": None} for m, v in run["intervals"].items()}))
    edited(out, lambda run: [run["no_interval"].pop(key) for key in [*run["no_interval"]] if key.endswith("utility")])
    text = command(out)[1]
    assert "  note: model: not here, so that the weights are not compared\n" in text
    assert "  note: not what conf/ calls so, as config.task.metrics says: mia_loss_tpr_10\n" in text
    assert re.search("  note: stated as not available, so not computed: .*utility", text)


def outside(path: Path) -> Path:
    """`path`, moved out of the run's folder."""
    return path.rename(path.parents[len(path.parts) - path.parts.index("copy") - 2] / f"outside {path.name}")


def hard_link(path: Path) -> None:
    os.link(outside(path), path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda out: (out / "records" / "more").mkdir(), "records/more: a folder that this run did not write"),
        (lambda out: (out / "records" / "original" / "a" / "b").mkdir(parents=True),
         "records/original/a/b: a folder that this run did not write"),
        (lambda out: os.mkfifo(out / "records" / "pipe"), "records/pipe: a file that this run did not write"),
        (lambda out: (out / "records" / "more").symlink_to(out / "model"), "records/more: a link to .*/model, .*"),
        (lambda out: (out / "records" / "more").symlink_to("nowhere"), "records/more: a link to nowhere, which .*"),
        # of the same content
        (lambda out: (path := out / "records" / "unlearned" / "forget.jsonl").symlink_to(outside(path)),
         r"records/unlearned/forget.jsonl: a link to .*/outside forget.jsonl, which may be changed there"),
        (lambda out: (path := out / "records" / "retrained").symlink_to(outside(path)), "records/retrained: a link .*"),
        (lambda out: (path := out / "records").symlink_to(outside(path)), "records: a link .*"),
        (lambda out: hard_link(out / "records" / "unlearned" / "forget.jsonl"),
         r"records/unlearned/forget.jsonl: it has 2 names \(hard links\), and may be changed under another"),
        (lambda out: hard_link(out / "model" / "model.safetensors"), r"model/model.safetensors: it has 2 names .*"),
        (lambda out: (path := out / "model" / "model.safetensors").symlink_to(outside(path)),
         "model/model.safetensors: a link .*"),
    ],
)  # fmt: skip
def test_a_folder_or_a_link_that_the_run_did_not_write_is_named(
    change: Callable[[Path], Any], line: str, out: Path, command: Run
) -> None:
    change(out)
    code, text, error = command(out)
    assert code == 1 and not error and any(re.fullmatch(f"  {line}", each) for each in text.splitlines()), text


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
