"""Start worker processes through torch elastic, one call a stage; their errors come back as the child's own."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from soul_exp.errors import UsageError

log = logging.getLogger(__name__)
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it tells of a failure, we tell too

USAGE = "UsageError: "


class WorkerError(RuntimeError):
    """A worker failed; the message holds its rank and its own traceback."""


SIGNAL_SECONDS = 3  # between a worker's death by a signal and the same signal here

GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(
    function: Callable[..., Any], *args: Any, processes: int, threads: int, logs: Path, alone: bool = False
) -> list[Any]:
    """`function(rank, *args)` in `processes` fresh processes; their return values by rank.

    `function` is importable by name and `args` are plain data. Processes that work `alone` do not see each other: no
    library in them takes them for a process group. Rank 0 speaks on the console; every other rank writes to
    `logs`. Raises UsageError if a worker raised one, else WorkerError with the first failing worker's traceback.
    """
    logs.mkdir(parents=True, exist_ok=True)
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
        signals_to_handle="SIGINT",  # under SLURM the others belong to submitit
        logs_specs=DefaultLogsSpecs(
            log_dir=str(logs), redirects={rank: Std.ALL for rank in range(1, processes)}, tee=Std.NONE
        ),
    )
    variables = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    variables["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # our stages have their own
    with _environment(**variables):
        try:
            with _uninterrupted():
                returned = elastic_launch(config, _worker)(function, os.getpid(), _log_level(), alone, args)
        except SignalException:  # an Exception by torch's choice, which would let a sweep go on to its next job
            raise KeyboardInterrupt from None
        except ChildFailedError as error:  # cannot be unpickled, so it must not leave this process
            rank, failure = error.get_first_failure()
            message: Any = failure.message
            if isinstance(message, Mapping):
                message = message.get("extraInfo", {}).get("py_callstack") or message.get("message")
            text = str(message).strip()
            if text.splitlines() and USAGE in text.splitlines()[-1]:
                raise UsageError(text.splitlines()[-1].split(USAGE, 1)[1]) from None
            how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            raise WorkerError(f"worker {rank} of {processes} failed ({how}); its logs: {logs}\n{text}") from None
    return [returned[rank] for rank in range(processes)]


@record
def _worker(function: Callable[..., Any], parent: int, level: int, alone: bool, args: tuple[Any, ...]) -> Any:
    _die_with(parent)
    rank = int(os.environ["RANK"])
    if alone:
        for name in GROUP:
            os.environ.pop(name, None)
    logging.basicConfig(level=level if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    _quieten()
    return function(rank, *args)


def _die_with(parent: int) -> None:
    """Ask Linux to kill this worker when its parent dies, so that killing the launcher leaves no orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
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


def _quieten() -> None:
    """Only our own lines and real warnings: one line a stage is the promise."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("absl", "torch.distributed", "accelerate", "deepspeed", "DeepSpeed", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _log_level() -> int:
    return logging.getLogger().getEffectiveLevel()


@contextlib.contextmanager
def _environment(**variables: str) -> Any:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
