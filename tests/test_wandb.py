"""The copy in wandb: one run for a folder, all of its steps, and nothing that wandb does ends or delays a run."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import starts
from composing import composed
from starts import TINY
from test_tables import left, made

from soul_exp.build import build
from soul_exp.report import __main__ as report
from soul_exp.run import Run, WandbSettings
from soul_exp.stages import wandb_log
from soul_exp.stages.wandb_log import WandbLog

CONFIG = {"seed": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of 40 rows to forget, 8 in a step."""
    found = build(composed(tmp_path_factory.mktemp("wandb"), "task.num_authors=6", "task.num_forget_authors=2"))
    assert len(found.task.parts["forget"].rows) == 40 and found.schedule.batch_size == 8
    return found


class FakeRun:
    """A wandb run that remembers what it was given."""

    starting_step = 0

    def __init__(self, **given: Any) -> None:
        self.given, self.steps, self.summary, self.finished = given, dict[int, dict[str, float]](), dict[str, Any](), 0
        self.axes, self.after = dict[str, str](), list[dict[str, Any]]()  # what is logged after the last step

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if step is None:
            self.after.append(values)
        else:
            assert step >= max(self.steps, default=0)  # wandb drops what is earlier
            self.steps[step] = values

    def finish(self) -> None:
        self.finished += 1


class Fake:
    """The module wandb; `online` raises its error where a run is to be online."""

    def __init__(self, online: Exception | None = None) -> None:
        self.runs: list[FakeRun] = []
        self.online = online
        self.module = types.SimpleNamespace(init=self.init, Settings=lambda **given: given, teardown=lambda: None)
        self.module.Table = lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data]

    def init(self, mode: str, **given: Any) -> FakeRun:
        if mode == "online" and self.online:
            raise self.online
        self.runs.append(FakeRun(mode=mode, **given))
        return self.runs[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    found = Fake()
    monkeypatch.setitem(sys.modules, "wandb", found.module)  # type: ignore[arg-type]
    return found


def write(out: Path, *steps: int) -> None:
    with (out / "train.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": step / 10, "grad_norm": None, "epoch": step / 100}) + "\n")


def begun(run: Run, out: Path) -> WandbLog:
    copy = WandbLog(run, CONFIG, out, out / "train.jsonl")
    copy.started.result(timeout=30)
    return copy


def test_a_run_that_continues_is_the_same_wandb_run_with_all_of_its_steps(fake: Fake, run: Run, tmp_path: Path) -> None:
    copy = begun(run, tmp_path)
    write(tmp_path, 5, 10)
    copy.on_log(None, None, None)
    write(tmp_path, 15)
    copy.on_log(None, None, None)  # killed here
    (first,) = fake.runs
    assert list(first.steps) == [5, 10, 15] and first.finished == 0
    assert first.steps[10] == {"train/loss": 1.0, "train/epoch": 2.0}  # of the rows to forget; null is left out
    copy = begun(run, tmp_path)
    write(tmp_path, 20)
    ends = {"unlearned": {"mia_auc": [0.6, 0.8], "utility": None}}
    copy.finish(replace(made(), intervals=ends, collapsed={"forget": "share of degenerate answers 0.95"}))
    _, second = fake.runs
    assert list(second.steps) == [5, 10, 15, 20] and second.finished == 1
    assert second.summary["unlearned/mia_auc"] == 0.7 and second.summary["retrained/mia_auc"] == 0.4
    assert second.summary["unlearned/mia_auc/low"] == 0.6 and second.summary["unlearned/mia_auc/high"] == 0.8
    assert "unlearned/utility/low" not in second.summary and second.summary["collapsed"] is True
    assert [each.given["resume"] for each in fake.runs] == [None, "allow"]
    assert first.given["id"] == second.given["id"] and re.fullmatch(r"[0-9a-f]{12}", first.given["id"])
    copy.finish()
    assert second.finished == 1


def test_validation_stands_at_its_step_and_after_a_kill_too(fake: Fake, run: Run, tmp_path: Path) -> None:
    lines = [{"step": step, "seconds": 0.1, "utility": 0.5, "collapsed": {}} for step in (0, 10, 12)]
    copy = begun(run, tmp_path)
    (tmp_path / "trajectory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    write(tmp_path, 5, 10)
    copy.on_log(None, None, None)
    (tmp_path / "trajectory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    copy.finish()
    found = fake.runs[0].steps
    assert [*found] == [0, 5, 10, 12] and found[12] == {"validation/seconds": 0.1, "validation/utility": 0.5}
    assert found[10] == {"train/loss": 1.0, "train/epoch": 2.0, "validation/seconds": 0.1, "validation/utility": 0.5}
    begun(run, tmp_path).finish()
    assert fake.runs[1].steps == found


def test_curves_of_attacks_have_their_own_axis_and_all_metrics_a_table(fake: Fake, run: Run, tmp_path: Path) -> None:
    points = {
        "0": {"extraction_strength": 0.1},
        "25": {"extraction_strength": 0.4},
        "50": {"extraction_strength": None},
    }
    models = {"unlearned": {"0.001": points}, "retrained": {"0.001": points}, "uninformative": {"0.001": ["0"]}}
    found = replace(
        made(),
        attacks={"relearn": models, "quantise": {"unlearned": {"int4": {"forget": {"extraction_strength": 0.2}}}}},
    )
    begun(run, tmp_path).finish(found)
    (sent,) = fake.runs
    assert sent.axes == {"attack/relearn/*": "attack/relearn/steps"}
    name = "attack/relearn"
    assert sent.after[:-1] == [
        {f"{name}/steps": steps, f"{name}/unlearned-0.001": value, f"{name}/retrained-0.001": value}
        for steps, value in ((0, 0.1), (25, 0.4))
    ]
    table = sent.after[-1]["metrics"]
    assert {"model": "unlearned", "metric": "mia_auc", "value": 0.7, "low": None, "high": None} in table
    assert len(table) == sum(map(len, found.metrics.values()))


def test_a_wandb_run_is_named_grouped_and_tagged(fake: Fake, run: Run, tmp_path: Path) -> None:
    begun(run, tmp_path)
    begun(replace(run, stages=("evaluate",)), tmp_path)
    given = fake.runs[0].given
    assert given["tags"] == ["tiny", "tofu", "altpo", "sophia", "cpu", "fp32"] and given["config"] == CONFIG
    assert given["name"] == tmp_path.name and given["group"] == "tofu" and given["project"] == "soul_exp"
    assert [each.given["job_type"] for each in fake.runs] == ["unlearn", "evaluate"]


def test_what_is_replaced_has_the_same_id_and_none_of_the_old_steps(fake: Fake, run: Run, tmp_path: Path) -> None:
    copy = begun(run, tmp_path)
    write(tmp_path, 5)
    copy.finish()
    (tmp_path / "wandb" / "offline-run-1").mkdir()
    (tmp_path / "train.jsonl").unlink()  # as overwrite=true does
    copy = begun(run, tmp_path)
    write(tmp_path, 7)
    copy.finish()
    first, second = fake.runs
    assert second.given["resume"] is None and first.given["id"] == second.given["id"] and list(second.steps) == [7]
    assert [path.name for path in (tmp_path / "wandb").iterdir()] == ["run_id.txt"]


def test_an_online_run_sends_only_the_steps_that_wandb_lacks(
    fake: Fake, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRun, "starting_step", 11)
    write(tmp_path, 5, 10, 15)
    begun(run, tmp_path).finish()
    assert list(fake.runs[0].steps) == [15]


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_an_error_of_wandb_is_one_line_and_the_run_goes_on(
    when: str, fake: Fake, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TimeoutError("the server is gone\nand more")

    monkeypatch.setattr(fake.module if when == "init" else FakeRun, when, broken)
    copy = begun(run, tmp_path)
    write(tmp_path, 5)
    copy.on_log(None, None, None)
    copy.on_log(None, None, None)
    copy.finish(made())
    (line,) = caplog.messages
    assert line.startswith("wandb: the server is gone: ") and "\n" not in line
    assert when == "init" or f"type wandb sync {tmp_path / 'wandb'}" in line


def test_without_a_connection_a_run_is_offline(
    fake: Fake, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake.online = RuntimeError("no such host")
    write(tmp_path, 5)
    begun(replace(run, wandb=WandbSettings("online", "soul_exp", None)), tmp_path).finish()
    assert [each.given["mode"] for each in fake.runs] == ["offline"] and list(fake.runs[0].steps) == [5]
    (line,) = caplog.messages
    assert line.startswith("wandb: no such host: offline, type wandb sync ")


def test_disabled_leaves_wandb_unimported(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    copy = begun(replace(run, wandb=WandbSettings("disabled", "soul_exp", None)), tmp_path)
    write(tmp_path, 5)
    copy.on_log(None, None, None)
    copy.finish(made())
    assert not (tmp_path / "wandb").exists()


# --- the library itself -------------------------------------------------------------------------------------------


def records(folder: Path) -> list[Any]:
    """What wandb has written of the only run in `folder`: a log of LevelDB's format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = (path for path in folder.glob("*run-*/*.wandb") if not path.parent.is_symlink())
    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left, size, kind = 2**15 - at % 2**15, int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if left < 7:  # the rest of a block
            at += left
            continue
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # complete, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def eventually(read: Callable[[], list[Any]], least: int) -> list[Any]:
    """What `read` gives once it has `least` entries: a process of wandb's own writes them, a busy machine delays it."""
    end = time.monotonic() + 60
    while len(found := read()) < least and time.monotonic() < end:
        time.sleep(0.2)
    return found


def steps_in(out: Path) -> list[int]:
    return [record.history.step.num for record in records(out / "wandb") if record.HasField("history")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


def test_the_folder_of_a_run_holds_one_offline_run_however_often_it_continues(place: Path) -> None:
    line = [*(each for each in TINY if not each.startswith("wandb")), "train.logging_steps=1", "hydra.run.dir=out"]
    ids = set()
    for _ in range(2):
        done = starts.type_(place, *line)
        assert done.returncode == 0 and "wandb" not in done.stdout + done.stderr, done.stdout + done.stderr
        first, last = (record.history for record in records(place / "out" / "wandb") if record.HasField("history"))
        assert [first.step.num, last.step.num] == [1, 2]
        table = {tuple(item.nested_key): json.loads(item.value_json) for item in last.item}
        assert table["metrics", "_type"] == "table-file" and table["metrics", "ncols"] == 5
        updates = [item for record in records(place / "out" / "wandb") for item in record.summary.update]
        assert {"unlearned/utility", "seconds/unlearn", "passes/forward"} <= {
            item.key or item.nested_key[0] for item in updates
        }
        runs = [record.run for record in records(place / "out" / "wandb") if record.HasField("run")]
        assert {(run.run_group, run.job_type, run.display_name) for run in runs} == {("tofu", "unlearn", "out")}
        assert {"tofu", "sophia", "altpo", "fp32", "cpu"} <= set(runs[0].tags)
        ids |= {record.run.run_id for record in records(place / "out" / "wandb") if record.HasField("run")}
        (place / "out" / "results.json").unlink()  # as if killed before them
    assert ids == {(place / "out" / "wandb" / "run_id.txt").read_text()}


def test_the_report_of_a_sweep_is_one_run_of_its_group_with_page_tables_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    folder = left(tmp_path / "runs", a=made(), b=made(seed=1))
    (folder / "methods.csv").write_text("loss\nnpo\n")
    page = folder / "report.html"
    page.write_text("<p>page")
    assert report.copy(folder, page, "offline").endswith("report.html, methods.csv")
    eventually(lambda: [each for each in records(folder / "wandb") if each.HasField("history")], 1)
    found = records(folder / "wandb")
    (artifact,) = (each.artifact for each in found if each.HasField("artifact") and each.artifact.type == "report")
    assert artifact.name == "tofu-report"
    assert sorted(each.path for each in artifact.manifest.contents) == ["methods.csv", "report.html"]
    (run,) = (each.run for each in found if each.HasField("run"))
    assert (run.run_group, run.job_type, run.project) == ("tofu", "report", "soul_exp")
    (history,) = (each.history for each in found if each.HasField("history"))
    assert ["methods", "_type"] in [[*item.nested_key] for item in history.item]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import wandb

    monkeypatch.setattr(wandb_log, "CONNECT_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    yield wandb
    wandb.teardown()


@pytest.mark.parametrize(("key", "reason"), [("a" * 40, "refused|deadline exceeded"), ("short", "must have 40")])
def test_no_network_and_a_wrong_key_are_one_line_and_an_offline_run(
    key: str, reason: str, library: Any, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WANDB_API_KEY", key)
    write(tmp_path, 5, 10)
    with caplog.at_level(logging.WARNING, logger="soul_exp"):
        copy = WandbLog(
            replace(run, wandb=WandbSettings("online", "soul_exp", None)), CONFIG, tmp_path, tmp_path / "train.jsonl"
        )
        copy.finish()
    (line,) = (each.message for each in caplog.records if each.name.startswith("soul_exp"))
    assert re.match(f"wandb: .*({reason}).*: offline, type wandb sync ", line)
    assert eventually(lambda: steps_in(tmp_path), 2) == [5, 10]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
