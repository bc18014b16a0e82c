"""Results that were written before modules moved are still those of the same command: tests/data/old_runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composing import composed

from soul_exp import compose, experiment, results, sequence
from soul_exp.artifacts import prepared_models
from soul_exp.errors import UsageError

OLD = Path(__file__).parent / "data" / "old_runs"  # results.json less metrics; written at f60d2de
PLAIN = "task.train_varied=false"  # the only way at that time
TYPED = {
    "main": [PLAIN, "loss=npo"],
    "lora": [PLAIN, "loss=npo", "train.max_steps=12", "adapter=lora", "input_based=true"],
    "ablation": [
        PLAIN, "experiment=ablation_rho", "budget=smoke", "optimizer.rho=1", "tune.gamma=[10]", "train.epochs=1",
        "seed=0", "task.general_validation_fraction=0",  # which a run that tunes did not have at that time
    ],
    "custom": [
        "task=custom", "task.forget=/data/forget.jsonl", "task.retain=/data/retain.jsonl",
        "task.holdout=/data/holdout.jsonl", "train.epochs=2", "train.log_gradients=true",
    ],
}  # fmt: skip


@pytest.fixture
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the old run `request.param`; what of its data depends on the machine is taken as it is now."""
    shutil.copy(OLD / f"{request.param}.json", tmp_path / results.NAME)
    found = results.read(tmp_path)
    assert found is not None
    monkeypatch.setattr(prepared_models, "data_hashes", lambda _: dict(found.data_hashes))
    return tmp_path


def finished(out: Path, *typed: str) -> results.Results | None:
    """What a command finds in `out`."""
    config: dict[str, Any] = composed(out, *typed)
    if config["tuned"]:
        config["optimizer"]["lr"] = 6e-4  # which conf/tuned/ stated for npo with sophia at that time
    config["tuned"] = compose.tuned_on(config, typed) and "embedded TOFU"  # as the entry called its data at that time
    run: Any = SimpleNamespace(overwrite=False)  # else read for its data only
    return experiment.finished(sequence._alone(config), run, out)


@pytest.mark.parametrize(("out", "name"), [(name, name) for name in TYPED], indirect=["out"])
def test_the_same_command_finds_it_finished(name: str, out: Path) -> None:
    found = finished(out, *TYPED[name], "name=another", "compute.threads=2")
    assert found is not None and found.num_steps > 0


@pytest.mark.parametrize(
    ("out", "name", "changed", "message"),
    [
        ("main", "main", "loss.gamma=11", "loss.gamma: 10.0 before, 11 now"),
        ("lora", "lora", "adapter.r=8", "adapter.r: 16 before, 8 now"),
        ("ablation", "ablation", "tune.rule.keep=0.8", "tune.rule.keep: 0.9 before, 0.8 now"),
        ("ablation", "ablation", "tune.lr=[0.5]", r"optimizer.lr: \[0.00015, 0.0006\] before, \[0.00015\] now"),
        ("custom", "custom", "task.lead_words=4", "task.lead_words: None before, 4 now"),
    ],
    indirect=["out"],
)
def test_another_number_is_another_run(name: str, changed: str, message: str, out: Path) -> None:
    with pytest.raises(UsageError, match=message):
        finished(out, *TYPED[name], changed)


@pytest.mark.parametrize("out", ["main"], indirect=True)
def test_an_embedding_that_it_did_not_know_is_no_difference_and_another_one_is(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = prepared_models.data_hashes(None)  # type: ignore[arg-type]
    monkeypatch.setattr(prepared_models, "data_hashes", lambda _: {**hashes, "embedding": "new"})
    assert finished(out, *TYPED["main"]) is not None
    content = json.loads((out / results.NAME).read_text())
    content["data_hashes"]["embedding"] = "old"
    (out / results.NAME).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"\(data embedding differ\)"):
        finished(out, *TYPED["main"])


@pytest.mark.parametrize("out", ["lora", "ablation"], indirect=True)
def test_a_path_that_has_moved_is_read_under_todays_name(out: Path) -> None:
    text, found = (out / results.NAME).read_text(), results.read(out)
    assert "soul_exp.adapters.Lora" in text or "soul_exp.tune.best_forgetting" in text
    assert (
        found is not None and "soul_exp.adapters" not in str(found.config) and "soul_exp.tune." not in str(found.config)
    )
