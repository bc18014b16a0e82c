"""Ctrl-C and SIGTERM are noted at once and raised at the next safe point; a process that reaches none ends by itself.

No signal handler raises: inside a destructor or a callback of C code, Python prints the exception and continues. A
thread reads the signals, so that they count while the main thread is inside C code. An end at any moment loses nothing:
files are written in one step, and a killed run resumes.
"""

import atexit
import contextlib
import ctypes
import math
import multiprocessing
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from soul_exp import compat
from soul_exp.distributed.environment import launch_environment

SIGNALS = (signal.SIGINT, signal.SIGTERM)
END_SECONDS = 1.5  # from the signal to the end of a process that reaches no safe point
POLL_SECONDS = 0.1
RESUMES = "soul_exp: interrupted; the same command resumes where this one stopped\n"

temporary_folders: list[str] = []  # that the fork server's libraries have made: it is killed, and removes none

_received: list[int] = []  # the signals, in order
_finished: list[int] = []  # the exit code, once nothing is left to do: a signal ends the process at once
_installed = threading.Event()
_last_line = threading.Lock()  # taken for ever by the thread that writes it


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM has arrived; what catches KeyboardInterrupt catches it."""


def install() -> None:
    """From now on SIGINT and SIGTERM set the flag of `safe_point`, kill this process's workers and limit its time.

    SIGINT stays ignored where whoever started this process ignores it, as a shell does for its background jobs.
    """
    if _installed.is_set():
        return
    _installed.set()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # written to by C code, whatever the main thread is at
    for number in SIGNALS:
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _noted)
    os.register_at_fork(after_in_child=_uninstall)
    atexit.register(_leave)  # the last of them, where nothing registered before
    threading.Thread(target=_watch, args=(reading,), name="interrupts", daemon=True).start()


def safe_point() -> None:
    """Raises Interrupted if Ctrl-C or SIGTERM has arrived."""
    if _received:
        raise Interrupted(signal.Signals(_received[0]).name)


def exit_code() -> int:
    """The exit code of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (_received[0] if _received else signal.SIGINT)


def write_last_line() -> None:
    """Write to standard error how to resume: once, and by rank 0 only where a run has several processes."""
    environment = launch_environment()
    writes = (environment is None or environment.rank == 0) and _last_line.acquire(blocking=False)
    if writes and select.select([], [2], [], 0)[1]:  # a full pipe that nobody reads would hold us
        os.write(2, RESUMES.encode())


def finish(code: int) -> None:
    """Record that the work is done, with the exit code `code`: from now on a signal ends the process at once."""
    _finished.append(code)


@contextlib.contextmanager
def blocked_for_workers() -> Iterator[None]:
    """Processes started within it receive Ctrl-C only after they unblock it; this one receives it in its own thread.

    A terminal sends it to every process, and one that is still importing would print a traceback.
    """
    if not _installed.is_set():
        yield
        return
    from multiprocessing import resource_tracker  # which has something to do at exit, before `_leave`

    resource_tracker.ensure_running()  # it starts with the first worker, and would then unblock Ctrl-C here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent(parent: int) -> None:
    """Let Linux kill this process when the one that started it, `parent`, dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before this call
            os._exit(1)


def _noted(number: int, frame: FrameType | None) -> None:
    """Python's part of the handler: the signal's number is in the pipe by now."""


def _uninstall() -> None:
    """In a forked child, whose pipe is its parent's: signals have their default effect."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _noted:
            signal.signal(number, signal.SIG_DFL)
    _received.clear()
    _finished.clear()


def _leave() -> None:
    """Skip the rest of the interpreter's end, in which a signal has its default effect again."""
    if _finished:
        sys.stdout.flush()
        sys.stderr.flush()
        kill_fork_server()
        compat.remove_empty_inductor_cache()
        os._exit(_finished[0])


def _watch(reading: int) -> None:
    deadline = math.inf
    while len(_received) < 2 and not (_received and _finished) and time.monotonic() < deadline:
        if select.select([reading], [], [], POLL_SECONDS if _received else None)[0]:
            _received.extend(number for number in os.read(reading, 64) if number in SIGNALS)
        if _received:
            deadline = min(deadline, time.monotonic() + END_SECONDS)
            _kill_workers()
    _kill_workers()
    kill_fork_server()
    write_last_line()
    os._exit(exit_code())


def kill_fork_server() -> None:
    """Kill the fork server of this process, which may still import and would hold the streams open until it ends."""
    if pid := compat.fork_server_pid():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        compat.remove_fork_server_socket()
        for folder in temporary_folders:
            shutil.rmtree(folder, ignore_errors=True)


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        child.kill()
