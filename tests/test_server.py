"""The fork server: what its workers get from it and from their launcher, and what happens when either of them dies."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_launch import TESTS, assert_all_end, begin, done, is_alive, wait_for_sleep

import soul_exp
from soul_exp import compat, results
from soul_exp.distributed import server
from soul_exp.distributed.processes import launch
from soul_exp.errors import UsageError, WorkerError


@pytest.fixture(autouse=True)
def the_real_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server.METHOD, "forkserver")
    monkeypatch.setenv(server.PRELOAD, "torch.distributed")  # what it imports matters to the first test only


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """`run(function, *args)` is what `function(rank, *args)` returned in a worker of this process's server."""
    return lambda function, *args: launch(function, *args, processes=1, threads=1, logs=tmp_path / "ranks", alone=True)[
        0
    ]


def seen(rank: int) -> dict[str, Any]:
    return {
        "parent": os.getppid(),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "method": multiprocessing.get_start_method(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "not_imported": sorted(set(server.modules()) - set(sys.modules)),
        "frozen": gc.get_freeze_count(),
        "collects": gc.isenabled(),
        "commit": results.commit(),
    }


def test_a_worker_begins_with_everything_imported_and_nothing_else_of_the_server(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(server.PRELOAD)
    first = run(seen)
    assert first["parent"] == compat.fork_server_pid() and not first["not_imported"]
    assert first["frozen"] > 100_000 and first["collects"]
    assert first["method"] == "spawn"  # of what a library starts: it would make a server of its own
    assert first["signals"] == [signal.SIG_DFL, signal.SIG_DFL] and not first["blocked"]
    assert first["environment"]["OMP_NUM_THREADS"] == "1" and "RANK" not in first["environment"]
    assert first["environment"].get("PYTHONPATH") == os.environ.get("PYTHONPATH")  # not the server's own
    monkeypatch.chdir(tmp_path)
    assert run(seen)["directory"] == str(tmp_path) and compat.fork_server_pid() == first["parent"]


def test_a_variable_that_a_library_may_have_read_means_a_new_server(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(seen)
    for name, value in first["environment"].items():  # as if this process had imported the same libraries
        if name not in os.environ:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOUL_EXP_KERNELS", "plain")  # read where it is used
    unchanged = run(seen)
    assert unchanged["parent"] == first["parent"] and unchanged["environment"]["SOUL_EXP_KERNELS"] == "plain"
    monkeypatch.setenv("SOME_LIBRARY_READS_IT", "1")
    second = run(seen)
    assert second["parent"] != first["parent"] and second["environment"]["SOME_LIBRARY_READS_IT"] == "1"
    assert run(seen)["parent"] == second["parent"]
    assert_all_end([first["parent"]])


def speak(rank: int) -> None:
    os.system("echo from a program")
    print("from Python")


def test_a_worker_prints_to_the_streams_that_its_launcher_has_now(run: Callable[..., Any], tmp_path: Path) -> None:
    run(seen)  # the server has begun with others
    before, file = os.dup(1), (tmp_path / "printed").open("w")
    try:
        os.dup2(file.fileno(), 1)
        run(speak)
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert (tmp_path / "printed").read_text() == "from a program\nfrom Python\n"


def test_a_killed_server_is_one_message_and_no_orphan(tmp_path: Path) -> None:
    command = begin(tmp_path, "sleep", "2")
    pids = wait_for_sleep(tmp_path, 2)
    (parent,) = {int(file.read_text().split()[1]) for file in tmp_path.glob("asleep*")}
    os.kill(parent, signal.SIGKILL)
    code, _, err = done(command, 20)
    assert code == 1 and err.count("\n") == 1, err
    assert "failed (the fork server was killed, and its workers with it); its log: " in err
    assert_all_end(pids)


def test_a_server_that_is_killed_while_it_imports_is_replaced(tmp_path: Path) -> None:
    command = begin(tmp_path, "add", "2")
    while not (servers := forked_by(command.pid)):
        assert command.poll() is None
    os.kill(servers[0], signal.SIGKILL)
    code, out, err = done(command)
    assert code == 0 and "[3.0, 3.0]" in out, err
    assert not is_alive(servers[0])


def test_a_server_that_is_killed_while_the_launcher_waits_for_it_is_one_line(tmp_path: Path) -> None:
    command = begin(tmp_path, "add", "2")
    while not (servers := forked_by(command.pid)):
        assert command.poll() is None
    os.kill(servers[0], signal.SIGSTOP)
    time.sleep(4)  # the launcher has asked for its first worker by then
    os.kill(servers[0], signal.SIGKILL)
    code, out, err = done(command)
    assert code == 0 and "[3.0, 3.0]" in out and "Traceback" not in err, out + err
    assert (out + err).count("imports everything itself, which takes seconds: it ended while it") == 1, out + err


def test_a_server_that_is_killed_as_it_starts_a_worker_is_named(run: Callable[..., Any]) -> None:
    pid = run(seen)["parent"]
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(1, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(WorkerError, match="the fork server was killed as it started a worker"):
        run(seen)
    assert run(seen)["parent"] != pid  # the next call has a new one


def forked_by(pid: int) -> list[int]:
    """The fork servers among the children of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if "forkserver" in Path(f"/proc/{child}/cmdline").read_text()]


FAULTY = {
    "an import fails": ("deepspeed.py", "raise RuntimeError('of this test')", "deepspeed cannot be"),
    "a thread": (
        "sitecustomize.py",
        "import sys, threading, time\nif 'forkserver' in ' '.join(sys.orig_argv):\n"
        "    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n",
        "importing has started threads that do not survive a fork",
    ),
    "the program is not there": (
        "sitecustomize.py",
        "import sys\nif 'forkserver' in ' '.join(sys.orig_argv):\n    sys.modules['soul_exp.preload'] = None\n",
        "soul_exp.preload could not be imported",
    ),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_where_no_worker_may_be_forked_they_are_spawned_and_one_line_says_why(fault: str, tmp_path: Path) -> None:
    name, source, reason = FAULTY[fault]
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / name).write_text(source)
    code, out, err = done(
        begin(tmp_path, "add", "2", path=str(tmp_path / "path"), modules="torch.distributed,deepspeed")
    )
    assert code == 0, err
    assert out.count(f"each worker imports everything itself, which takes seconds: {reason}") == 1
    assert "[3.0, 3.0]" in out


@pytest.mark.parametrize(("answer", "faults"), [(0, 0), (3, 1)])
def test_threads_of_the_cuda_driver_are_harmless_unless_cuda_is_initialized(
    answer: int, faults: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a driver of our own, which answers as one does in a process whose parent has not, or has, initialized it."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: cc")
    source = f"int cuInit(unsigned flags) {{ return {answer}; }}"
    library = ["cc", "-shared", "-x", "c", "-", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run(library, input=source, text=True, check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    named = "lambda: (ctypes.CDLL(None).prctl(15, b'cuda00001800007'), time.sleep(600))"  # PR_SET_NAME
    (tmp_path / "driver.py").write_text(
        f"import ctypes, threading, time\nthreading.Thread(target={named}, daemon=True).start()\ntime.sleep(0.5)\n"
    )
    code, out, err = done(begin(tmp_path, "add", "2", path=str(tmp_path), modules="torch.distributed,driver"))
    assert code == 0 and "[3.0, 3.0]" in out, err
    assert out.count("takes seconds: importing has initialized CUDA, which does not survive a fork") == faults
    assert out.count("imports everything itself") == faults


def test_a_module_that_another_version_of_a_library_lacks_is_left_out_and_the_directory_is_not_searched(
    tmp_path: Path,
) -> None:
    """A script is run, so its folder is in `sys.path`, and the working directory is not."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text("import sys\nsys.modules['pyarrow.parquet'] = None\n")
    (tmp_path / "sacrebleu.py").write_text("raise RuntimeError('the working directory was searched')")
    modules = "torch.distributed, pyarrow.parquet, sacrebleu"
    code, out, err = done(begin(tmp_path, "add", "2", path=str(tmp_path / "path"), modules=modules))
    assert code == 0 and "[3.0, 3.0]" in out and "imports everything itself" not in out + err, out + err


@pytest.fixture
def temporary() -> Iterator[Path]:
    """An empty folder whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_a_command_leaves_nothing_in_the_temporary_folder(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "path"
    path.mkdir()
    (path / "keeps.py").write_text("import tempfile\nKEPT = tempfile.TemporaryDirectory(prefix='library')\n")
    monkeypatch.setenv("TMPDIR", str(temporary))
    code, out, err = done(begin(tmp_path, "add", "2", path=str(path), modules="torch.distributed,keeps"))
    assert code == 0 and "[3.0, 3.0]" in out and "imports everything itself" not in out + err, out + err
    assert not list(temporary.iterdir())


def test_a_temporary_folder_with_too_long_a_name_for_a_socket_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary := tmp_path / ("long" * 25)).mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    code, out, err = done(begin(tmp_path, "add", "2"))
    assert code == 0 and "[3.0, 3.0]" in out, err
    assert (out + err).count("takes seconds: it cannot be started (AF_UNIX path too long)") == 1, out + err


def test_a_server_whose_launcher_has_died_ends_before_it_imports() -> None:
    (ended := subprocess.Popen(["true"])).wait()
    launcher = json.dumps([ended.pid, soul_exp.__file__, sys.path])
    import_it = [sys.executable, "-c", "import soul_exp.preload; print('went on')"]
    done = subprocess.run(import_it, env={**os.environ, server.LAUNCHER: launcher}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_no_server_is_started_where_it_would_end_early_or_belongs_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_servers", [])
    for pid, reason in ((None, "the thread that starts it"), (1, "another fork server")):
        monkeypatch.setattr(compat, "fork_server_pid", lambda pid=pid: pid)
        monkeypatch.setattr(server, "_faults", faults := [])
        (thread := threading.Thread(target=server.start)).start()
        thread.join()
        assert len(faults) == 1 and reason in faults[0]
        assert server.method_for({}, threads=2) == "spawn"


def test_a_start_method_is_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server.METHOD, "bogus")
    with pytest.raises(UsageError, match="START_METHOD=bogus is unknown: choose one of"):
        server.start()
    monkeypatch.setenv(server.METHOD, "fork")
    assert server.method_for({}, threads=1) == "fork"
    with pytest.raises(UsageError, match=r"needs compute\.threads=1"):
        server.method_for({}, threads=2)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_no_result(closed: str, tmp_path: Path) -> None:
    command = f"{sys.executable} {TESTS / 'toy.py'} add 2 {closed}"
    ran = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(TESTS.parent)}, timeout=300
    )
    assert ran.returncode == 0 and not list(tmp_path.rglob("error.txt"))


def test_the_commit_in_results_is_that_which_the_server_loaded(run: Callable[..., Any]) -> None:
    assert run(seen)["commit"] == run(cached_commit)


def cached_commit(rank: int) -> str | None:
    before = results.commit.cache_info().misses
    commit = results.commit()
    assert results.commit.cache_info().misses == before == 1
    return commit
