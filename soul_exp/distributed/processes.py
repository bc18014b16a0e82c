"""Start worker processes through torch elastic, one call a stage; their errors come back as the child's own."""

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
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from soul_exp.distributed import interrupts
from soul_exp.distributed.environment import outer_variables
from soul_exp.errors import UsageError, WorkerError

log = logging.getLogger(__name__)

USAGE = "UsageError: "


SIGNAL_SECONDS = 3  # between a worker's death by a signal and the same signal here
LATE_SECONDS = 10.0  # elastic notices a death within one, and ends the other workers
CULPRIT_SECONDS = 1.5  # a failing rank stays so long: if another's death is the cause, that one is seen first

QUIET = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
QUIET |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # our stages have their own


def launch(
    function: Callable[..., Any], *args: Any, processes: int, threads: int, logs: Path, alone: bool = False
) -> list[Any]:
    """`function(rank, *args)` in `processes` fresh processes; their return values by rank.

    `function` is importable by name and `args` are plain data. Processes that work `alone` do not see each other: no
    library in them takes them for a process group. Rank 0 speaks on the console; every rank has its file in
    `logs`. Raises UsageError if a worker raised one, else WorkerError with the first failing worker's traceback.
    """
    interrupts.safe_point()
    logs.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,  # elastic's files, through which errors come back
        _environment(OMP_NUM_THREADS=str(threads), **QUIET, **dict.fromkeys(outer_variables())),
        _silent_elastic(),
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
            signals_to_handle="",  # its handler would raise; they are the command line's, or under SLURM submitit's
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.NONE, tee=Std.NONE),
        )
        try:
            with uninterrupted(), _ended_with_its_workers(), interrupts.blocked_for_workers():
                returned = elastic_launch(config, _worker)(function, os.getpid(), _log_level(), alone, str(logs), args)
        except _Left as error:
            raise WorkerError(f"{error}; the logs of all: {logs}") from None
        except ChildFailedError as error:  # cannot be unpickled, so it must not leave this process
            rank, failure = error.get_first_failure()
            message: Any = failure.message
            if isinstance(message, Mapping):
                message = message.get("extraInfo", {}).get("py_callstack") or message.get("message")
            how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            raise told(str(message).strip(), rank, processes, logs, how) from None
        finally:
            for child in multiprocessing.active_children():  # of an interrupt while they were being started
                child.kill()
            interrupts.safe_point()  # in place of the error of a worker that was killed for it
    return [returned[rank] for rank in range(processes)]


def told(text: str, rank: int, processes: int, logs: Path, how: str = "exit code 1") -> UsageError | WorkerError:
    """The error of a worker that left this traceback: its sentence alone, where it raised UsageError."""
    if text and USAGE in text.splitlines()[-1]:
        return UsageError(text.splitlines()[-1].split(USAGE, 1)[1])
    return WorkerError(f"worker {rank} of {processes} failed ({how}); its log: {log_file(logs, rank)}\n{text}")


@record
def _worker(
    function: Callable[..., Any], parent: int, level: int, alone: bool, logs: str, args: tuple[Any, ...]
) -> Any:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process of a terminal: the launcher speaks
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    rank, together = int(os.environ["RANK"]), not alone and int(os.environ["WORLD_SIZE"]) > 1
    if alone:
        for name in outer_variables():
            if not name.startswith("TORCHELASTIC_"):  # the way back for errors
                del os.environ[name]
    if rank == 0:
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
    with rank_log(Path(logs), rank, level):
        quieten()
        try:
            return function(rank, *args)
        except Exception:
            if together:
                time.sleep(CULPRIT_SECONDS)
            raise


def log_file(logs: Path, rank: int) -> Path:
    return logs / f"rank{rank}.log"


@contextlib.contextmanager
def rank_log(logs: Path, rank: int, level: int) -> Iterator[None]:
    """What this rank logs goes to its file in `logs` too; of ranks above 0 all that they print goes there only.

    An error's traceback is there before anything else is done about it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    with log_file(logs, rank).open("a", buffering=1) as file, contextlib.ExitStack() as stack:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        root.addHandler(handler)
        stack.callback(root.removeHandler, handler)
        stack.callback(root.setLevel, root.level)
        root.setLevel(level)
        if rank > 0:
            stack.enter_context(_printing_to(file.fileno()))
        try:
            yield
        except BaseException:
            file.write(traceback.format_exc())
            raise


@contextlib.contextmanager
def _printing_to(target: int) -> Iterator[None]:
    """Standard output and error, those of C++ included, go to the file descriptor `target`."""
    streams = ((sys.stdout, 1), (sys.stderr, 2))
    kept = [os.dup(number) for _, number in streams]
    for stream, number in streams:
        stream.flush()
        os.dup2(target, number)
    try:
        yield
    finally:
        for (stream, number), before in zip(streams, kept, strict=True):
            stream.flush()
            os.dup2(before, number)
            os.close(before)


def die_with(parent: int) -> None:
    """Ask Linux to kill this worker when its parent dies, so that killing the launcher leaves no orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """In a SLURM job, an error that SLURM's own signal caused never gets out: it would become the job's result.

    SLURM signals the workers too, and their death may be seen before the signal. submitit's handlers run first: of
    USR2 (time is up) it requeues the job and exits, of TERM (preempted, requeued, cancelled) it says so, and we wait
    for the KILL. A requeued job resumes from its checkpoint.
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


def quieten() -> None:
    """Only our own lines and real warnings: one line a stage is the promise."""
    warnings.simplefilter("ignore")
    logging.getLogger().addFilter(_is_named)
    if "transformers" in sys.modules:  # what works on models has imported it by now
        from transformers.utils import logging as chatter

        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
    for name in ("absl", "torch.distributed", "deepspeed", "DeepSpeed", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # that DeepSpeed's accumulation is the one that counts


def _is_named(record: logging.LogRecord) -> bool:
    """Not of the root logger itself, where distutils tells DeepSpeed's trial compilations."""
    return record.levelno >= logging.WARNING


def _log_level() -> int:
    return logging.getLogger().getEffectiveLevel()


@contextlib.contextmanager
def _silent_elastic() -> Iterator[None]:
    """torch elastic does not log: all that it would say of a worker's end comes back as our error."""
    elastic = "torch.distributed.elastic"
    names = [name for name in logging.root.manager.loggerDict if name == elastic or name.startswith(f"{elastic}.")]
    loggers = [
        logging.getLogger(name) for name in (*names, "torch.distributed.launcher.api", "torch.multiprocessing.spawn")
    ]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


class _Left(Exception):
    """A worker has died and torch elastic still waits."""


@contextlib.contextmanager
def _ended_with_its_workers() -> Iterator[None]:
    """Raises _Left where a worker was killed after handing its result over and before elastic said that it has it.

    Elastic then sets an event that waits for its sleepers to wake, and one of them is dead: it would wait for ever.
    """
    main = threading.current_thread()
    if main is not threading.main_thread():
        yield
        return
    over, victims = threading.Event(), list[str]()

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
                victims.append(f"worker process {late[0].pid} ended by signal {-late[0].exitcode} as it was finishing")
                signal.pthread_kill(main.ident or 0, signal.SIGALRM)
                return

    def leave(number: int, frame: FrameType | None) -> None:
        raise _Left(victims[0])

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
    """The environment with these variables; without those that are None."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
