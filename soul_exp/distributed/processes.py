"""Worker processes, one call for each stage: started, heard and ended; a worker's error is raised here."""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection, reduction
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.multiprocessing import ProcessContext, ProcessExitedException, ProcessRaisedException, start_processes

from soul_exp import compat
from soul_exp.distributed import interrupts, output, server
from soul_exp.distributed.output import log_file, rank_log, silence_libraries
from soul_exp.errors import UnreachableError, UsageError, WorkerError

log = logging.getLogger(__name__)

USAGE = re.compile(r"soul_exp\.errors\.(Usage|Unreachable)Error: ")  # in the last line of a traceback
HOST = "127.0.0.1"
SIGNAL_SECONDS = 3  # between a worker's death by a signal and the same signal here
CULPRIT_SECONDS = 1.5  # a failing rank waits so long: if another's death is the cause, that is noticed first
_STARTING = threading.Lock()  # of a program's threads, one starts workers at a time, and so knows its own
SERVER_ENDED = 255  # the exit code that a worker of a fork server seems to have when the server was killed


class _Streams:
    """Standard output and error of the launcher, also for a worker that another process forks."""

    def __init__(self, *numbers: Any) -> None:
        self.numbers = numbers

    def __reduce__(self) -> tuple[Any, ...]:
        return _Streams, tuple(map(reduction.DupFd, self.numbers))

    def use(self) -> None:
        for target, number in enumerate(self.numbers, start=1):
            os.dup2(number if isinstance(number, int) else number.detach(), target)


@dataclass(frozen=True)
class _Work:
    """What the workers of one call do, and what they share with the launcher."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    processes: int
    alone: bool
    logs: Path
    run_log: Path | None
    level: int  # of the log of the console
    environment: Mapping[str, str]
    streams: _Streams
    port: int  # of the launcher's store
    launcher: int  # process id
    start_method: str


def launch(
    function: Callable[..., Any], *args: Any, processes: int, threads: int, logs: Path, alone: bool = False
) -> list[Any]:
    """`function(rank, *args)` in `processes` fresh processes; their return values by rank.

    `function` is importable by name, `args` are plain data, and so is what it returns, as JSON. Processes that work
    `alone` do not know of each other: no library in them forms a process group. Rank 0 prints to the console; every
    rank has a file in `logs`.
    Raises UsageError if a worker raised one, else WorkerError with the traceback of the worker that failed first.
    """
    interrupts.safe_point()
    logs.mkdir(parents=True, exist_ok=True)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # how a worker ended is in our error
    environment = server.environment_for_workers() | {"OMP_NUM_THREADS": str(threads)}
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    try:
        with waiting_for_slurm(), interrupts.blocked_for_workers():
            work = _Work(
                function, args, processes, alone, logs, output.run_log(), logging.getLogger().getEffectiveLevel(),
                environment, _Streams(1, 2), store.port, os.getpid(), server.method_for(environment, threads),
            )  # fmt: skip
            _run(work)
            return [_value(store, rank, work) for rank in range(processes)]
    finally:
        interrupts.safe_point()  # in place of the error of a worker that was killed for it


def _run(work: _Work) -> None:
    """Start the workers and wait for their end. Raises the error of the first that fails, and ends the others."""
    context = _started(work)
    try:
        while not context.join():
            pass
    except ProcessRaisedException as error:
        text = str(error).partition("following error:\n")[2]
        raise worker_error(text.strip(), error.error_index, work.processes, work.logs) from None
    except ProcessExitedException as error:
        how, text = f"exit code {error.exit_code}", ""
        if error.signal_name:
            how, text = f"signal {-error.exit_code}", f"{error.signal_name} ended process {error.error_pid}"
        elif work.start_method == "forkserver" and error.exit_code == SERVER_ENDED:
            how = "the fork server was killed, and its workers with it"
        raise worker_error(text, error.error_index, work.processes, work.logs, how) from None
    except EOFError:
        raise WorkerError(f"a worker was killed as it wrote its traceback; the logs: {work.logs}") from None
    finally:
        for process in context.processes:
            process.kill()
        for path in context.error_files:  # in which torch hands tracebacks over
            Path(path).unlink(missing_ok=True)


def _started(work: _Work) -> ProcessContext:
    """The workers; where an error or an interrupt stops it, those that had started are ended."""
    with _STARTING:
        others = multiprocessing.active_children()
        try:
            with server.environment_of(work.environment):  # spawned workers read it as they import
                return start_processes(_worker, (work,), work.processes, join=False, start_method=work.start_method)
        except BaseException as error:
            for child in set(multiprocessing.active_children()) - {*others}:
                child.kill()
            if isinstance(error, EOFError | ConnectionError):
                raise WorkerError("the fork server was killed as it started a worker") from None
            raise


def _value(store: dist.Store, rank: int, work: _Work) -> Any:
    """What the worker `rank` returned. Raises WorkerError where it ended without: Ctrl-C counts as success in torch."""
    if not store.check([f"value{rank}"]):
        raise worker_error("", rank, work.processes, work.logs, "exit code 0, but it did not return")
    return json.loads(store.get(f"value{rank}"))  # not unpickled: any user of this machine can reach the store


def worker_error(
    text: str, rank: int, processes: int, logs: Path, how: str = "exit code 1"
) -> UsageError | WorkerError:
    """The error of a worker whose traceback is `text`: of a UsageError the message alone."""
    if text and (found := USAGE.match(text.splitlines()[-1])):
        kind = UnreachableError if found[1] == "Unreachable" else UsageError
        return kind(text.splitlines()[-1][found.end() :])
    return WorkerError(f"worker {rank} of {processes} failed ({how}); its log: {log_file(logs, rank)}\n{text}".strip())


def _worker(rank: int, work: _Work) -> None:
    preloaded = server.preloaded() if work.start_method == "forkserver" else None
    interrupts.die_with_parent(preloaded.PID if preloaded else work.launcher)
    _die_with_launcher()
    multiprocessing.set_start_method("spawn", force=True)  # of what libraries start: no server of a worker's own
    if preloaded:
        os.environ.clear()
        os.environ.update(preloaded.ADDED | dict(work.environment))
    work.streams.use()
    output.guard_standard_streams()
    for number in interrupts.SIGNALS:  # Ctrl-C reaches every process of a terminal: the launcher prints
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    together = not work.alone and work.processes > 1
    if not work.alone:
        os.environ.update(group_variables(rank, rank, work.processes, HOST, work.port))
    if rank == 0:
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
    output.continue_run_log(work.run_log if rank == 0 else None)
    with rank_log(work.logs, rank, work.level):
        silence_libraries()
        try:
            value = work.function(rank, *work.args)
        except Exception:
            if together:
                time.sleep(CULPRIT_SECONDS)
            raise
        finally:
            compat.remove_empty_inductor_cache()
    store = dist.TCPStore(HOST, work.port, is_master=False, wait_for_workers=False)
    store.set(f"value{rank}", json.dumps(value))


def group_variables(rank: int, local_rank: int, processes: int, host: str, port: int) -> dict[str, str]:
    """The variables from which torch, accelerate and DeepSpeed learn of a group whose store another process serves."""
    variables = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": processes, "MASTER_ADDR": host}
    variables |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in variables.items()}


def _die_with_launcher() -> None:
    """Kill this worker when the launcher dies, of which the fork server, its parent, learns only after all workers."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def watch() -> None:
        connection.wait([launcher.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


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
