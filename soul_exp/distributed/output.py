"""What worker processes print and log: rank 0 on the console, every rank in a file, libraries hardly anything."""

import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

log = logging.getLogger("soul_exp")

# environment of a process whose libraries show neither warnings nor progress bars: the stages have their own
QUIET = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
QUIET |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


class Console(io.TextIOWrapper):
    """Standard output or error; what cannot be written to it is lost, once with a line on standard error.

    The disk behind `> log` may be full, or the reader have gone, as `| head`: no reason to lose a run. Characters that
    its encoding lacks, as ASCII does under LC_ALL=C, are written as escapes.
    """

    lost = False  # whether something was lost, other than to a reader that has gone

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except UnicodeEncodeError:
            return super().write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """From now on it goes nowhere."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if isinstance(error, BrokenPipeError):
            return
        self.lost = True
        if self.fileno() == 1:
            found = f"standard output cannot be written ({error.strerror})"
            print(f"soul_exp: {found}: nothing more is shown", file=sys.stderr, flush=True)


def guard_standard_streams() -> None:
    """Let no error of standard output or error reach what is written there."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # and not what a test or a notebook has put there
            stream.flush()  # libraries may have kept it, so it stays as it is
            raw = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115 - as long as the process lives
            setattr(sys, name, Console(raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering))


def is_lost() -> bool:
    """Whether standard output could not be written, what is still to be written included."""
    sys.stdout.flush()
    return isinstance(sys.stdout, Console) and sys.stdout.lost


def open_standard_streams() -> None:
    """Open what whoever started this process has closed (`>&-`): a file opened next would get the number."""
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, number)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    guard_standard_streams()


shown_notes: set[str] = set()  # by this command, on the console


class RunLog(MemoryHandler):
    """What the console shows of one run, kept until its checks are over, and from then on written to a file."""

    path: Path | None = None  # the file, once the checks are over

    def __init__(self) -> None:
        super().__init__(capacity=1_000_000, flushLevel=logging.CRITICAL + 1)
        self.notes: set[str] = set()  # that are in the log

    @property
    def has_begun(self) -> bool:
        return self.path is not None

    def begin(self, path: Path) -> None:
        """Write to the end of the file `path` what was kept, and all that comes."""
        self.path, self.capacity = path, 1
        self.setTarget(QuietFile(path, encoding="utf-8", errors="backslashreplace"))
        self.flush()

    def write(self, text: str) -> None:
        """Add a `text` that the console shows by other means than a log, or does not show."""
        self.emit(logging.makeLogRecord({"msg": text, "levelno": logging.INFO}))


class QuietFile(logging.FileHandler):
    """A log file; on a full disk its lines are lost, and whoever writes results there reports that."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _run_logs() -> list[RunLog]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, RunLog)]


def run_log() -> Path | None:
    """The file to which this process writes what the console shows of its run; None if it writes none."""
    return next((each.path for each in _run_logs()), None)


def note(text: str) -> None:
    """Log what a reader of the numbers needs to know: once for a run, and on the console once for a command."""
    for each in _run_logs():
        if text in each.notes:
            return
        each.notes.add(text)
        if text in shown_notes:
            each.write(text)
            return
    shown_notes.add(text)
    log.info("%s", text)


def continue_run_log(path: Path | None) -> None:
    """Write what this worker logs to the file `path` too, where its launcher does; None: not there."""
    root = logging.getLogger()
    for handler in _run_logs():
        root.removeHandler(handler)  # of the launcher, where this process was forked from it
    if path is not None:
        log = RunLog()
        log.begin(path)
        root.addHandler(log)


def log_file(logs: Path, rank: int) -> Path:
    """The file of `rank` in the folder `logs`."""
    return logs / f"rank{rank}.log"


@contextlib.contextmanager
def rank_log(logs: Path, rank: int, level: int) -> Iterator[None]:
    """In the block, this rank logs to its file in `logs` too; ranks above 0 print to that file only.

    The traceback of an error is written there first.
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
    """In the block, standard output and error, also those of C++ code, go to the file descriptor `target`."""
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


def silence_libraries() -> None:
    """Log only lines of this program and real warnings: the console shows one line for each stage."""
    warnings.simplefilter("ignore")
    logging.raiseExceptions = False  # the reader of the console may have gone, as `head`; the rank's file has it all
    set_deepspeed_device()
    logging.getLogger().addFilter(_is_warning)
    if "transformers" in sys.modules:  # else nothing here works on models
        from transformers.utils import logging as library

        library.set_verbosity_error()
        library.disable_progress_bar()
    for name in ("absl", "torch.distributed", "deepspeed", "DeepSpeed", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns that DeepSpeed's accumulation replaces its own


def _is_warning(record: logging.LogRecord) -> bool:
    """Whether `record` is a warning: distutils logs DeepSpeed's trial compilations with the root logger itself."""
    return record.levelno >= logging.WARNING


def set_deepspeed_device() -> None:
    """Name the CPU as DeepSpeed's device where there is no GPU: imported without it, DeepSpeed prints a warning."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
