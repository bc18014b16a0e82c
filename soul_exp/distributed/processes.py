"""Worker processes started through torch elastic, one call for each stage; a worker's error is raised here."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from soul_exp.distributed import interrupts
from soul_exp.distributed.environment import launch_variables
from soul_exp.distributed.output import QUIET, log_file, rank_log, silence_libraries, silent_elastic
from soul_exp.errors import UsageError, WorkerError

log = logging.getLogger(__name__)

USAGE = "UsageError: "

SIGNAL_SECONDS = 3  # between a worker's death by a signal and the same signal here
LATE_SECONDS = 10.0  # elastic notices a death within one, and ends the other workers
CULPRIT_SECONDS = 1.5  # a failing rank waits so long: if another's death is the cause, that is noticed first


def launch(
    function: Callable[..., Any], *args: Any, processes: int, threads: int, logs: Path, alone: bool = False
) -> list[Any]:
    """`function(rank, *args)` in `processes` fresh processes; their return values by rank.

    `function` is importable by name and `args` are plain data. Processes that work `alone` do not know of each other:
    no library in them forms a process group. Rank 0 prints to the console; every rank has a file in `logs`.
    Raises UsageError if a worker raised one, else WorkerError with the traceback of the worker that failed first.
    """
    interrupts.safe_point()
    logs.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,  # elastic's files, through which errors come back
        _environment(OMP_NUM_THREADS=str(threads), **QUIET, **dict.fromkeys(launch_variables())),
        silent_elastic(),
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method=os.environ.get("SOUL_EXP_START_METHOD", "spawn"),  # fork: CPU only, and before any thread
            monitor_interval=0.1,
            signals_to_handle="",  # its handler would raise; the command line handles them, or under SLURM submitit
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.NONE, tee=Std.NONE),
        )
        try:
            with waiting_for_slurm(), _noticing_lost_workers(), interrupts.blocked_for_workers():
                level = logging.getLogger().getEffectiveLevel()
                returned = elastic_launch(config, _worker)(function, os.getpid(), level, alone, str(logs), args)
        except _WorkerLost as error:
            raise WorkerError(f"{error}; the logs of all: {logs}") from None
        except ChildFailedError as error:  # cannot be unpickled, so it must not leave this process
            rank, failure = error.get_first_failure()
            message: Any = failure.message
            if isinstance(message, Mapping):
                message = message.get("extraInfo", {}).get("py_callstack") or message.get("message")
            how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            raise worker_error(str(message).strip(), rank, processes, logs, how) from None
        finally:
            for child in multiprocessing.active_children():  # of an interrupt while they were being started
                child.kill()
            interrupts.safe_point()  # in place of the error of a worker that was killed for it
    return [returned[rank] for rank in range(processes)]


def worker_error(
    text: str, rank: int, processes: int, logs: Path, how: str = "exit code 1"
) -> UsageError | WorkerError:
    """The error of a worker whose traceback is `text`: of a UsageError the message alone."""
    if text and USAGE in text.splitlines()[-1]:
        return UsageError(text.splitlines()[-1].split(USAGE, 1)[1])
    return WorkerError(f"worker {rank} of {processes} failed ({how}); its log: {log_file(logs, rank)}\n{text}")


@record
def _worker(
    function: Callable[..., Any], parent: int, level: int, alone: bool, logs: str, args: tuple[Any, ...]
) -> Any:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process of a terminal: the launcher prints
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    rank, together = int(os.environ["RANK"]), not alone and int(os.environ["WORLD_SIZE"]) > 1
    if alone:
        for name in launch_variables():
            if not name.startswith("TORCHELASTIC_"):  # errors come back through them
                del os.environ[name]
    if rank == 0:
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
    with rank_log(Path(logs), rank, level):
        silence_libraries()
        try:
            return function(rank, *args)
        except Exception:
            if together:
                time.sleep(CULPRIT_SECONDS)
            raise


def die_with_parent(parent: int) -> None:
    """Let Linux kill this worker when its parent dies, so that killing the launcher leaves no orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before this call
            os._exit(1)


@contextlib.contextmanager
def waiting_for_slurm() -> Iterator[None]:
    """In the block, in a SLURM job, an error caused by SLURM's own signal is not raised: it would be the job's result.

    SLURM signals the workers too, and their death may be noticed before the signal. submitit's handlers run first: for
    USR2 (time is up) it requeues the job and exits, for TERM (preempted, requeued, cancelled) it logs that, and this
    process waits for KILL. A requeued job resumes from its checkpoint.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        yield
        return
    interrupted: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        handler = handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)  # exits, or raises what is a result: no time-out is left
        interrupted.append(number)

    for number in handlers:
        signal.signal(number, handle)
    try:
        yield
    except Exception:
        time.sleep(SIGNAL_SECONDS)
        while interrupted:
            time.sleep(1)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _WorkerLost(Exception):
    """A worker has died, and torch elastic would wait for it without end."""


@contextlib.contextmanager
def _noticing_lost_workers() -> Iterator[None]:
    """Raises _WorkerLost where a worker is killed after it handed over its result, before elastic has confirmed it.

    Elastic then sets an event, which waits until all its waiters have woken up, and one of them is dead.
    """
    main = threading.current_thread()
    if main is not threading.main_thread():
        yield
        return
    over, messages = threading.Event(), list[str]()

    def watch() -> None:
        workers: set[Any] = set()
        dead: dict[Any, float] = {}
        while not over.wait(0.5):
            workers |= set(multiprocessing.active_children())
            for worker in workers:
                if worker.exitcode:  # not None and not 0
                    dead.setdefault(worker, time.monotonic())
            late = [worker for worker, since in dead.items() if time.monotonic() - since > LATE_SECONDS]
            if late:
                messages.append(f"worker process {late[0].pid} ended by signal {-late[0].exitcode} as it was finishing")
                signal.pthread_kill(main.ident or 0, signal.SIGALRM)
                return

    def leave(number: int, frame: FrameType | None) -> None:
        raise _WorkerLost(messages[0])

    before, watcher = signal.signal(signal.SIGALRM, leave), threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _environment(**variables: str | None) -> Iterator[None]:
    """In the block, the environment has these variables; those that are None are unset."""
    before = {name: os.environ.pop(name, None) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if value is not None})
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})
