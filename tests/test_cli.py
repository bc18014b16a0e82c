"""The real door: the command line, with the smallest jobs that go all the way; some in processes of their own."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import starts
import torch
from conftest import start, type_

from soul_exp import results
from soul_exp.artifacts import prepared_models
from soul_exp.distributed.output import Console
from soul_exp.evaluation.records import read_records
from soul_exp.models import loading
from soul_exp.sweep import Sweep, Twin

SMALL = [
    "task.num_authors=8",
    "task.train_varied=false",
    "prepare.epochs=1",
    "evaluate.max_new_tokens=4",
    "train.max_steps=4",
    "train.logging_steps=1",
    "wandb.mode=disabled",
    "name=small",
]


def metrics_of(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "results.json").read_text())["metrics"]


def losses_of(folder: Path) -> list[list[float]]:
    lines = map(json.loads, (folder / "train.jsonl").open())
    return [[line["loss"], line["forget_loss"], line["retain_loss"]] for line in lines]


@pytest.fixture(scope="module")
def sweep(place: Path) -> subprocess.CompletedProcess[str]:
    """Two jobs, of which the first cannot work."""
    return type_(place, *SMALL, "train.batch_size=7,8", "train.micro_batch_size=4", "-m")


@pytest.fixture(scope="module")
def folder(place: Path, sweep: subprocess.CompletedProcess[str]) -> Path:
    """The run folder of the sweep's job that works."""
    found = [path.parent for path in (place / "runs" / "small").glob("*/results.json")]
    assert len(found) == 1, sweep.stdout + sweep.stderr
    return found[0]


def test_a_failing_job_leaves_the_others_running_and_is_named(
    sweep: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert sweep.returncode == 1 and "Traceback" not in sweep.stderr
    assert "train.batch_size-8" in folder.name
    failed = next(path for path in folder.parent.iterdir() if "train.batch_size-7" in path.name)
    assert f"soul_exp: failed: {failed.name}: train.batch_size=7 is not a multiple of" in sweep.stderr
    assert (failed / "error.txt").is_file() and not (folder / "error.txt").exists()


def test_a_sweep_says_how_far_it_is_and_how_it_ended(
    sweep: subprocess.CompletedProcess[str], folder: Path, place: Path
) -> None:
    failed = next(path for path in folder.parent.iterdir() if "train.batch_size-7" in path.name)
    lines = [line for line in sweep.stdout.splitlines() if "job" in line]
    assert lines[0].startswith("2 jobs will need about")
    assert lines[1:3] == [f"--- job 1 of 2: {failed.name}", f"job 1 of 2 failed in its checks: {failed.name}"]
    assert lines[3] == f"--- job 2 of 2: {folder.name}"
    assert re.fullmatch(
        r"job 2 of 2 finished in \S+ (s|min): (COLLAPSED, )?forget quality \S+, model utility \S+, MIA AUC \S+",
        lines[4],
    )
    assert re.fullmatch(r"2 jobs in \S+ (s|min): 1 finished, 1 failed", lines[5]) and len(lines) == 6
    assert sweep.stdout.endswith("\ntable: python -m soul_exp.tables runs/small\n")
    assert "higher is better" not in sweep.stdout


def test_the_log_of_a_run_holds_what_the_console_showed_of_it(
    sweep: subprocess.CompletedProcess[str], folder: Path
) -> None:
    _, _, shown = sweep.stdout.partition(f"--- job 2 of 2: {folder.name}\n")
    expected = shown.splitlines()[:-2]  # the summary is the sweep's
    assert len(expected) > 5 and any(line.startswith("unlearn: 4 steps") for line in expected)
    logged = (folder / "soul_exp.log").read_text().splitlines()
    assert logged[0].endswith(folder.name) and all(logged.count(line) == 1 for line in expected)
    assert any("higher is better" in line for line in logged)  # and the table of metrics, which a sweep does not show
    notes = json.loads((folder / "results.json").read_text())["notes"]
    assert len(notes) > 0 and all(shown.count(note) == logged.count(note) == 1 for note in notes)
    failed = next(path for path in folder.parent.iterdir() if "train.batch_size-7" in path.name)
    assert not (failed / "soul_exp.log").exists()  # its checks failed


@pytest.mark.parametrize(
    "override",
    [
        "model.path=nobody/nothing", "model.tokenizer=nobody/nothing", "retrained.path=nobody/nothing",
        "task=detox task.scorer=nobody/nothing",
        f"task=custom task.forget=hub:nobody/nothing task.retain={__file__}",
    ],
)  # fmt: skip
def test_a_sweep_whose_hub_cannot_be_reached_is_one_line_and_begins_no_job(override: str, tmp_path: Path) -> None:
    done = starts.type_(tmp_path, *override.split(), "utility_suite=none", "seed=0,1,2", "-m")
    (line,) = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 1 and re.match("soul_exp: .*nobody/nothing (is neither|cannot be reached)", line)
    assert not list(tmp_path.rglob("runs/*/*"))


def test_a_configuration_that_a_sweep_has_twice_is_run_once(place: Path) -> None:
    done = starts.type_(place, *SMALL, "name=twice", "loss=npo,npo", "stages=[]", "-m")
    assert done.returncode == 0 and done.stdout.count("checked, nothing to run") == 1, done.stdout + done.stderr
    assert "the configuration of " in done.stdout and "which is this job's result too" in done.stdout
    assert re.search(r"\n2 jobs in \S+ (s|min): 1 checked, 1 the same as another\n$", done.stdout)


def test_the_forecast_of_a_sweep_is_the_mean_of_the_jobs_that_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the seconds that prepared models take, which are made once, nor jobs that did no work count."""
    ends: list[str] = []
    monkeypatch.setattr(Sweep, "_log", lambda sweep, end: ends.append(f"{end}{sweep.coming()}"))
    sweep = Sweep(total=9, folder=Path("runs/x y"), is_local=True, began=time.monotonic() - 7200)
    assert [sweep.job(0), sweep.job(8), Sweep(None, Path(), True).job(4)] == ["job 1 of 9", "job 9 of 9", "job 5"]

    def end(name: str, spent: float | None, **changes: Any) -> None:
        assert sweep.twin({"seed": name}, name) is None
        made = {"status": "finished", "seconds": {"prepare": 400.0}, "utility": 0.5, "forget_quality": None}
        made |= {"collapsed": None, "reasons": {}}
        sweep.end_job(Path(name), cast(results.Results, SimpleNamespace(**{**made, "mia_auc": None, **changes})), spent)

    sweep.end_failed_job(Path("a"), None)
    end("b", 600)
    sweep.end_failed_job(Path("c"), 7)
    end("d", 400, status="diverged", seconds={"unlearn": 300.0})
    end("e", None)
    end("f", 300, seconds={"prepare": 0.0})
    nothing = "model utility 0.500"
    assert ends == [
        "failed in its checks: a", f"finished in 10 min: {nothing}; about 23 min for 7 more",
        "failed after 7 s: c; about 20 min for 6 more",
        f"finished in 6.7 min: DIVERGED, {nothing}; about 25 min for 5 more",
        f"finished in 5.0 min: {nothing}; about 15 min for 3 more",
    ]  # fmt: skip
    assert sweep.twin({"seed": "b"}, "g") == Twin("b", 0.5)
    assert sweep.summary(2).splitlines() == [
        "9 jobs in 2.0 h: 2 finished, 1 diverged, 1 finished before, 1 the same as another, 2 failed"
    ]  # fmt: skip
    assert Sweep(1, Path("runs"), False).summary(0) == "1 job in 0 s"


def test_results_hold_what_a_reviewer_needs(folder: Path) -> None:
    found = results.read(folder)
    assert found is not None and found.status == "finished" and found.num_steps == 4
    assert set(found.metrics) == {"unlearned", "original", "retrained"}
    assert found.forget_quality == found.metrics["unlearned"]["forget_quality"]
    assert found.metrics["retrained"]["forget_quality"] == 1.0  # the same sample twice
    assert found.choices["optimizer"] == "sophia" and found.config["optimizer"]["_target_"] == "soul_exp.optim.Sophia"
    assert found.versions["torch"] and found.peak_memory_gib > 0.1 and found.seconds["unlearn"] > 0
    assert found.hardware is not None and f", {torch.backends.cpu.get_cpu_capability()}, " in found.hardware
    assert {"part.forget", "probe.holdout", "rows.target"} <= set(found.data_hashes)
    assert found.training["win_rate"] is not None
    ends, value = found.intervals["unlearned"]["authors_probability"], found.metrics["unlearned"]["authors_probability"]
    assert ends is not None and value is not None and 0 <= ends[0] < value < ends[1] <= 1
    assert found.no_interval["forget_probability"] == "2 independent units in forget, expected 5 or more"
    assert found.samples["forget"] == {"examples": 30, "units": 2} and found.unit == "author"
    assert found.free_answers["retrained"]["forget"]["num"] == 30 and found.collapsed is not None
    assert found.free_answers["unlearned"]["forget"]["median_nll"] == pytest.approx(
        np.median(read_records(folder / "records" / "unlearned" / "forget.jsonl").numbers("generation_nll"))
    )
    for model in found.metrics:
        probes = {path.stem for path in (folder / "records" / model).glob("*.jsonl")}
        assert probes >= {"forget", "retain", "holdout", "authors"}
    assert (folder / "model" / "model.safetensors").is_file() and not (folder / "checkpoints").exists()


def test_a_finished_job_is_recognised_and_skipped(folder: Path, place: Path) -> None:
    before = (folder / "results.json").stat().st_mtime_ns
    again = starts.type_(place, *SMALL, "train.batch_size=8", "train.micro_batch_size=4", "-m")
    assert again.returncode == 0 and "finished before, skipped" in again.stdout
    assert (folder / "results.json").stat().st_mtime_ns == before


def test_a_configuration_that_has_finished_under_another_name_is_named_before_it_is_repeated(
    folder: Path, place: Path
) -> None:
    same = "train.batch_size=8", "train.micro_batch_size=4"
    done = starts.type_(place, *SMALL, *same, "name=again", "stages=[]")
    near = folder.relative_to(place)
    expected = f"the same configuration has finished in {near}: this run repeats it, and tables count both once"
    assert done.stdout.count(expected) == 1, done.stdout + done.stderr
    done = starts.type_(place, *SMALL, *same, "name=again", "seed=1", "stages=[]")
    assert done.returncode == 0 and "the same configuration" not in done.stdout


def test_another_configuration_in_the_same_folder_stops_and_says_what_differs(folder: Path, place: Path) -> None:
    (place / "mine" / "loss").mkdir(parents=True)
    (place / "mine" / "loss" / "mine.yaml").write_text(
        "_target_: soul_exp.losses.Objective\nforget_term: {_target_: soul_exp.losses.grad_ascent, _partial_: true}\n"
        "retain_term: nll\ngamma: 1.0\n"
    )
    other = starts.type_(
        place, "--config-dir", "mine", *SMALL, "train.batch_size=8", "train.micro_batch_size=4", "loss=mine",
        f"hydra.sweep.subdir={folder.name}", "-m",
    )  # fmt: skip
    assert other.returncode == 1
    assert "holds finished results of another configuration" in other.stderr and "overwrite=true" in other.stderr


def test_results_of_an_earlier_version_of_training_are_not_taken_for_this_runs(folder: Path, place: Path) -> None:
    """Its data order was another: not finished before, and not overwritten unasked either."""
    older = Path(shutil.copytree(folder, place / "older"))
    results_of = json.loads((older / "results.json").read_text())
    del results_of["data_hashes"]["version of training"]
    (older / "results.json").write_text(json.dumps(results_of))
    run = starts.type_(
        place, *SMALL, "train.batch_size=8", "train.micro_batch_size=4",
        "hydra.sweep.dir=.", "hydra.sweep.subdir=older", "-m",
    )  # fmt: skip
    assert run.returncode == 1
    differ = f"version of training: 3 or earlier before, {prepared_models.VERSION} now differ"
    assert f"another configuration ({differ})" in run.stderr
    assert json.loads((older / "results.json").read_text()) == results_of


@pytest.mark.parametrize("compute", ["zero2", "zero3_offload", "ddp"])
def test_two_ranks_train_as_one_process_does(compute: str, folder: Path, place: Path) -> None:
    name = f"two-{compute}"
    line = [*SMALL, "train.batch_size=8", f"name={name}", f"compute={compute}", "compute.processes=2"]
    if compute.startswith("zero3"):  # else weights as small as these are not divided
        line += ["+compute.deepspeed.zero_optimization.stage3_param_persistence_threshold=0", "train.save_steps=2"]
    run = starts.type_(place, *line)
    assert run.returncode == 0, run.stderr
    twin = next((place / "runs" / name).glob("*/results.json")).parent
    assert run.stdout.rstrip().endswith(f"results: {twin.relative_to(place)}/results.json")
    for one, other in zip(losses_of(folder), losses_of(twin), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for key in ("win_rate", "m_norm", "h_norm", "update_norm", "effective_update"):  # they see a wrong curvature,
        logged = [json.loads(line)[key] for path in (folder, twin) for line in (path / "train.jsonl").open()]
        assert logged[:4] == pytest.approx(logged[4:], rel=1e-2)  # which the losses hide
    for model, expected in metrics_of(folder).items():
        for name in ("forget_probability", "retain_probability", "mia_auc"):
            assert metrics_of(twin)[model][name] == pytest.approx(expected[name], rel=0.02)
    for rank in (0, 1):
        assert "unlearn: 4 steps" in (twin / "ranks" / "unlearn" / f"rank{rank}.log").read_text()


def test_torchrun_s_workers_get_the_numbers_of_our_own(place: Path) -> None:
    """The run that they join prepares nothing anew, and leaves a log of each rank."""
    line = (*SMALL, "train.batch_size=8", "compute=zero2")
    own = starts.type_(place, *line, "name=two-zero2", "compute.processes=2")  # finished before, after the test above
    assert own.returncode == 0, own.stderr
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    joined = type_(place, *line, "name=joined", under=torchrun)
    assert joined.returncode == 0, joined.stderr
    folders = [next((place / "runs" / name).glob("*/results.json")).parent for name in ("two-zero2", "joined")]
    assert metrics_of(folders[0]) == metrics_of(folders[1]) and losses_of(folders[0]) == losses_of(folders[1])
    assert json.loads((folders[1] / "results.json").read_text())["config"]["compute"]["processes"] == 2
    assert joined.stdout.count("unlearn: 4 steps") == 1  # rank 0 alone speaks
    for rank in (0, 1):
        assert "unlearn: 4 steps" in (folders[1] / "ranks" / "unlearn" / f"rank{rank}.log").read_text()


@pytest.mark.parametrize("compute", ["cpu", "ddp", "zero3"])
def test_a_checkpoint_is_measured_alone_and_gets_the_numbers_of_its_run(
    compute: str, folder: Path, place: Path
) -> None:
    """Every metric, whether one process puts the questions or two, each of which may hold half of the weights."""
    line = [*SMALL, "stages=[evaluate]", f"model.path={folder / 'model'}", f"name=measured-{compute}"]
    run = starts.type_(place, *line, f"compute={compute}", "evaluate.batch_size=24")
    assert run.returncode == 0, run.stderr
    found = next((place / "runs" / f"measured-{compute}").glob("*/results.json")).parent
    assert metrics_of(found)["unlearned"] == pytest.approx(metrics_of(folder)["unlearned"], nan_ok=True)
    own, others = (read_records(each / "records" / "unlearned" / "retain.jsonl") for each in (folder, found))
    assert others.generation == own.generation and others.unit == own.unit  # and the original scores them
    assert others.numbers("generation_nll") == pytest.approx(own.numbers("generation_nll"), rel=1e-4)


def test_retrained_answers_may_come_from_a_file(folder: Path, place: Path) -> None:
    run = starts.type_(
        place, *SMALL, "stages=[evaluate]", f"model.path={folder / 'model'}", "name=recorded",
        f"retrained.records={folder / 'records' / 'unlearned'}",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = next((place / "runs" / "recorded").glob("*/results.json")).parent
    assert metrics_of(found)["unlearned"]["forget_quality"] == 1.0  # compared with its own answers


def test_a_killed_run_leaves_no_orphan_and_resumes_to_the_same_numbers(folder: Path, place: Path) -> None:
    line = (*SMALL, "train.batch_size=8", "train.micro_batch_size=4", "train.save_steps=2", "name=killed")
    process = start(place, *line)
    deadline = time.time() + 120
    while time.time() < deadline and not list((place / "runs" / "killed").rglob("COMPLETE")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # the launcher alone: its workers must notice
    process.communicate(timeout=20)
    time.sleep(1)
    assert not processes_in(place)
    assert not list((place / "runs" / "killed").rglob("results.json"))
    again = type_(place, *line)
    assert again.returncode == 0, again.stdout + again.stderr
    assert any(line in again.stdout for line in ("resuming from checkpoint-", "unlearn: done before"))
    twin = next((place / "runs" / "killed").rglob("results.json")).parent
    assert metrics_of(twin) == metrics_of(folder) and losses_of(twin) == losses_of(folder)


def processes_in(place: Path) -> list[str]:
    """The processes that work in `place`, workers included, whose command lines say nothing."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while we look
            if (path / "cwd").readlink() == place:
                found.append((path / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(
    ("stage", "compute"), [("prepare", "compute=cpu"), ("unlearn", "compute=cpu"), ("unlearn", "compute=zero2")]
)
def test_a_signal_at_any_stage_leaves_no_process(
    stage: str, compute: str, number: signal.Signals, folder: Path, place: Path
) -> None:
    name = f"signal-{stage}-{compute[8:]}-{number}"
    endless = ["prepare.epochs=999", f"prepare.seed={int(number)}"] if stage == "prepare" else []
    process = start(place, *SMALL, "train.batch_size=8", "train.max_steps=9999", f"name={name}", compute, *endless)
    assert processes_in(place)
    deadline = time.time() + 120
    while not (seen := list((place / "runs" / name).glob(f"*/ranks/{stage}/rank0.log"))) and time.time() < deadline:
        time.sleep(0.05)
    assert seen
    time.sleep(5)  # at whatever it does then
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=20)
    time.sleep(1)
    assert not processes_in(place)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    if number != signal.SIGKILL:
        assert err.endswith("soul_exp: interrupted; the same command resumes where this one stopped\n")
        assert "Traceback" not in err and "W1" not in err


def test_a_console_that_cannot_be_written_ends_no_command_and_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:  # every write fails, as on a full disk
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-m", "soul_exp", *SMALL, "seed=0,1", "stages=[]", "-m"],
            cwd=tmp_path, env=environment, text=True, stdout=full, stderr=subprocess.PIPE,
        )  # fmt: skip
    expected = "soul_exp: standard output cannot be written (No space left on device): nothing more is shown\n"
    assert (done.returncode, done.stderr) == (0, expected)


def test_what_the_encoding_of_the_console_lacks_is_written_as_an_escape(tmp_path: Path) -> None:
    with (tmp_path / "console").open("wb") as file, Console(file, "ascii") as console:
        console.write("a \u2014 b \u4f4f\n")
    assert (tmp_path / "console").read_bytes() == b"a \\u2014 b \\u4f4f\n"


def test_stages_empty_checks_and_runs_nothing(place: Path) -> None:
    run = starts.type_(place, "stages=[]", "task=copyright", "loss=po", "name=checked")
    assert run.returncode == 0 and "checked, nothing to run" in run.stdout
    assert not list((place / "runs" / "checked").rglob("results.json"))


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        (["optimizer=adamm"], ["optimizer=adamm is unknown, did you mean adam?"]),
        (["optimizer.lrr=1"], ["optimizer.lrr=1: no such option, did you mean optimizer.lr?"]),
        (["attack=[relearn,quantize]"], ["attack=quantize is unknown, did you mean quantise?"]),
        (["experiment=ablation_rhoo"], ["experiment=ablation_rhoo is unknown, did you mean ablation_rho?"]),
        (["experiment=ablation_rhoo", "-m"], ["experiment=ablation_rhoo is unknown, did you mean ablation_rho?"]),
        (["experiment=ablation_rho", "budget=tiny"], ["budget=tiny is unknown: choose one of full, smoke"]),
        (["cache=/proc/nowhere"], ["cache /proc/nowhere cannot be written", "choose another folder"]),
    ],
)
def test_bad_input_gets_one_sentence_and_no_results(
    arguments: Sequence[str], sentences: Sequence[str], place: Path
) -> None:
    run = starts.type_(place, *arguments, "name=bad")
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert all(sentence in run.stderr for sentence in sentences), run.stderr
    assert not list((place / "runs").glob("bad/**/results.json"))


def test_numbers_typed_by_hand_are_not_called_tuned(folder: Path, place: Path) -> None:
    typed = results.read(folder)
    assert typed is not None and typed.tuned is None  # the fixture types train.max_steps


def test_a_run_whose_weights_are_lost_keeps_its_row_and_the_others_numbers(folder: Path, place: Path) -> None:
    line = ["loss=grad_ascent", "optimizer=sgd", "optimizer.lr=1e30", "train.max_grad_norm=0", "name=lost"]
    run = starts.type_(place, *SMALL, *line)
    assert run.returncode == 0, run.stderr
    found = results.read(next((place / "runs" / "lost").rglob("results.json")).parent)
    assert found is not None and found.status == "diverged" and found.utility is None
    assert "diverged" in found.reasons["utility"]
    assert found.metrics["retrained"] == pytest.approx(metrics_of(folder)["retrained"])


def test_what_is_damaged_in_the_cache_or_in_the_folder_of_a_killed_run_is_named_and_made_again(
    folder: Path, place: Path, tmp_path: Path
) -> None:
    """One byte of each prepared model, a truncated file of answers, and then one byte of the unlearned model."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    shutil.copytree(place / "cache", cache)
    line = [*SMALL, "train.batch_size=8", "train.micro_batch_size=4", f"cache={cache}", f"hydra.run.dir={out}"]
    prepared, (records, _) = (cache / "models").glob("*/model.safetensors"), (cache / "answers").glob("*/forget.jsonl")
    damaged = [*prepared, records]
    assert len(damaged) == 3
    for path in damaged[:2]:
        flip(path)
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:-1]))
    run = starts.type_(place, *line)
    assert run.returncode == 0, run.stderr
    logs = [path.read_text() for path in (out / "ranks").rglob("*.log")]  # of ranks that do not print
    printed = "".join([run.stdout, run.stderr, *logs])
    for path in damaged:
        assert f"{path.parent} is damaged ({path.name}: " in printed
    assert metrics_of(out) == metrics_of(folder)
    (out / "results.json").unlink()
    flip(out / "model" / "model.safetensors")
    run = starts.type_(place, *line)
    assert "model is damaged (model.safetensors: checksum differs): it is not used" in run.stdout + run.stderr
    assert metrics_of(out) == metrics_of(folder)


def flip(path: Path) -> None:
    """Change the last bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_adapter_is_unlearned_saved_merged_and_measured_again(folder: Path, place: Path) -> None:
    line = [*SMALL, "adapter=lora", "adapter.r=4", "optimizer.lr=3e-3"]
    run = starts.type_(place, *line, "name=lora")
    assert run.returncode == 0, run.stderr
    adapted = next((place / "runs" / "lora").rglob("results.json")).parent
    found = results.read(adapted)
    assert found is not None and found.choices["adapter"] == "lora" and found.config["adapter"]["r"] == 4
    assert {path.name for path in (adapted / "model").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert found.metrics["original"] == metrics_of(folder)["original"] != found.metrics["unlearned"]
    again = starts.type_(place, *SMALL, "stages=[evaluate]", f"model.path={adapted / 'model'}", "name=lora_measured")
    assert again.returncode == 0, again.stderr
    measured = next((place / "runs" / "lora_measured").rglob("results.json")).parent
    assert metrics_of(measured)["unlearned"] == metrics_of(adapted)["unlearned"]
    run = starts.type_(place, *line, "adapter.merge=true", "stages=[unlearn]", "name=lora_merged")
    assert run.returncode == 0, run.stderr
    merged = next((place / "runs" / "lora_merged").rglob("model.safetensors")).parent
    assert not (merged / "adapter_config.json").exists()
    ids = torch.arange(40).reshape(2, 20)
    logits = [loading.load_model(str(path)).eval()(input_ids=ids).logits for path in (merged, adapted / "model")]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
