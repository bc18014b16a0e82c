"""Checkpoints: what counts as complete, what is removed, and what a resumed training takes from one."""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from composing import composed
from conftest import items
from transformers import TrainerCallback

from soul_exp import files, losses
from soul_exp.artifacts import prepared_models
from soul_exp.build import build_models
from soul_exp.data import Part
from soul_exp.errors import UsageError
from soul_exp.losses import Objective
from soul_exp.models.language_model import LanguageModel
from soul_exp.optim import SAM, AdamW, Sophia
from soul_exp.training import checkpoints
from soul_exp.training.checkpoints import Engine, last_complete
from soul_exp.training.schedule import Schedule
from soul_exp.training.train import Outcome, train

ENGINE = Engine("cpu", 1)
NPO = Objective(functools.partial(losses.npo, beta=0.1), "kl")
SGD = functools.partial(torch.optim.SGD, lr=0.05)  # without momentum it has no state that could be lost


def written(folder: Path, *steps: int) -> list[Path]:
    """Checkpoints with one file in a folder each, marked one after the other."""
    made = []
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        (checkpoint / "global_step").mkdir(parents=True)
        (checkpoint / "global_step" / "optimizer.pt").write_bytes(b"state" * step)
        checkpoints.mark_complete(checkpoint, seconds=step, engine=ENGINE, diverged=None, notes=["a note"])
        made.append(checkpoint)
    return made


def test_a_marked_checkpoint_is_found_with_all_that_its_marker_says(tmp_path: Path) -> None:
    written(tmp_path, 5, 10)
    found = last_complete(tmp_path)
    assert found is not None and found.step == 10
    assert found.seconds == 10 and found.engine == ENGINE and found.notes == ["a note"]
    assert list(found.files) == ["global_step/optimizer.pt"]
    assert found.files["global_step/optimizer.pt"][0] == 50


@pytest.mark.parametrize("stage", [2, None])
def test_a_pickled_checkpoint_that_another_user_could_have_written_is_not_resumed_from(
    stage: int | None, make_suspect: Callable[[Path], None], tmp_path: Path
) -> None:
    """A planted pickle runs code as DeepSpeed reads it; without DeepSpeed the library reads no pickle."""
    (checkpoint,) = written(tmp_path, 5)
    found, engine = last_complete(tmp_path), replace(ENGINE, stage=stage)
    assert found is not None
    found = replace(found, engine=engine)
    assert checkpoints.obstacle(tmp_path, found, engine) is None
    planted = checkpoint / "global_step" / "optimizer.pt"
    make_suspect(planted)
    reason = checkpoints.obstacle(tmp_path, found, engine)
    if stage is None:
        assert reason is None
    else:
        assert reason is not None and reason.startswith(
            f"another user could have written {planted}, and DeepSpeed reads pickled files"
        )
        assert "type resume=weights" in reason and "resume=restart" in reason


def test_the_two_newest_by_step_stay_whatever_their_times(tmp_path: Path) -> None:
    written(tmp_path, 100, 95, 90)  # the oldest by step was written last
    written(tmp_path, 105)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-100", "checkpoint-105"}


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no COMPLETE marker": lambda path: (path / "COMPLETE").unlink(),
    "COMPLETE: not a marker": lambda path: (path / "COMPLETE").write_text("12.5"),
    "COMPLETE: checksum differs": lambda path: (path / "COMPLETE").write_text(
        (path / "COMPLETE").read_text().replace('"cpu"', '"cpv"')
    ),
    "global_step/optimizer.pt: missing": lambda path: shutil.rmtree(path / "global_step"),
    "global_step/optimizer.pt: 49 bytes, expected 50": lambda path: (path / "global_step/optimizer.pt").write_bytes(
        b"state" * 9 + b"stat"
    ),
    "global_step/optimizer.pt: checksum differs": lambda path: (path / "global_step/optimizer.pt").write_bytes(
        b"state" * 9 + b"stave"
    ),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_logged_with_the_reason_and_removed(
    reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[reason](written(tmp_path, 5, 10)[1])
    found = last_complete(tmp_path)
    assert found is not None and found.step == 5
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(f"checkpoint-10 is damaged ({reason}") and message.endswith(
        "checkpoint-5 is used instead"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]  # else it would be counted, and 5 deleted


SEALED: dict[str, Callable[[Path], Any]] = {
    "no done.json marker": lambda folder: (folder / "done.json").unlink(),
    "done.json: not a marker": lambda folder: (folder / "done.json").write_text("[]"),
    "done.json: checksum differs": lambda folder: (folder / "done.json").write_text(
        (folder / "done.json").read_text().replace("mine", "thine")
    ),
    "deep/a.txt: missing": lambda folder: (folder / "deep" / "a.txt").unlink(),
    "deep/a.txt: 4 bytes, expected 5": lambda folder: (folder / "deep" / "a.txt").write_text("four"),
    "deep/a.txt: checksum differs": lambda folder: (folder / "deep" / "a.txt").write_text("fivf\n"),
}


@pytest.mark.parametrize("reason", SEALED)
def test_a_sealed_folder_that_differs_from_its_marker_is_named_once_and_not_used(
    reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("five\n")
    files.seal(tmp_path / "done.json", {"whose": "mine"})
    found = files.read_intact(tmp_path / "done.json")
    assert found is not None and found["whose"] == "mine" and found["files"]["deep/a.txt"][0] == 5
    SEALED[reason](tmp_path)
    assert files.read_intact(tmp_path / "done.json") is None and not files.is_intact(tmp_path / "done.json")
    (record,) = caplog.records
    assert record.message.startswith(f"{tmp_path} is damaged ({reason}") and record.message.endswith("it is not used")


def test_without_a_complete_checkpoint_the_start_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    DAMAGES["no COMPLETE marker"](written(tmp_path, 5)[0])
    assert last_complete(tmp_path) is None and last_complete(tmp_path / "nowhere") is None
    assert "the start is used instead" in caplog.text and not list(tmp_path.iterdir())


def test_an_older_checkpoint_whose_deletion_was_cut_short_is_not_kept_in_place_of_a_complete_one(
    tmp_path: Path,
) -> None:
    first, _ = written(tmp_path, 5, 10)
    (first / "global_step" / "optimizer.pt").unlink()
    (tmp_path / ".removed-checkpoint-1").mkdir()
    found = last_complete(tmp_path)
    assert found is not None and found.step == 10
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


# --- trainings ------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class KillAfterSave(TrainerCallback):
    """Ends a training as a kill would, after the marker of checkpoint `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


@pytest.fixture
def start(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lm.model.state_dict().items()}


def trained(
    lm: LanguageModel,
    state: dict[str, torch.Tensor],
    folder: Path,
    make_optimizer: Callable[..., Any] = SGD,
    kill: int | None = None,
    compute: str = "cpu",
    resume: str = "exact",
    **schedule: Any,
) -> tuple[Outcome, torch.Tensor]:
    """Nine steps from `state`, or fewer if it is killed after a save; how it ended, and the weights."""
    lm.model.load_state_dict(state)
    parts = {name: Part.of(items(n, start=i)) for name, n, i in (("forget", 12, 0), ("retain", 20, 30))}
    settings = {"max_steps": 9, "logging_steps": 1, "save_steps": 2, **schedule}
    outcome = train(
        lm.model, lm.reader, {name: (part, lm.encode([row[0] for row in part.rows])) for name, part in parts.items()},
        objective=NPO, make_optimizer=make_optimizer, schedule=Schedule(1, 4, **settings), seed=0, pad_id=lm.pad_id,
        folder=folder / "checkpoints", label="unlearn", records=folder / "train.jsonl", compute=compute, resume=resume,
        callbacks=[KillAfterSave(kill)] if kill else [],
    )  # fmt: skip
    return outcome, torch.cat([p.detach().flatten() for p in lm.model.parameters()]).clone()


def test_a_training_continued_from_weights_follows_the_uninterrupted_one(
    lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Data, schedule, reference, history: with an optimizer that has no state even the weights are bit-equal."""
    full, weights = trained(lm, start, tmp_path / "full", warmup_ratio=0.5)
    with pytest.raises(Killed):
        trained(lm, start, tmp_path / "cut", warmup_ratio=0.5, kill=4)
    with pytest.raises(UsageError, match="holds checkpoint-4 of compute=cpu with 1 process, this is compute=other"):
        trained(lm, start, tmp_path / "cut", warmup_ratio=0.5, compute="other")
    with pytest.raises(Killed):
        trained(lm, start, tmp_path / "cut", warmup_ratio=0.5, compute="other", resume="weights", kill=6)
    outcome, ended = trained(lm, start, tmp_path / "cut", warmup_ratio=0.5, compute="other")
    assert torch.equal(ended, weights)
    logs = [[json.loads(line) for line in (tmp_path / name / "train.jsonl").open()] for name in ("full", "cut")]
    assert logs[0] == logs[1] and len(logs[0]) == 9
    assert outcome.last == full.last and outcome.num_steps == 9
    assert outcome.notes == [
        "continued from the weights of checkpoint-4 of compute=cpu with 1 process: momentum and curvature started anew "
        "there"
    ]


def test_a_training_continued_from_weights_begins_with_a_curvature_pass(
    lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Without one h would be 0, and every coordinate a step of the full learning rate, until the next multiple of 8."""
    sophia = functools.partial(Sophia, lr=1e-3, interval=8, rho=100.0)
    with pytest.raises(Killed):
        trained(lm, start, tmp_path, sophia, kill=4)
    outcome, _ = trained(lm, start, tmp_path, sophia, compute="other", resume="weights")
    assert outcome.passes == {"forward": 1 + 1 / 9, "backward": 1 + 1 / 9}  # as uninterrupted: before steps 0 and 8
    logged = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    assert [entry["step"] for entry in logged] == list(range(1, 10))
    assert min(entry["win_rate"] for entry in logged) > 0.5  # of step 5 too


def test_a_finished_training_of_another_engine_gives_its_weights(
    lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    sam = functools.partial(SAM, lr=0.05, base=torch.optim.SGD)
    full, weights = trained(lm, start, tmp_path, sam, max_steps=8)
    outcome, ended = trained(lm, start, tmp_path, sam, max_steps=8, compute="other", resume="weights")
    assert torch.equal(ended, weights) and outcome.num_steps == 8 and outcome.last == full.last
    assert outcome.passes == full.passes == {"forward": 2, "backward": 2}  # of an optimizer that was never run


def test_a_training_that_diverged_and_was_killed_then_ends_as_diverged(
    lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    settings = {"save_steps": 1, "diverged_at": 1.05, "diverged_floor": 0.01}
    rising = functools.partial(torch.optim.SGD, lr=0.5, maximize=True)
    full, weights = trained(lm, start, tmp_path / "full", rising, **settings)
    assert full.diverged is not None and 1 < full.num_steps < 9
    with pytest.raises(Killed):
        trained(lm, start, tmp_path / "cut", rising, kill=full.num_steps, **settings)
    outcome, ended = trained(lm, start, tmp_path / "cut", rising, **settings)
    assert (outcome.diverged, outcome.num_steps, outcome.last) == (full.diverged, full.num_steps, full.last)
    assert torch.equal(ended, weights)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_dropout_in_an_ascent_is_drawn_again_as_it_was(
    accumulation: int, lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """An ascent runs before the state of the generator is loaded."""
    for module in lm.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    settings = {"micro_batch_size": 4 // accumulation, "dropout": True}
    sam = functools.partial(SAM, lr=1e-3, base=AdamW)
    _, weights = trained(lm, start, tmp_path / "full", sam, **settings)
    with pytest.raises(Killed):
        trained(lm, start, tmp_path / "cut", sam, kill=4, **settings)
    _, ended = trained(lm, start, tmp_path / "cut", sam, **settings)
    assert torch.equal(ended, weights)


def test_how_often_a_preparation_saves_does_not_name_its_model(tmp_path: Path) -> None:
    def recipe(*overrides: str) -> Any:
        return prepared_models.recipes(build_models(composed(tmp_path, *overrides)))["target"]

    seldom = recipe("prepare.save_steps=null", "prepare.logging_steps=7")
    assert recipe() == seldom != recipe("prepare.epochs=2")


@pytest.mark.parametrize("compute", ["cpu", "other"])
def test_an_adapter_is_resumed_and_continued_too(
    compute: str, lm: LanguageModel, start: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Its checkpoints hold the adapter's weights only."""
    adapted = peft.get_peft_model(lm.model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with_adapter = LanguageModel(adapted, lm.tokenizer, lm.template, lm.max_length, lm.reader)
    state = {name: value.clone() for name, value in adapted.state_dict().items()}
    _, weights = trained(with_adapter, state, tmp_path / "full", max_steps=5)
    with pytest.raises(Killed):
        trained(with_adapter, state, tmp_path / "cut", max_steps=5, kill=2)
    saved = tmp_path / "cut" / "checkpoints" / "checkpoint-2"
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    _, ended = trained(with_adapter, state, tmp_path / "cut", max_steps=5, compute=compute, resume="weights")
    assert torch.equal(ended, weights)
