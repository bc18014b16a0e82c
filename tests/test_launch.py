"""How workers are started, joined, heard and ended: the command line with toys for work (toy.py)."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import toy

from soul_exp.distributed import processes
from soul_exp.distributed.environment import LaunchEnvironment, first_host, launch_environment
from soul_exp.errors import UnreachableError, UsageError, WorkerError

TESTS = Path(__file__).parent
LAST_LINE = "soul_exp: interrupted; the same command resumes where this one stopped"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def begin(
    place: Path,
    *arguments: str,
    under: tuple[str, ...] = (),
    start_method: str = "forkserver",
    path: str = "",
    modules: str = "torch.distributed",
) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
    environment["SOUL_EXP_START_METHOD"] = start_method
    environment["SOUL_EXP_PRELOAD"] = modules  # of the toys
    return subprocess.Popen(
        [sys.executable, *under, str(TESTS / "toy.py"), *arguments],
        cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def done(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """Exit code, output and errors; what hangs is killed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def log_of(place: Path, rank: int) -> str:
    return (place / f"ranks/toy/rank{rank}.log").read_text()


def wait_for_sleep(place: Path, ranks: int, seconds: float = 120) -> list[int]:
    """The process ids of workers that have gone to sleep, and of the fork server, their parent."""
    files = [place / f"asleep{rank}" for rank in range(ranks)]
    deadline = time.monotonic() + seconds
    while not all(file.is_file() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return sorted({int(pid) for file in files for pid in file.read_text().split()})


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def assert_all_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_alive(pid)]


def test_the_last_rank_s_error_is_reported_though_rank_0_was_inside_a_collective(tmp_path: Path) -> None:
    code, _, err = done(begin(tmp_path, "last_raises", "2"))
    assert code == 1 and err.startswith("soul_exp: worker 1 of 2 failed (exit code 1); its log: ")
    assert err.strip().endswith("ArithmeticError: of the last rank") and "in last_raises" in err
    assert log_of(tmp_path, 1).endswith("ArithmeticError: of the last rank\n")
    assert "Connection closed by peer" not in err


def test_a_killed_worker_is_named_with_its_signal(tmp_path: Path) -> None:
    code, _, err = done(begin(tmp_path, "last_is_killed", "2"))
    assert code == 1 and err.startswith("soul_exp: worker 1 of 2 failed (signal 9)")
    assert "SIGKILL" in err and "Connection closed by peer" not in err


@pytest.mark.parametrize("work", [toy.interrupt_itself, toy.exit_with_0])
def test_an_exit_code_of_0_without_a_returned_value_is_a_failure(work: Any, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"worker 0 of 1 failed \(exit code 0, but it did not return\)"):
        processes.launch(work, processes=1, threads=1, logs=tmp_path)


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_what_any_user_can_write_to_the_store_of_a_launcher_is_not_unpickled(tmp_path: Path) -> None:
    store = dist.TCPStore(processes.HOST, 0, is_master=True, wait_for_workers=False)
    other = dist.TCPStore(processes.HOST, store.port, is_master=False, wait_for_workers=False)
    other.set("value0", pickle.dumps(Planted(tmp_path / "marker")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"codec|Expecting"):
        processes._value(store, 0, None)  # type: ignore[arg-type]
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(("work", "kind"), [(toy.refuse, UsageError), (toy.reach_nothing, UnreachableError)])
def test_a_worker_s_usage_error_is_raised_with_its_message_alone_and_leaves_no_temporary_file(
    work: Callable[[int], None], kind: type[UsageError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(UsageError) as caught:
        processes.launch(work, processes=2, threads=1, logs=tmp_path)
    assert type(caught.value) is kind and str(caught.value) == "a sentence for the user"
    assert not list((tmp_path / "temporary").glob("pytorch-*"))


def test_a_launch_that_ends_leaves_the_workers_of_another_thread_alone(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads:
        first = threads.submit(processes.launch, toy.nap, 1.0, processes=1, threads=1, logs=tmp_path / "a")
        while not (tmp_path / "a/rank0.log").is_file():  # at work
            time.sleep(0.01)
        second = threads.submit(processes.launch, toy.nap, 1.5, processes=1, threads=1, logs=tmp_path / "b")
        assert first.result() == [1.0] and second.result() == [1.5]


@pytest.mark.parametrize(
    ("number", "work", "processes", "code"),
    [
        (signal.SIGTERM, "sleep", 2, 143),
        (signal.SIGINT, "sleep_alone", 2, 130),
        (signal.SIGKILL, "sleep", 2, -signal.SIGKILL),
        pytest.param(signal.SIGTERM, "sleep_alone", 1, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "sleep", 2, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "sleep_alone", 1, -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_launcher_ends_its_workers(
    number: signal.Signals, work: str, processes: int, code: int, tmp_path: Path
) -> None:
    command = begin(tmp_path, work, str(processes))
    workers = wait_for_sleep(tmp_path, processes)
    os.kill(command.pid, number)  # the launcher alone
    returned, _, err = done(command, 20)
    assert_all_end(workers)
    assert returned == code
    if number != signal.SIGKILL:
        assert err.strip() == LAST_LINE


def test_ctrl_c_in_a_terminal_prints_one_line(tmp_path: Path) -> None:
    """It reaches the workers too, which have nothing to say."""
    command = begin(tmp_path, "sleep_alone", "2")
    wait_for_sleep(tmp_path, 2)
    os.killpg(command.pid, signal.SIGINT)
    code, _, err = done(command, 20)
    assert code == 130 and err.strip() == LAST_LINE


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_ctrl_c_in_a_terminal_as_everything_is_imported_prints_one_line(method: str, tmp_path: Path) -> None:
    """Seconds in which Python's own handler would print a traceback of each process."""
    command = begin(tmp_path, "sleep_alone", "2", start_method=method)
    deadline = time.monotonic() + 120
    while len(started := children(command.pid)) < (2 if method == "forkserver" else 3):  # a resource tracker is one
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)
    os.killpg(command.pid, signal.SIGINT)
    code, _, err = done(command, 20)
    assert code == 130 and err.strip() == LAST_LINE
    assert_all_end(started)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_torchrun_s_workers_are_joined_and_only_rank_0_prints(tmp_path: Path) -> None:
    code, out, err = done(begin(tmp_path, "add", "2", under=TORCHRUN))
    assert code == 0, err
    assert out.count("has 3") == 1 and "rank 0 has 3" in out
    assert "rank 1 has 3" in log_of(tmp_path, 1) and not list(tmp_path.glob("asleep*"))


def test_a_joined_rank_s_error_ends_all_and_is_reported_once_by_rank_0(tmp_path: Path) -> None:
    code, _, err = done(begin(tmp_path, "last_raises", "2", under=TORCHRUN))
    assert code == 1 and err.count("ArithmeticError: of the last rank") == 1
    assert "soul_exp: worker 1 of 2 failed" in err and "in last_raises" in err
    assert log_of(tmp_path, 1).endswith("ArithmeticError: of the last rank\n")
    assert "of the last rank" in next((tmp_path / "runs").rglob("error.txt")).read_text()


def test_rank_0_s_error_message_is_printed_once_and_a_sweep_is_an_error(tmp_path: Path) -> None:
    both = {
        "refuse": begin(tmp_path, "refuse", "2", "name=refuse", under=TORCHRUN),
        "sweep": begin(tmp_path, "add", "2", "seed=0,1", "-m", under=TORCHRUN),
    }
    for name, sentence in (("refuse", "a sentence for the user"), ("sweep", "-m is a sweep")):
        code, _, err = done(both[name])
        ours = err.split("W1")[0].split("E1")[0]  # then torchrun prints
        assert code == 1 and err.count(sentence) == 1, err
        assert "Traceback" not in ours.split("torch/distributed")[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.slow
def test_ending_torchrun_ends_the_ranks_that_joined(number: signal.Signals, tmp_path: Path) -> None:
    command = begin(tmp_path, "sleep", "2", under=TORCHRUN)
    workers = wait_for_sleep(tmp_path, 2)
    os.kill(command.pid, number)
    done(command, 60)
    time.sleep(1)
    assert not any(map(is_alive, workers))


ELASTIC = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9",
    "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1",
}  # fmt: skip
STEP = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (
            ELASTIC,
            LaunchEnvironment(3, 4, 1, "a", 9, "attempt_1", serves_store=False, num_devices=2, launcher="torchrun"),
        ),
        (
            STEP,
            LaunchEnvironment(0, 4, 0, "gpu07", 15217, "attempt_0", serves_store=True, num_devices=1, launcher="srun"),
        ),
        (
            {**STEP, "SLURM_STEP_NUM_NODES": "1"},
            LaunchEnvironment(0, 4, 0, "127.0.0.1", 15217, "attempt_0", True, 1, "srun"),
        ),
        (
            {**STEP, **ELASTIC},
            LaunchEnvironment(3, 4, 1, "a", 9, "attempt_1", serves_store=False, num_devices=2, launcher="torchrun"),
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script runs once
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, None),  # a job of hydra/launcher=slurm
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "9"}, None),
    ],
)
def test_a_launch_environment_is_known_by_its_variables(
    variables: Mapping[str, str], expected: LaunchEnvironment | None
) -> None:
    assert launch_environment(variables) == expected


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "'x'"),
        ({"SLURM_STEP_NUM_TASKS": "abc"}, "'abc'"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "'SLURM_JOB_ID'"),
    ],
)
def test_a_launch_environment_that_cannot_be_read_is_an_error(variables: Mapping[str, str], found: str) -> None:
    with pytest.raises(UsageError, match=f"the variables of a launcher cannot be read .*{found}.*: start the program"):
        launch_environment(variables)


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("a[07-09,12],b3", "a07"), ("r[1-2]n[3,5]x,c", "r1n3x")]
)
def test_the_first_host_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
