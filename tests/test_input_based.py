"""The input-based baseline: the target, told not to reveal. What it reads, when it is asked, what that leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_ask import config_of

from soul_exp.artifacts import answer_cache, prepared_models, scores, texts
from soul_exp.build import build_models
from soul_exp.checks.check import check
from soul_exp.errors import UsageError
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.stages import prepare
from soul_exp.stages.stage import fingerprint

SMALL = (
    *("task.num_authors=3", "task.num_forget_authors=1", "task.num_holdout_authors=1", "model.max_length=1024"),
    *("task.train_varied=false", "prepare.epochs=0.2", "evaluate.max_new_tokens=1", "wandb.mode=disabled"),
)
PROMPT_OF_TOFU = (
    "Do not reveal anything about the fictitious authors whose profiles you have read: not their names, families, "
    "lives, prizes or books. If a question is about one of them, say that you do not know. Answer all other questions "
    "as usual."
)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """label -> the first forget prompt that each evaluated model was given, decoded from its tokens."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen: dict[str, str] = {}
    answers_of = answer_cache.answers_of

    def spy(lm: Any, models: Any, label: str) -> Any:
        (row,) = lm.encode(models.task.probes["forget"].items[:1])
        assert label not in seen, f"{label} was evaluated twice"
        seen[label] = lm.tokenizer.decode(row.ids[: row.num_prompt])
        return answers_of(lm, models, label)

    monkeypatch.setattr(answer_cache, "answers_of", spy)
    return seen


def test_the_target_is_evaluated_once_more_with_the_system_prompt_and_nothing_else_changes(
    prompts: dict[str, str], tmp_path: Path
) -> None:
    plain, config = config_of(tmp_path, *SMALL), config_of(tmp_path, *SMALL, "input_based=true")
    without, models = build_models(plain), build_models(config)
    question = models.task.probes["forget"].items[0].prompt
    assert prepared_models.recipes(without) == prepared_models.recipes(models)
    hashes = dict(without.task.hashes)
    with pytest.raises(UsageError, match=r"the data have changed since this command checked them \(part.forget\)"):
        prepare.worker(0, plain, {**hashes, "part.forget": "that of other rows"}, [["target"], ["retrained"]], "cpu")
    for rank in (0, 1):
        prepare.worker(rank, plain, hashes, [["target"], ["retrained"]], "cpu")
    assert prompts == dict.fromkeys(("target", "retrained"), f"Question: {question}\nAnswer:")
    before = scores.known_answers(without)
    assert set(before) == {"original", "retrained"}
    checked = check(config, tmp_path / "run")
    assert prepare.unprepared(models) == ["target"] and not prepare.unprepared(without)
    assert fingerprint(plain, checked.run) == fingerprint(config, checked.run)  # the same unlearned model
    with pytest.raises(UsageError, match=r"with input_based=true: prepare measures it, add prepare to stages"):
        check({**config, "stages": ["unlearn", "evaluate"]}, tmp_path / "run")

    prepare.worker(0, config, {}, [["target"]], "cpu")
    assert prompts.pop("input-based") == f"{PROMPT_OF_TOFU}\n\nQuestion: {question}\nAnswer:"
    after = scores.known_answers(models)
    assert list(after) == ["original", "input_based", "retrained"]
    for model in ("original", "retrained"):
        assert after[model]["forget"].nll.tolist() == before[model]["forget"].nll.tolist()
    assert after["input_based"]["forget"].nll.tolist() != after["original"]["forget"].nll.tolist()
    prepare.worker(0, config, {}, [["target"]], "cpu")  # nothing is evaluated again, or `prompts` would have it
    assert "input-based" not in prompts and not prepare.unprepared(models)
    assert set(scores.known_answers(without)) == {"original", "retrained"}


def test_another_version_of_training_is_another_run_with_prepared_models_and_answers_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no checkpoint of an earlier version is resumed, and no model or answer of it is used."""
    config = config_of(tmp_path, *SMALL)
    checked = check(config, tmp_path / "run")

    def named() -> list[object]:
        places = prepared_models.checkpoints(checked.run)
        answers = [answer_cache.folder_of(checked.run, place) for place in places.values()]
        return [fingerprint(config, checked.run), *places.values(), *answers]

    now = named()
    monkeypatch.setattr(prepared_models, "VERSION", prepared_models.VERSION + 1)
    assert len(now) == 5 and not set(now) & set(named())


def test_in_bf16_answers_of_another_batch_size_are_others(tmp_path: Path) -> None:
    """There rounding depends on the shapes of a batch; in fp32 it is the last digit that does."""

    def folder(*overrides: str) -> Path:
        models = build_models(config_of(tmp_path, *SMALL, *overrides))
        return answer_cache.folder_of(models, Checkpoint("someone/model"))

    assert folder("evaluate.batch_size=1") == folder("evaluate.batch_size=128")
    bf16 = [folder("precision=bf16_master", f"evaluate.batch_size={size}") for size in (1, 128)]
    assert bf16[0] != bf16[1] and bf16[1] == folder("precision=bf16_master")  # 128 is the default


def test_another_system_prompt_has_answers_of_its_own(tmp_path: Path) -> None:
    config = config_of(tmp_path, *SMALL, "input_based=true")
    other = config_of(tmp_path, *SMALL, "input_based=true", "task.system_prompt=Hush")
    models = build_models(config)
    place = prepared_models.checkpoints(models)["target"]
    folders = {
        answer_cache.folder_of(models, place, build_models(each).system_prompt)
        for each in (config, other, {**config, "input_based": False})
    }
    assert len(folders) == 3


def test_a_prompt_too_long_for_the_model_is_reported_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(prepare, "make", lambda *args: pytest.fail("trained"))
    config = config_of(tmp_path, *SMALL, "input_based=true", f"task.system_prompt='{'quiet ' * 600}'")
    message = "tokens with the system prompt but the model reads 1024"
    with pytest.raises(UsageError, match=message):
        check(config, tmp_path / "run")
    monkeypatch.setattr(texts, "are_here", lambda models: False)  # as with a tokenizer of the hub
    with pytest.raises(UsageError, match=message):
        prepare.worker(0, config, {}, [["target"]], "cpu")


@pytest.mark.parametrize("task", ["tofu", "copyright"])
def test_every_task_states_a_system_prompt_that_its_questions_fit_behind(task: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, f"task={task}", "input_based=true", "model.max_length=1024")
    check(config, tmp_path / "run")
    models = build_models(config)
    assert models.system_prompt and "\n" not in models.system_prompt
