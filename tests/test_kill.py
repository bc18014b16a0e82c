"""Nothing is lost: whatever kills a run and whenever, the same command ends with the same numbers, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kills
import pytest
from composing import composed
from kills import numbers
from starts import SECONDS, Start, members

from soul_exp import results
from soul_exp.training import checkpoints

ENGINES = {"cpu": [], "zero2": ["compute=zero2", "compute.processes=2"]}


@dataclass
class Door:
    """A folder with a cache that all runs of this module share, and one run of each engine that was never killed."""

    folder: Path
    seconds: dict[str, float]

    def config(self, engine: str, **changes: Any) -> dict[str, Any]:
        config = composed(self.folder, *kills.TINY, *ENGINES[engine])
        config["task"]["metrics"] = {name: config["task"]["metrics"][name] for name in kills.CHEAP}
        return {**config, **changes}

    def uninterrupted(self, engine: str) -> tuple[Any, ...]:
        out = self.folder / f"uninterrupted-{engine}"
        if not (out / results.NAME).exists():
            for _ in range(1 if engine in self.seconds else 2):  # the first also prepares the models: it is not timed
                shutil.rmtree(out, ignore_errors=True)
                began = time.monotonic()
                finish(Start(self.config(engine), out))
                self.seconds[engine] = time.monotonic() - began
        return numbers(out)

    def killed(self, engine: str, step: int) -> Path:
        """A run folder whose newest checkpoint is at least that of `step`; another complete one is before it."""
        out = self.folder / f"killed-{engine}-{step}"
        if not out.exists():
            self.uninterrupted(engine)
            start = Start(self.config(engine), out)
            wait_for(start, lambda: any(out.glob(f"checkpoints/*/checkpoint-{step}/{checkpoints.COMPLETE}")))
            os.kill(start.pid, signal.SIGKILL)
            assert start.end() == -signal.SIGKILL
        return out

    def copy(self, out: Path, name: str) -> Path:
        return Path(shutil.copytree(out, self.folder / name))


def finish(start: Start) -> str:
    code = start.end()
    assert code == 0, start.text()[-3000:]
    return start.text()


def wait_for(start: Start, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert not start.is_over() and time.monotonic() < deadline, start.text()[-3000:]
        time.sleep(0.001)


def newest(out: Path) -> Path:
    found = max(out.glob("checkpoints/*/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert (found / checkpoints.COMPLETE).exists()
    return found


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Door:
    return Door(tmp_path_factory.mktemp("kill"), {})


@pytest.mark.parametrize(
    "number", [20, pytest.param(100, marks=pytest.mark.soak)], ids=["some kills", "a soak of 100 kills"]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_killed_at_any_time_ends_with_the_numbers_of_one_that_was_not(
    engine: str, number: int, door: Door
) -> None:
    """kill -9 of the launcher, of a worker, SIGTERM; a quarter during a save; again and again in one run."""
    expected = door.uninterrupted(engine)
    folder = door.folder / f"{engine}-{number}"
    folder.mkdir()
    report = kills.chains(
        door.config(engine), folder, seed=number, kills=number, expected=expected, seconds=door.seconds[engine]
    )
    print(f"\n{engine}: {report}")
    assert report.total >= number and set(report.kills) == set(kills.KINDS)
    assert report.places[kills.SAVE] >= number / 4 and report.runs < report.total


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, str, Callable[[Path], Any], str]] = {
    "a flipped bit": ("cpu", "optimizer.pt", flip, "optimizer.pt: checksum differs"),
    "a truncated file": (
        "cpu", "model.safetensors", lambda path: os.truncate(path, 1000), "model.safetensors: 1000 bytes, expected"
    ),
    "a file less": ("cpu", "trainer_state.json", Path.unlink, "trainer_state.json: missing"),
    "a flipped bit of rank 1": ("zero2", "global_step*/*rank_1*optim_states.pt", flip, "checksum differs"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over_for_the_one_before_it(damage: str, door: Door) -> None:
    engine, name, spoil, reason = DAMAGES[damage]
    out = door.copy(door.killed(engine, 8), f"damaged-{damage.replace(' ', '-')}")
    checkpoint = newest(out)
    before = int(checkpoint.name.split("-")[1]) - 2
    (path,) = checkpoint.glob(name)
    spoil(path)
    printed = finish(Start(door.config(engine), out))
    assert f"{checkpoint.name} is damaged (" in printed and reason in printed
    assert f"checkpoint-{before} is used instead" in printed and f"resuming from checkpoint-{before}" in printed
    assert numbers(out) == door.uninterrupted(engine)


def test_another_engine_is_an_error_or_begins_anew_or_continues_from_the_weights(door: Door) -> None:
    killed = door.killed("cpu", 8)
    step = newest(killed).name
    other = door.copy(killed, "refused")
    start = Start(door.config("zero2"), other)
    assert start.end() == 1
    assert (
        f"failed: {other} holds {step} of compute=cpu with 1 process, this is compute=zero2 with 2 processes: type "
        f"the same compute, or resume=weights" in start.text()
    )
    assert newest(other).name == step and not (other / "ranks").joinpath("prepare").exists()
    logged = (other / "train.jsonl").read_text()
    assert Start(door.config("zero2", overwrite=True), other).end() == 1
    assert (other / "train.jsonl").read_text() == logged != ""  # nothing was cleared for a run that stops with an error

    printed = finish(Start(door.config("zero2", resume="weights"), other))
    assert f"resuming from the weights of {step}" in printed
    found, (_, log, _) = results.read(other), numbers(other)
    assert found is not None and found.num_steps == 12
    assert any(f"continued from the weights of {step} of compute=cpu with 1 process" in note for note in found.notes)
    full = door.uninterrupted("zero2")[1]
    assert column(log, "step") == list(range(1, 13)) and column(log, "epoch") == column(full, "epoch")
    assert column(log, "learning_rate") == column(full, "learning_rate")
    assert column(log, "forget_loss") == pytest.approx(column(full, "forget_loss"), rel=0.2)

    anew = door.copy(killed, "anew")
    assert "resuming" not in finish(Start(door.config("zero2", resume="restart"), anew))
    assert numbers(anew) == door.uninterrupted("zero2")


def test_one_process_continues_from_the_weights_of_two_ranks(door: Door) -> None:
    out = door.copy(door.killed("zero2", 8), "back")
    assert "resuming from the weights of" in finish(Start(door.config("cpu", resume="weights"), out))
    assert column(numbers(out)[1], "learning_rate") == column(door.uninterrupted("cpu")[1], "learning_rate")


def column(log: str, key: str) -> list[Any]:
    return [json.loads(line)[key] for line in log.splitlines()]


def test_a_killed_preparation_resumes_and_leaves_no_checkpoint_in_the_cache(door: Door) -> None:
    expected, out = door.uninterrupted("cpu"), door.folder / "prepared"
    config = door.config("cpu", cache=str(door.folder / "another-cache"))
    start = Start(config, out)
    made = Path(config["cache"]) / "models"
    wait_for(start, lambda: any(made.glob(f".*.checkpoints/checkpoint-4/{checkpoints.COMPLETE}")))
    os.kill(start.pid, signal.SIGKILL)
    start.end()
    assert not list(made.glob("*/prepared.json"))
    finish(Start(config, out))
    logs = "".join(path.read_text() for path in (out / "ranks" / "prepare").glob("rank*.log"))
    assert "resuming from checkpoint-" in logs  # of the target or of the retrained model, whichever had one first
    assert numbers(out) == expected
    assert not list(made.rglob("*checkpoint*"))


def test_a_second_start_at_the_same_time_waits_and_finds_it_finished(door: Door) -> None:
    expected, out = door.uninterrupted("cpu"), door.folder / "twice"
    first, second = (Start(door.config("cpu"), out) for _ in range(2))
    assert first.end() == 0 and second.end() == 0, first.text()[-3000:]
    assert first.text().count("finished before, skipped") == 1 and first.text().count("unlearn: 12 steps") == 1
    assert numbers(out) == expected


def test_a_killed_overwrite_leaves_no_old_numbers_beside_a_new_model(door: Door) -> None:
    door.uninterrupted("cpu")
    out = door.copy(door.folder / "uninterrupted-cpu", "overwritten")
    config = door.config("cpu", overwrite=True, seed=1)
    start = Start(config, out)
    wait_for(start, lambda: any(out.glob(f"checkpoints/*/checkpoint-4/{checkpoints.COMPLETE}")))
    os.kill(start.pid, signal.SIGKILL)
    start.end()
    assert not any((out / name).exists() for name in (results.NAME, "records", "model"))
    assert "resuming from checkpoint-" in finish(Start(config, out))
    found = results.read(out)
    assert found is not None and found.seeds["seed"] == 1 and numbers(out) != door.uninterrupted("cpu")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def small_disk(door: Door) -> Iterator[Path]:
    """A file system of 220 MiB."""
    folder = Path(tempfile.mkdtemp(dir=door.folder))
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("a small file system can be mounted by root only")
    try:
        mount("-t", "tmpfs", "-o", "size=220m", "tmpfs", str(folder))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a small file system cannot be mounted here: {error.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_disk_stops_with_one_line_and_the_run_resumes_when_there_is_room(
    engine: str, door: Door, small_disk: Path
) -> None:
    expected, out = door.uninterrupted(engine), small_disk / "run"
    start = Start(door.config(engine), out)
    wait_for(start, lambda: any(out.glob(f"checkpoints/*/checkpoint-4/{checkpoints.COMPLETE}")))
    for pid in members(start.pid):
        os.kill(pid, signal.SIGSTOP)  # it would be done before the disk is full
    with (small_disk / "ballast").open("wb") as file:  # somebody else's
        while shutil.disk_usage(small_disk).free > 2**16:
            file.write(b"x" * min(2**20, shutil.disk_usage(small_disk).free - 2**15))
            file.flush()
    for pid in members(start.pid):
        os.kill(pid, signal.SIGCONT)
    assert start.end() == 1
    printed = [line for line in start.text().splitlines() if line.startswith("failed:")]
    assert len(printed) == 1 and f"failed: the disk of {out} is full (0." in printed[0], start.text()[-3000:]
    assert "MiB free): delete files, then type the same command" in printed[0] and "Traceback" not in start.text()
    mount("-o", "remount,size=500m", str(small_disk))
    assert "resuming from checkpoint-" in finish(Start(door.config(engine), out))
    assert numbers(out) == expected
