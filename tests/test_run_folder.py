"""The files of a run folder: only a run that starts changes the record of its command and of its failure."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import starts
from filelock import FileLock
from omegaconf import OmegaConf
from starts import TINY

from soul_exp import compose, results
from soul_exp.checks.folders import check_entries
from soul_exp.errors import UsageError
from soul_exp.files import read_sealed, write_sealed
from soul_exp.models.checkpoint import UNLEARNED
from soul_exp.stages.stage import MODEL, RECORDS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run_folder")


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    """The folder of a finished run."""
    run = starts.type_(root, *TINY, "hydra.run.dir=finished")
    assert run.returncode == 0, run.stderr
    return root / "finished"


@pytest.fixture
def out(finished: Path) -> Iterator[Path]:
    """A copy of it, with the error.txt that an older version may have left."""
    copy = Path(shutil.copytree(finished, finished.with_name("copy")))
    (copy / "error.txt").write_text("of before")
    yield copy
    shutil.rmtree(copy)


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """File -> time of writing and content, without the lock and the log, which every command writes."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "soul_exp.log")]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_run_records_its_command(finished: Path) -> None:
    assert OmegaConf.load(finished / ".hydra" / "overrides.yaml") == list(TINY)
    config = OmegaConf.load(finished / ".hydra" / "config.yaml")
    assert config.train.max_steps == 2 and "hydra" not in config
    assert OmegaConf.load(finished / ".hydra" / "hydra.yaml").hydra.job.name == "soul_exp"
    assert len(list((finished / ".hydra").iterdir())) == 3 and not (finished / "error.txt").exists()


def test_results_made_again_from_the_unlearned_model_state_its_passes_if_that_does(out: Path) -> None:
    """Two steps of three parts (altpo), and before the first Sophia's pass on one of them; older models state none."""

    def passes() -> Any:
        return json.loads((out / results.NAME).read_text())["passes"]

    def made_again() -> Any:
        (out / results.NAME).unlink()
        run = starts.type_(out.parent, *TINY, f"hydra.run.dir={out}")
        assert run.returncode == 0 and "unlearn: done before" in run.stdout, run.stdout + run.stderr
        return passes()

    assert passes() == made_again() == pytest.approx({"forward": 7 / 6, "backward": 7 / 6}, abs=1e-12)
    content = read_sealed(out / MODEL / UNLEARNED)
    assert isinstance(content, dict)
    del content["outcome"]["passes"]
    write_sealed(out / MODEL / UNLEARNED, content)
    assert made_again() == {}


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        (["overwrite=no"], "overwrite=no: found the text 'no', expected true or false: type overwrite=false"),
        (["overwrite=off", "seed=1"], "overwrite=off: found the text 'off', expected true or false"),
        (["overwrite=maybe", "stages=[]"], "type overwrite=true or overwrite=false"),
        (["train.batch_size=0"], "train.batch_size=0: expected a whole number"),
        (["seed=1"], "holds finished results of another configuration (seed: 0 before, 1 now differ)"),
        (["seed=1", "stages=[]"], "holds finished results of another configuration"),
        (["overwrite=true", "optimizer=adamm"], "optimizer=adamm is unknown, did you mean adam?"),
        (["overwrite=true", "loss.layer=99", "loss=rmu"], "loss.layer=99"),
    ],
)
def test_a_rejected_command_leaves_a_finished_run_unchanged(typed: list[str], reason: str, out: Path) -> None:
    before = content(out)
    run = starts.type_(out.parent, *TINY, f"hydra.run.dir={out}", *typed)
    assert run.returncode == 1 and reason in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert content(out) == before


def test_a_sweep_is_rejected_before_its_first_job(root: Path) -> None:
    run = starts.type_(root, *TINY, "name=sweep", "overwrite=no", "seed=0,1", "-m")
    assert run.returncode == 1 and run.stderr.startswith("soul_exp: overwrite=no: found the text 'no'"), run.stderr
    assert not list((root / "runs" / "sweep").glob("*/"))


@pytest.mark.parametrize("more", [[], ["seed=0,1", "-m"]])
def test_a_name_that_leads_out_of_runs_is_rejected_before_a_folder_is_made(more: list[str], tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    run = starts.type_(place, *TINY, "stages=[]", "name=../../outside", *more)
    assert run.returncode == 1 and run.stderr == (
        "soul_exp: name='../../outside': expected a text of folder names with / between them, none of them . or ..\n"
    )
    assert [*tmp_path.iterdir()] == [place] and not list(place.iterdir())


@pytest.mark.parametrize("name", ["/tmp/a", "a/../../../b", "a\nb", "a\x1b[2Jb", "", ".", "..", "a//b", "a/", 7, None])
def test_a_name_is_folder_names_below_runs(name: Any) -> None:
    with pytest.raises(UsageError, match="expected a text of folder names with / between them"):
        compose.run_name(name)
    assert compose.run_name("paper/tofu forget10") == "paper/tofu forget10"


def test_a_sweep_over_names_rejects_one_that_leads_out_of_runs_before_its_first_job(tmp_path: Path) -> None:
    run = starts.type_(tmp_path, *TINY, "stages=[]", "name=a,../b", "-m")
    assert run.returncode == 1 and run.stderr.startswith("soul_exp: name='../b': expected"), run.stderr
    assert not list(tmp_path.iterdir())


def test_the_same_command_again_keeps_its_record_and_removes_the_reason_of_a_failure(out: Path) -> None:
    before = content(out)
    run = starts.type_(out.parent, *TINY, f"hydra.run.dir={out}", "overwrite=false")
    assert run.returncode == 0 and "finished before, skipped" in run.stdout, run.stderr
    assert content(out) == {name: kept for name, kept in before.items() if name != "error.txt"}


def test_overwriting_records_the_new_command(out: Path) -> None:
    run = starts.type_(out.parent, *TINY, f"hydra.run.dir={out}", "overwrite=true", "seed=1")
    assert run.returncode == 0, run.stderr
    assert OmegaConf.load(out / ".hydra" / "overrides.yaml") == [*TINY, "overwrite=true", "seed=1"]
    assert not (out / "error.txt").exists()


def test_a_command_that_does_no_work_leaves_no_folder(tmp_path: Path) -> None:
    checked = starts.type_(tmp_path, *TINY, "stages=[]", "name=a/b")
    assert checked.returncode == 0 and "checked, nothing to run" in checked.stdout
    refused = starts.type_(tmp_path, *TINY, "train.batch_size=0")
    assert refused.returncode == 1
    assert refused.stderr == "soul_exp: train.batch_size=0: expected a whole number of 1 or more\n"
    sweep = starts.type_(tmp_path, *TINY, "train.batch_size=0,-1", "-m")
    assert sweep.returncode == 1 and re.search(r"\n2 jobs in \S+ (s|min): 2 failed\n$", sweep.stdout)
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs/tofu").mkdir(parents=True)
    refused = starts.type_(tmp_path, *TINY, "task.requests=[]", "train.batch_size=0")
    assert refused.returncode == 1 and [*tmp_path.rglob("*")] == [tmp_path / "runs", tmp_path / "runs/tofu"]


def test_a_finished_run_is_checked_and_said_to_be_finished(out: Path) -> None:
    before = content(out)
    typed = [*TINY, f"hydra.run.dir={out}", "stages=[]"]
    run = starts.type_(out.parent, *typed)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"checked, nothing to run (stages=[]); finished before: {out}\n"
    other = starts.type_(out.parent, *typed, "seed=1")
    assert other.returncode == 1 and "holds finished results of another configuration (seed: 0 before" in other.stderr
    wrong = starts.type_(out.parent, *typed, "train.batch_size=0")
    assert wrong.returncode == 1 and "train.batch_size=0: expected" in wrong.stderr and content(out) == before


def test_a_rejected_command_leaves_a_running_run_unchanged(root: Path) -> None:
    running = root / "running"
    (running / ".hydra").mkdir(parents=True)
    (running / ".hydra" / "overrides.yaml").write_text("- seed=7\n")
    before = content(running)
    with FileLock(running / ".lock"):
        run = starts.type_(root, *TINY, "train.batch_size=0", f"hydra.run.dir={running}")
    assert run.returncode == 1 and "train.batch_size=0: expected" in run.stderr
    assert content(running) == before


def test_a_run_that_fails_keeps_the_reason_and_its_command(root: Path) -> None:
    out = root / "failed"
    start = starts.Command(root, root / "failed.log", *TINY, "train.max_steps=9999", f"hydra.run.dir={out}")
    deadline = time.monotonic() + starts.SECONDS
    while not (out / "train.jsonl").exists():
        assert not start.is_over() and time.monotonic() < deadline, start.text()
        time.sleep(0.02)
    (worker,) = (pid for pid in starts.members(start.pid) if pid != start.pid)
    os.kill(worker, signal.SIGKILL)
    assert start.end() == 1 and "(signal 9)" in (out / "error.txt").read_text()
    assert "- train.max_steps=9999\n" in (out / ".hydra" / "overrides.yaml").read_text()


def test_every_entry_of_a_run_folder_that_is_of_the_wrong_kind_is_rejected_before_the_work(
    finished: Path, tmp_path: Path
) -> None:
    """But what replaces itself: the answers and the marker, which are written anew with their folder."""
    paths = [path.relative_to(finished) for path in finished.rglob("*")]
    entries = [path for path in paths if not {MODEL, RECORDS} & {*path.parts[:-1]}]
    names = {path.name for path in entries} - {"rank1.log"}
    assert names == {
        ".lock", "results.json", "train.jsonl", "soul_exp.log", "model", "records", "ranks", "prepare", "unlearn",
        "rank0.log", ".hydra", "config.yaml", "hydra.yaml", "overrides.yaml",
    }  # fmt: skip
    for entry in (*entries, Path("error.txt"), Path("trajectory.jsonl"), Path("checkpoints")):
        out = tmp_path / entry.name
        (out / entry).parent.mkdir(parents=True)
        is_folder = (finished / entry).is_dir() or entry.name == "checkpoints"
        if is_folder:
            (out / entry).touch()
        else:
            (out / entry).mkdir()
        found = "a file, where a run has a folder" if is_folder else "a folder, where a run writes a file"
        with pytest.raises(UsageError, match=f"^{re.escape(str(out / entry))} is {found}: remove it$"):
            check_entries(out)
        shutil.rmtree(out)
