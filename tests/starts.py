"""Starts of the program that are cheap enough for hundreds of them.

Every start is forked from the program's own fork server, which has imported everything, and forks its workers. Inside,
all is real: the command line or `sequence.run`, and `launch`.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from soul_exp import cli, sequence
from soul_exp.distributed import server

CONTEXT = multiprocessing.get_context("forkserver")
SECONDS = 120  # after which a start is taken to hang
TINY = (  # the options of a run that takes two seconds
    "task.num_authors=6", "task.num_forget_authors=2", "task.num_holdout_authors=1", "task.train_varied=false",
    "evaluate.max_new_tokens=1",
    "model.scratch.vocab_size=300", "model.scratch.config.hidden_size=32", "model.scratch.config.intermediate_size=32",
    "prepare.epochs=0.5", "train.max_steps=2", "utility_suite=none", "wandb.mode=disabled",
)  # fmt: skip


class Forked:
    """One start, the leader of a session; what it prints goes to the files `printed` and `errors`, which may be one."""

    def __init__(self, body: Callable[..., int], arguments: tuple[Any, ...], printed: Path, errors: Path) -> None:
        self.printed, self.began = printed, time.monotonic()
        server.start()
        self.process = CONTEXT.Process(target=_begin, args=(body, arguments, dict(os.environ), printed, errors))
        self.process.start()
        assert self.process.pid
        self.pid: int = self.process.pid

    def is_over(self) -> bool:
        return not self.process.is_alive()

    def end(self, seconds: float = SECONDS) -> int:
        """The exit code, once it has ended and all that it had started is gone."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            for pid in members(self.pid):
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"a start hung: {self.text()[-3000:]}")
        deadline = time.monotonic() + 5
        while members(self.pid) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not members(self.pid), f"orphans {members(self.pid)} of {self.printed}"
        return code

    def text(self) -> str:
        return self.printed.read_text() if self.printed.exists() else ""


class Start(Forked):
    """A run of `config` in the folder `out`."""

    def __init__(self, config: dict[str, Any], out: Path) -> None:
        self.out, printed = out, out.with_name(f"{out.name}.printed")
        super().__init__(_run, (config, out), printed, printed)


class Command(Forked):
    """`python -m soul_exp` with these arguments, typed in `place`; all that it prints goes to the file `printed`."""

    def __init__(self, place: Path, printed: Path, *arguments: str) -> None:
        super().__init__(_command, (place, arguments), printed, printed)


def type_(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m soul_exp` with these arguments, typed in `place`: what it printed and returned."""
    with tempfile.TemporaryDirectory() as folder:
        printed, errors = Path(folder) / "out", Path(folder) / "err"
        code = Forked(_command, (place, arguments), printed, errors).end(300)
        return subprocess.CompletedProcess(arguments, code, printed.read_text(), errors.read_text())


def _begin(
    body: Callable[..., int], arguments: tuple[Any, ...], environment: dict[str, str], printed: Path, errors: Path
) -> None:
    """What a forked start does; it never returns to the server's code."""
    assert os.getppid() == server.preloaded().PID  # else every start imports everything
    os.setsid()
    os.environ |= {**environment, server.METHOD: "fork", "OMP_NUM_THREADS": "1"}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    tqdm.monitor_interval = 0  # no thread, which a fork would leave behind
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((1, printed), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    code = 1
    try:
        code = body(*arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(config: dict[str, Any], out: Path) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        sequence.run(config, out)
    except Exception as error:
        print("".join(traceback.format_exception(error)) if not isinstance(error, ValueError) else f"failed: {error}")
        return 1
    return 0


def _command(place: Path, arguments: tuple[str, ...]) -> int:
    os.chdir(place)
    os.environ["SOUL_EXP_CACHE"] = str(place / "cache")
    sys.argv = ["soul_exp", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def members(session: int) -> list[int]:
    """The processes of a session that are not dead yet: a start is its leader, its workers the others."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may end while we look
            state, _, _, owner = path.read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found
