"""The jobs of a command: how far a sweep is, how each job ended and what is shown of it, and how the sweep ended."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from soul_exp.distributed.output import RunLog, note, shown_notes
from soul_exp.errors import counted
from soul_exp.files import locked, remove_empty, write_atomically
from soul_exp.results import ERROR, NAME

if TYPE_CHECKING:
    from soul_exp.results import Results

log = logging.getLogger("soul_exp")

ENDS = ("finished", "diverged", "prepared", "checked", "finished before", "the same as another", "failed")


@dataclass
class Twin:
    """A job whose configuration another one may have too."""

    name: str
    utility: float | None = None


@dataclass
class Sweep:
    """The sweep of this command: its jobs, and how those that ended did so."""

    total: int | None
    folder: Path  # of the runs
    is_local: bool  # whether its jobs run in this process, one after the other
    began: float = field(default_factory=time.monotonic)
    ended: Counter[str] = field(default_factory=Counter)  # how -> number of jobs
    seconds: list[float] = field(default_factory=list)  # of each job that worked to its end, without its stage prepare
    known: dict[str, Twin] = field(default_factory=dict)  # hash of a configuration -> its job, the latest one last
    refused: dict[Path, str] = field(default_factory=dict)  # folder of a job -> why its checks failed

    def job(self, number: int) -> str:
        """The name of job `number`, from 0."""
        return f"job {number + 1}" + (f" of {self.total}" if self.total else "")

    def twin(self, config: dict[str, Any], name: str) -> Twin | None:
        """The job that had the configuration of the job `name`, typed in another way, as lr=0.001 and lr=1e-3."""
        from soul_exp.data import content_hash

        identity = content_hash({**config, "metrics": {}})
        if twin := self.known.get(identity):
            self.ended["the same as another"] += 1
            log.info("the configuration of %s, which is this job's result too", twin.name)
            return twin
        self.known[identity] = Twin(name)
        return None

    def end_job(self, out: Path, results: Results | None, spent: float | None) -> None:
        """Count the job in `out`, which ended after `spent` seconds of work (None: it did none), and log that."""
        from soul_exp.report.console import headline

        if results:
            [*self.known.values()][-1].utility = results.utility
            how, what = ("finished before" if spent is None else results.status), headline(results)
        else:
            how, what = ("checked" if spent is None else "prepared"), str(near(out))
        self.ended[how] += 1
        if spent is not None:
            self.seconds.append(spent - (results.seconds.get("prepare", 0) if results else 0))
            self._log(f"{'finished' if results else how} in {duration(spent)}: {what}")

    def end_failed_job(self, out: Path, spent: float | None) -> None:
        """Count the failed job in `out`, and log after how much work it failed (None: in its checks)."""
        self.ended["failed"] += 1
        self._log(f"failed {'in its checks' if spent is None else f'after {duration(spent)}'}: {out.name}")

    def coming(self) -> str:
        """How long the jobs to come will take: each the mean of those that worked."""
        left = self.total - self.ended.total() if self.total else 0
        return f"; about {duration(left * fmean(self.seconds))} for {left} more" if left and self.seconds else ""

    def _log(self, end: str) -> None:
        log.info("%s %s%s", self.job(HydraConfig.get().job.num), end, self.coming())

    def summary(self, num_failed: int) -> str:
        """How the sweep ended, `num_failed` of its jobs with an error, and what to type for its table.

        Writes why jobs were refused to their folders, for the table, if there is one.
        """
        counts = self.ended if self.is_local else {"failed": num_failed}
        ends = ", ".join(f"{counts[how]} {how}" for how in sorted(counts, key=ENDS.index) if counts[how])
        spent = duration(time.monotonic() - self.began)
        lines = [f"{counted(self.total or self.ended.total(), 'job')} in {spent}{': ' if ends else ''}{ends}"]
        if any(self.folder.glob("*/results.json")):
            lines.append(f"table: python -m soul_exp.tables {shlex.quote(str(self.folder))}")
            for out, text in self.refused.items():
                _record_refusal(out, text)
        return "\n".join(lines)


_current: list[Sweep] = []
_made: list[Path] = []  # the folders that were not there before this command, the innermost first
FAILED: list[str] = []  # the failures of this command, wherever its jobs ran: the reason, after the name of a job


def current() -> Sweep | None:
    """The sweep of this process's command; None if it is no sweep, or a job of one that runs elsewhere."""
    return _current[0] if _current else None


def is_swept() -> bool:
    """Whether the run at work is a job of a sweep, of this process's command or another's."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def begin_command(made: Iterable[Path] = (), sweep: Sweep | None = None) -> None:
    """A command begins, which will have `made` these folders, the innermost first; a `sweep` or one run."""
    _made[:], _current[:] = made, [] if sweep is None else [sweep]
    shown_notes.clear()
    FAILED.clear()


class JobError(RuntimeError):
    """A failed job: name and reason. Unpickling it, as from SLURM, adds it to FAILED: Hydra raises only the first."""

    def __reduce__(self) -> tuple[Callable[[str], JobError], tuple[Any, ...]]:
        return failed, self.args


def failed(message: str) -> JobError:
    if message not in FAILED:
        FAILED.append(message)
    return JobError(message)


def record_failure(out: Path, text: str, has_begun: bool) -> str:
    """The message about the failed run in `out`; writes `text`, the reason, to its folder if its work `has_begun`."""
    if has_begun:
        with contextlib.suppress(OSError):  # a full disk may be what failed
            write_atomically(out / ERROR, text)
    elif sweep := current():
        sweep.refused[out] = text
    elif is_swept():
        _record_refusal(out, text)
    return f"failed: {out.name}: {text.strip()}" if is_swept() else text.strip()


def _record_refusal(out: Path, text: str) -> None:
    """Write why the checks of a job failed to its folder, unless that run has finished or another process runs it."""
    with contextlib.suppress(OSError):  # the lock's Timeout is one too
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / ".lock", timeout=0):
            if not (out / NAME).exists():
                write_atomically(out / ERROR, text)


def remove_unused(out: Path) -> None:
    """Remove the folder of a run, and those that this command has made above it, if there is nothing in them."""
    hydra_wrote = out.parent / "multirun.yaml"
    remove_empty([out])
    if _made and [*out.parent.glob("*")] == [hydra_wrote]:
        hydra_wrote.unlink()
    remove_empty(path for path in _made if path.exists())


def shown(results: Results, out: Path, run_log: RunLog) -> list[str]:
    """What a console shows of the finished run in `out`; of a job of a sweep it shows one line, and new notes here."""
    from soul_exp.report.console import comparison
    from soul_exp.report.labels import printable
    from soul_exp.results import REQUEST

    if current() and run_log.has_begun:
        for text in results.notes:
            note(text)
    lines = [comparison(results, run_log.notes), f"results: {near(out) / 'results.json'}"]
    if (out / f"{REQUEST}1").is_dir():
        lines.append(f"all requests: python -m soul_exp.tables {near(out)}")
    return [*map(printable, lines)]


def near(path: Path) -> Path:
    """`path` from the working directory, if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def duration(seconds: float) -> str:
    """Two digits of it: 35 s, 4.2 min, 12 h."""
    size, unit = (
        (seconds, "s") if seconds < 99.5 else (seconds / 60, "min") if seconds < 5970 else (seconds / 3600, "h")
    )
    return f"{size:.1f} {unit}" if size < 9.95 and unit != "s" else f"{size:.0f} {unit}"
