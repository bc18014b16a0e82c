"""`python -m soul_exp.export`: a run's model with a model card."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from test_tables import made

from soul_exp import export, results
from soul_exp.errors import UsageError
from soul_exp.files import hashes


def a_run(folder: Path, **changes: Any) -> Path:
    """A run folder with a model of one file of weights, and results that state it."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text("{}")
    (model / "unlearned.json").write_text("{}")
    run = made()
    sha = {"records": {}, "models": {"unlearned": hashes(model, "*.safetensors")}, "code": "c"}
    given = {"sha256": sha, "config": {**run.config, "model": {"path": "lab/base-7b"}}, **changes}
    results.write(folder, replace(run, **given))
    return folder


def test_weights_and_a_card_of_what_was_measured_are_exported_and_nothing_that_resumes(tmp_path: Path) -> None:
    to = export.export(a_run(tmp_path / "run"), tmp_path / "out")
    assert sorted(path.name for path in to.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = ModelCard.load(to / "README.md")
    assert card.data.base_model == "lab/base-7b" and card.data.library_name == "transformers"
    assert {"unlearning", "loss-npo", "optimizer-adam"} <= {*card.data.tags}
    line = next(line for line in card.text.splitlines() if line.startswith("MIA AUC"))
    assert line.split()[2:5] == ["1.000", "0.700", "0.400"]
    assert "It was not attacked" in card.text
    assert hashes(to, "*.safetensors")["model.safetensors"] in card.text


def test_a_file_that_is_no_part_of_a_model_stops_the_export(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "model" / "optimizer.pt").write_bytes(b"momentum of the forget set")
    with pytest.raises(UsageError, match=r"model has optimizer\.pt, expected weights, configuration and tokenizer"):
        export.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_exported_as_one(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "model" / "adapter_config.json").write_text("{}")
    assert ModelCard.load(export.export(run, tmp_path / "out") / "README.md").data.library_name == "peft"


def test_text_of_a_run_ends_no_block_of_the_card(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", caption="```\n# Forged\x1b[2J")
    text = (export.export(run, tmp_path / "out") / "README.md").read_text()
    assert "\x1b" not in text and text.count("```") == 4
    assert not any(line.startswith("# Forged") for line in text.split("```")[0].splitlines())


def test_a_collapsed_or_diverged_model_says_so(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", collapsed={"forget": "half are commas"}, status="diverged", reason="loss is nan")
    text = (export.export(run, tmp_path / "out") / "README.md").read_text()
    assert "COLLAPSED" in text and "DIVERGED: loss is nan" in text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "model" / "model.safetensors").write_bytes(b"others"), "not the file that was measured"),
        (lambda run: (run / "model").rename(run / "elsewhere"), "save=final"),
        (lambda run: (run / "results.json").unlink(), "has no results.json"),
        (lambda run: (run.parent / "out").write_text(""), "is a file"),
        (lambda run: ((run.parent / "out").mkdir(), (run.parent / "out" / "x").touch()), "is not empty"),
    ],
)
def test_what_cannot_be_exported_is_an_error(tmp_path: Path, spoil: Any, message: str) -> None:
    run = a_run(tmp_path / "run")
    spoil(run)
    with pytest.raises(UsageError, match=message):
        export.export(run, tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_run_that_only_measured_names_its_checkpoint(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", config={**made(stages=("evaluate",)).config, "model": {"path": "lab/other"}})
    with pytest.raises(UsageError, match="it measured lab/other"):
        export.export(run, tmp_path / "out")


def test_the_command_says_what_it_wrote_and_exits_2_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = a_run(tmp_path / "run"), tmp_path / "out"
    monkeypatch.setattr(export, "open_standard_streams", lambda: None)  # those of the tests
    monkeypatch.setattr(sys, "argv", ["export", str(run), str(out)])
    export.main()
    assert "hf upload" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        export.main()
    assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1
