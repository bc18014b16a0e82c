"""A user's own files and checkpoint through the real door; requests in sequence, killed in the middle."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import kills
import pytest
from composing import composed
from conftest import items
from starts import SECONDS, Start, type_

from soul_exp import ask, results, sequence, tables
from soul_exp.artifacts import prepared_models
from soul_exp.build import build, build_models
from soul_exp.checks import disk
from soul_exp.checks.check import check
from soul_exp.errors import UsageError
from soul_exp.models.checkpoint import DONE, UNLEARNED
from soul_exp.report import console
from soul_exp.results import Results

SMALL = [
    "task=custom", "task.retain=retain.csv", "loss=npo", "optimizer=sophia", "optimizer.interval=3",
    "model.scratch.vocab_size=300", "model.scratch.config.hidden_size=32", "model.scratch.config.intermediate_size=32",
    "+model.scratch.config.attention_dropout=0.1", "train.dropout=true", "model.max_length=256", "prepare.epochs=2",
    "train.batch_size=4", "evaluate.max_new_tokens=4", "wandb.mode=disabled",
]  # fmt: skip
STEPS = ["train.max_steps=4", "train.logging_steps=1"]
ONE = [*SMALL, *STEPS, "task.forget=a.jsonl", "task.holdout=holdout.jsonl"]
TWO = [*SMALL, "task.requests=[a.jsonl,b.jsonl]", "train.logging_steps=2", "train.save_steps=2", "train.max_steps=30"]


def make_files(folder: Path) -> None:
    def write(name: str, count: int, first: int) -> None:
        rows = [{"prompt": item.prompt, "answer": item.answer} for item in items(count, first)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("a.jsonl", 8, 0)
    write("b.jsonl", 8, 100)
    write("holdout.jsonl", 6, 200)
    lines = [f'"{item.prompt}","{item.answer}"\n' for item in items(16, 300)]
    (folder / "retain.csv").write_text("prompt,answer\n" + "".join(lines))


@pytest.fixture(scope="module")
def files(place: Path) -> Path:
    """A folder with a user's files, where starts are cheap."""
    make_files(place)
    return place


def ran(place: Path, name: str, *overrides: str) -> str:
    """What a run in the folder `name` of `place` said."""
    start = Start(composed(place, *overrides), place / name)
    assert start.end() == 0, start.text()[-3000:]
    return start.text()


@pytest.fixture(scope="module")
def scratch(files: Path) -> Path:
    """The folder of a run from scratch with the files of one request."""
    ran(files, "scratch", *ONE)
    return files / "scratch"


def of(folder: Path) -> Results:
    found = results.read(folder)
    assert found is not None
    return found


# ---- The user's own files and checkpoint


def test_without_files_it_says_what_to_type(files: Path) -> None:
    run = type_(files, "task=custom", "name=none")
    assert run.returncode == 1 and len(run.stderr.strip().splitlines()) == 1
    assert "type task=custom task.forget=FILE task.retain=FILE, each with a line" in run.stderr


def test_a_run_from_scratch_measures_all_that_needs_no_paraphrases(scratch: Path) -> None:
    found = of(scratch)
    assert set(found.metrics) == {"original", "unlearned", "retrained"}
    null = {name for name, value in found.metrics["unlearned"].items() if value is None}
    validation = {f"validation_{name}" for name in ("log10_forget_quality", "retain_probability", "s_mia")}
    recall = {f"mia_recall_{measure}" for measure in ("auc", "tpr_1", "tpr_10")}
    assert (
        null == {"forget_truth_ratio", "retain_truth_ratio", *validation, *recall} == set(found.reasons) - {"collapsed"}
    )
    assert found.reasons["collapsed"].startswith("no probe has 20 free answers")
    assert found.reasons["forget_truth_ratio"] == "task.forget has no paraphrased_answer"
    assert found.metrics["retrained"]["forget_quality"] == 1.0 and found.forget_quality is not None
    assert not any(name.startswith("earlier_") for name in found.metrics["unlearned"])


def test_metrics_that_are_null_for_one_reason_share_a_line(scratch: Path) -> None:
    shown = " ".join(console.comparison(of(scratch)).split())
    names = re.search(r"not measured: ([^:]*): task.validation_fraction=0 leaves no rows", shown)
    assert names is not None and {*names[1].split(", ")} == {
        "validation log10 forget quality", "validation retain probability", "validation s_MIA",
    }  # fmt: skip


def test_ones_own_checkpoint_is_the_target_as_it_is(scratch: Path, files: Path) -> None:
    """Nothing is trained before unlearning; what compares with a retrained model is null, or has one that is given."""
    copied(files, "target", "checkpoint")
    before = set((files / "cache" / "models").iterdir())
    as_before = ["task.train_general=true", "utility_suite=embedded"]  # else it is trained on the user's rows only
    said = ran(files, "mine", *ONE, *as_before, "model.path=checkpoint")
    assert set((files / "cache" / "models").iterdir()) == before and "prepared models" not in said
    found, whole = of(files / "mine"), of(scratch)
    assert set(found.metrics) == {"original", "unlearned"}
    assert found.caption.endswith("; the target is model.path as it is")
    assert found.metrics["original"]["forget_probability"] == whole.metrics["original"]["forget_probability"]
    assert found.metrics["unlearned"]["mia_auc"] == whole.metrics["unlearned"]["mia_auc"]
    assert found.forget_quality is None
    assert found.reasons["forget_quality"].startswith("no retrained model, as model.path is the target as it is: give")
    ran(
        files,
        "compared",
        *ONE,
        *as_before,
        "model.path=checkpoint",
        f"retrained.path={copied(files, 'retrained', 'other')}",
    )
    assert of(files / "compared").metrics["unlearned"] == whole.metrics["unlearned"]
    ran(
        files, "own_rows", *ONE, "model.path=checkpoint", "utility_suite=none", "train.epochs=4", "train.max_steps=null"
    )
    assert "8 rows forgotten, 16 retained, 6 held out;" in of(files / "own_rows").caption
    marker = json.loads((files / "own_rows" / "model" / UNLEARNED).read_text())
    assert marker["general"] is False and json.loads((files / "mine" / "model" / UNLEARNED).read_text())["general"]


def test_ones_own_checkpoint_that_knows_nothing_yet_is_trained_first(scratch: Path, files: Path) -> None:
    copied(files, "retrained", "base")
    before = len(list((files / "cache" / "models").glob("*/prepared.json")))
    ran(files, "tuned", *ONE, "model.path=base", "task.trained_before=false", "utility_suite=none")
    assert len(list((files / "cache" / "models").glob("*/prepared.json"))) == before + 2
    found = of(files / "tuned")
    assert set(found.metrics) == {"original", "unlearned", "retrained"} and found.forget_quality is not None
    assert found.metrics["original"]["forget_perplexity"] < of(scratch).metrics["retrained"]["forget_perplexity"]


# 1e40 leaves weights that are not finite, 1e14 weights that are and answers that are not; 2 steps, the first of rate 0
@pytest.mark.parametrize(("lr", "reason"), [("1e40", "the weights are not finite"), ("1e14", "the metric forget_")])
def test_a_run_whose_end_is_not_finite_is_diverged_and_each_null_has_its_reason(
    lr: str, reason: str, scratch: Path, files: Path
) -> None:
    name = f"lost{lr}"
    ran(files, name, *ONE, f"optimizer.lr={lr}", "train.max_steps=2")
    found = of(files / name)
    assert found.status == "diverged" and found.reason is not None and found.reason.startswith(reason)
    nulls = [(model, key) for model in found.metrics for key, value in found.metrics[model].items() if value is None]
    assert ("unlearned", "forget_perplexity") in nulls and ("original", "forget_perplexity") not in nulls
    assert found.reasons["forget_perplexity"] == f"diverged: {found.reason}"
    assert all(key in found.reasons or f"{model}.{key}" in found.reasons for model, key in nulls)
    assert f"*** DIVERGED: {reason}" in console.comparison(found)
    assert "no reason is given" not in console.comparison(found)


def test_a_target_that_cannot_be_prepared_stops_the_run_and_nothing_of_it_is_kept(files: Path) -> None:
    made = sorted((files / "cache").glob("models/*/prepared.json"))
    for steps, why in ((2, "the NLL of its own rows is not finite"), (4, "the loss is nan at step 3")):
        few = [*ONE, "prepare.adamw.lr=1e14", f"+prepare.max_steps={steps}", "prepare.logging_steps=1"]
        config = composed(files, *few)
        start = Start(config, files / f"unprepared{steps}")
        assert start.end() != 0
        message = rf"prepare (\w+): {why}, and nothing of it is kept: type a prepare.adamw.lr below 100000000000000.0"
        role = re.search(message, start.text())
        assert role, start.text()
        folder = prepared_models.folder_of(files / "cache", prepared_models.recipes(build_models(config))[role[1]])
        assert not folder.with_name(f".{folder.name}.checkpoints").exists()  # the other role's go on next time
        assert not (files / f"unprepared{steps}" / "results.json").exists()
    assert sorted((files / "cache").glob("models/*/prepared.json")) == made


def copied(files: Path, role: str, name: str) -> Path:
    """The model of that role of the run from scratch, in a folder that somebody else might have made."""
    shutil.copytree(files / "cache" / "models" / of(files / "scratch").data_hashes[f"model.{role}"], files / name)
    (files / name / DONE).unlink()
    return files / name


def test_a_checkpoint_of_a_run_is_measured_with_its_own_numbers(scratch: Path, files: Path) -> None:
    ran(files, "measured", *ONE, "stages=[evaluate]", f"model.path={scratch / 'model'}")
    assert of(files / "measured").metrics == of(scratch).metrics


# ---- Requests in sequence


@pytest.fixture(scope="module")
def twin(files: Path) -> Path:
    """The folder of a sequence of two requests that nothing has interrupted."""
    ran(files, "twin", *TWO)
    return files / "twin"


def test_each_request_starts_from_the_last_ones_model_and_is_evaluated_on_it(twin: Path) -> None:
    first, second, last = (of(twin / name) for name in ("request-1", "request-2", "."))
    assert last.metrics == second.metrics and "the last of 2 requests" in last.notes[-1]
    assert first.config["task"]["request"] == 1 and second.config["start"] == str(twin / "request-1" / "model")
    assert first.num_steps == second.num_steps == 30
    assert [note.startswith("train.dropout=true: ") for note in second.notes].count(True) == 1
    assert first.metrics["unlearned"]["earlier_probability"] is None
    assert first.reasons["earlier_probability"] == "nothing was forgotten before the first request"
    assert second.metrics["original"]["earlier_probability"] == first.metrics["original"]["forget_probability"]
    assert second.metrics["unlearned"]["earlier_probability"] is not None
    assert second.metrics["retrained"]["forget_quality"] == 1.0
    assert not (twin / "request-1" / "checkpoints").exists()


def test_questions_to_a_sequence_are_answered_by_the_model_of_its_last_request(twin: Path) -> None:
    for folder, left in ((twin, "request-2"), (twin / "request-2", "request-2"), (twin / "request-1", "request-1")):
        _, places, absent = ask.models_of(folder)
        assert places["unlearned"].path == str(twin / left / "model") and absent == []


def test_the_second_request_alone_from_the_first_ones_model_is_the_same_training(twin: Path, files: Path) -> None:
    """An independent run that takes request 1's model as its target and its own rows as what is to be forgotten."""
    changes = ["task.requests=null", "task.forget=b.jsonl", f"model.path={twin / 'request-1' / 'model'}"]
    changes.append("task.train_general=true")  # as in the model from scratch that the requests began with
    ran(files, "second", *TWO, *changes)
    assert (files / "second" / "train.jsonl").read_text() == (twin / "request-2" / "train.jsonl").read_text()
    alone, request = of(files / "second").metrics["unlearned"], of(twin / "request-2").metrics["unlearned"]
    assert alone["forget_probability"] == request["forget_probability"]


def test_a_sequence_killed_in_its_second_request_resumes_to_the_same_bits(twin: Path, files: Path) -> None:
    out, config = files / "killed", composed(files, *TWO)
    start, deadline = Start(config, out), time.monotonic() + SECONDS
    while not list(out.glob("request-2/checkpoints/*/checkpoint-*/COMPLETE")):
        assert not start.is_over() and time.monotonic() < deadline, start.text()[-3000:]
        time.sleep(0.001)
    os.kill(start.pid, signal.SIGKILL)
    assert start.end() == -signal.SIGKILL
    assert not (out / "results.json").exists() and not (out / "request-2" / "results.json").exists()
    before = (out / "request-1" / "results.json").stat().st_mtime_ns
    again = ran(files, "killed", *TWO)
    assert f"finished before, skipped: {out / 'request-1'}\n" in again
    assert "resuming from checkpoint-" in again
    assert (out / "request-1" / "results.json").stat().st_mtime_ns == before
    for request in ("request-1", "request-2"):
        assert kills.numbers(out / request) == kills.numbers(twin / request)
    assert of(out).metrics == of(twin).metrics and of(out).notes == of(twin).notes
    assert ran(files, "killed", *TWO).endswith(f"finished before, skipped: {out}\n")


def test_a_sequence_from_ones_own_checkpoint_prepares_nothing(scratch: Path, files: Path) -> None:
    copied(files, "target", "own")
    before = set((files / "cache" / "models").iterdir())
    ran(files, "own-sequence", *TWO, "train.max_steps=4", "model.path=own", "utility_suite=none")
    assert set((files / "cache" / "models").iterdir()) == before
    first, second = (of(files / "own-sequence" / name) for name in ("request-1", "request-2"))
    assert second.config["start"].endswith("own-sequence/request-1/model")
    assert set(second.metrics) == {"original", "unlearned"} and second.forget_quality is None
    assert second.metrics["original"]["earlier_probability"] == first.metrics["original"]["forget_probability"]
    assert second.metrics["original"]["forget_probability"] != second.metrics["unlearned"]["forget_probability"]


def test_another_sequence_in_the_same_folder_is_an_error(twin: Path, files: Path) -> None:
    config = composed(files, *TWO, "task.requests=[b.jsonl,a.jsonl]")
    with pytest.raises(UsageError, match="holds finished results of another configuration"):
        sequence.run(config, twin)


def test_a_model_that_is_gone_is_named_before_the_next_request(twin: Path, files: Path) -> None:
    out = Path(shutil.copytree(twin, files / "gone"))
    for path in (out / "request-1" / "model", out / "request-2"):
        shutil.rmtree(path)
    (out / "results.json").unlink()
    with pytest.raises(UsageError, match="request-1/model is gone or damaged, from which request 2 starts: put"):
        sequence.run(composed(files, *TWO), out)


def test_the_table_of_a_sequence_has_a_row_for_each_request_and_model(twin: Path) -> None:
    lines = tables.table(twin).splitlines()
    assert lines[0] == "### 2 requests in sequence"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row[:2] for row in cells[2:]] == [
        ["", "original"], ["request-1", "unlearned"], ["", "retrained"],
        ["", "original"], ["request-2", "unlearned"], ["", "retrained"],
    ]  # fmt: skip
    shown = dict(zip(cells[0], cells[-2], strict=True))
    value = of(twin / "request-2").metrics["unlearned"]["earlier_rouge"]
    assert value is not None and shown["earlier ROUGE"].split()[0] == f"{value:.3f}"
    assert list(tables.load(twin)["run"]) == ["request-1", "request-2"]


def test_a_folder_of_runs_counts_a_sequence_once(twin: Path, files: Path, tmp_path: Path) -> None:
    shutil.copytree(twin, tmp_path / "runs" / "one")
    assert list(tables.load(tmp_path / "runs")["run"]) == ["one"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["save=none"], "each request starts from the model before: choose save=final"),
        (["adapter=lora"], "type adapter.merge=true"),
        (["stages=[evaluate]", "model.path=."], "measure a checkpoint with task.forget"),
        (["task.requests=a.jsonl"], "expected a list, each a text, or null: type task.requests="),
        (["task.requests=[a.jsonl,gone.jsonl]"], "gone.jsonl does not exist"),
        (["task.forget=a.jsonl"], "task.forget=.*a.jsonl and task.requests are both given: keep one"),
        (["retrained.path=x"], "retrained.path is one model, but each request is compared with its own"),
    ],
)
def test_what_a_sequence_cannot_do_is_an_error_before_its_first_request(
    overrides: list[str], sentence: str, tmp_path: Path
) -> None:
    make_files(tmp_path)
    with pytest.raises(UsageError, match=sentence):
        sequence.run(composed(tmp_path, *TWO, *overrides), tmp_path / "run")
    assert not list(tmp_path.glob("run/**/model"))


def test_a_sequence_needs_a_model_and_a_retrained_one_for_each_request(tmp_path: Path) -> None:
    make_files(tmp_path)
    config = composed(tmp_path, *TWO)
    whole, one = sequence.need(config), disk.need(build(sequence.steps_of(config, tmp_path)[0]))
    assert whole is not None and one is not None
    assert whole.model == 2 * one.model and whole.checkpoints == one.checkpoints
    assert len(one.prepared) == 2 and len(whole.prepared) == 3  # one target


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["task.trained_before=true"], "no model.path is given: name a checkpoint, or type task.trained_before=false"),
        (["task.max_probe_rows=0"], "task.max_probe_rows=0: expected a whole number of 1 or more"),
        (["task.forget=5"], "task.forget=5: expected a text"),
        (["task.lead_words=0"], "task.lead_words=0: expected a whole number"),
        (["save=best"], "which is not available: task.validation_fraction=0 leaves no rows"),
        (["task.columns={prompt: question, answer: reply}"], "line 1: found prompt, answer, expected question and"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_work_is_an_error(overrides: list[str], sentence: str, tmp_path: Path) -> None:
    make_files(tmp_path)
    with pytest.raises(UsageError, match=sentence):
        check(composed(tmp_path, *ONE, *overrides), tmp_path / "run")


def test_columns_and_local_paths_reach_the_task_as_they_were_typed(tmp_path: Path) -> None:
    make_files(tmp_path)
    config = composed(tmp_path, *ONE, "task.columns={prompt: question}", "task.holdout=hub:owner/name:config:split")
    assert config["task"]["columns"] == {**{f: f for f in config["task"]["columns"]}, "prompt": "question"}
    assert config["task"]["forget"] == str(tmp_path / "a.jsonl")
    assert config["task"]["holdout"] == "hub:owner/name:config:split"
    assert composed(tmp_path, *TWO)["task"]["requests"] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert config["task"]["trained_before"] is False
    assert composed(tmp_path, *ONE, "model.path=.")["task"]["trained_before"] is True


def test_save_best_and_tuning_have_the_metrics_that_they_compare(tmp_path: Path) -> None:
    make_files(tmp_path)
    checked = check(
        composed(tmp_path, *ONE, "task.validation_fraction=0.25", "save=best", "train.save_steps=2"), tmp_path / "r"
    )
    assert not {"validation_log10_forget_quality", "validation_retain_probability"} & set(checked.reasons)
