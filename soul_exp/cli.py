"""The command line: Hydra composes, `sequence.run` runs; each job of a sweep in fresh processes; failures are named."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from soul_exp import help_page, overrides
from soul_exp.compose import check_optional, conf_dir, of_job
from soul_exp.distributed import interrupts, server
from soul_exp.distributed.environment import launch_environment
from soul_exp.distributed.output import RunLog, open_standard_streams
from soul_exp.errors import UsageError, WorkerError
from soul_exp.files import locked, write_atomically
from soul_exp.report.labels import printable
from soul_exp.sweep import current, duration

if TYPE_CHECKING:
    from soul_exp.distributed.join import WorkerGroup

log = logging.getLogger("soul_exp")

LOG = "soul_exp.log"  # in a run's folder: what the console showed of it
ERROR = "error.txt"  # in a failed run's folder: the reason
TYPED = ".hydra"  # in a run's folder: the configuration as Hydra composed it, and the overrides that were typed
MULTIRUN = ("-m", "--multirun")
# arguments of commands that start no worker, at least not on this machine
WITHOUT_WORKERS = (
    *help_page.FLAGS, "-c", "--cfg", "-i", "--info", "--hydra-help", "--version", "-sc", "--shell", "hydra/launcher=",
    "stages=[]",
)  # fmt: skip


def job(cfg: DictConfig, workers: WorkerGroup | None = None) -> float | None:
    """One run, by `workers` if there are any; returns what a sweeper maximises (utility), or None."""
    interrupts.safe_point()
    gc.disable()  # what modules consist of stays: to look at it again and again is a quarter of the time of importing
    from soul_exp import sequence
    from soul_exp.data import content_hash
    from soul_exp.report import console
    from soul_exp.results import REQUEST

    gc.freeze()
    gc.enable()
    interrupts.safe_point()
    hydra_config = HydraConfig.get()
    out = Path(hydra_config.runtime.output_dir)
    sweeps = hydra_config.mode == RunMode.MULTIRUN
    sweep = current()
    label = ""
    if sweeps:
        label = sweep.job(hydra_config.job.num) if sweep else f"job {hydra_config.job.num + 1}"
        log.info("--- %s: %s", label, out.name)
        if workers is not None and _COMMAND:
            raise UsageError(_no_sweep(workers))
    else:  # in a sweep it was done before the first job
        check_optional(hydra_config.runtime.choices)
    config = of_job(cfg, hydra_config, (workers.size, workers.launcher) if workers is not None else None)
    identity = content_hash({**config, "metrics": {}})
    if sweep and identity in sweep.known:  # typed in another way, such as lr=0.001 and lr=1e-3
        name, utility = sweep.known[identity]
        log.info("the configuration of %s, which is this job's result too", name)
        sweep.end_job("the same as another", None)
        return utility
    if sweep:
        sweep.known[identity] = (out.name, None)
    start = time.monotonic()
    results = sequence.run(config, out, workers, lambda sentence: _begin(cfg, out, None if sweeps else sentence))
    spent = time.monotonic() - start
    begun = _run_logs[0].has_begun
    how = ("finished" if begun else "finished before") if results else ("prepared" if begun else "checked")
    if results and (out / ERROR).is_file():  # of a try before
        (out / ERROR).unlink()
    near = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    lines = []
    if results:
        lines = [console.comparison(results), f"results: {near / 'results.json'}"]
        if (out / f"{REQUEST}1").is_dir():
            lines.append(f"all requests: python -m soul_exp.tables {near}")
    for line in map(printable, lines):
        _run_logs[0].write(line)
        if sweep is None:
            print(line, flush=True)
    utility = results.utility if results else None
    if sweep:
        sweep.known[identity] = (out.name, utility)
        left = sweep.end_job(results.status if results and begun else how, spent if begun else None)
        if begun:
            what = console.headline(results) if results else near
            log.info("%s %s in %s: %s%s", label, how, duration(spent), what, left)
    return utility


def _begin(cfg: DictConfig, out: Path, sentence: str | None) -> None:
    """Write down what the run in `out` was typed as, and remove the reason of a failure before: its checks are over.

    Hydra itself would do so before them, and so into the folder of a run that has finished or is at work. `sentence` is
    what the run will write to the disk; for a sweep's jobs it was printed before the first.
    """
    if (out / ERROR).is_dir():
        raise UsageError(f"{out / ERROR} is a folder, but a failed run writes its reason there: remove it")
    if sentence is not None:
        log.info(sentence)
    parts = {"config": cfg, "hydra": HydraConfig.instance().cfg, "overrides": HydraConfig.get().overrides.task}
    (out / TYPED).mkdir(exist_ok=True)
    for name, part in parts.items():
        write_atomically(out / TYPED / f"{name}.yaml", OmegaConf.to_yaml(part))
    (out / ERROR).unlink(missing_ok=True)
    _run_logs[0].begin(out / LOG)


_run_logs: list[RunLog] = []  # of the run at work: one

FAILED: list[str] = []  # the failed jobs of this command, wherever they ran: names and reasons


class JobError(RuntimeError):
    """A failed job: name and reason. Unpickling it, as from SLURM, adds it to FAILED: Hydra raises only the first."""

    def __reduce__(self) -> tuple[Callable[[str], JobError], tuple[Any, ...]]:
        return _failed, self.args


def _failed(message: str) -> JobError:
    if message not in FAILED:
        FAILED.append(message)
    return JobError(message)


def start(cfg: DictConfig) -> float | None:
    """Run `job`; a failure goes to error.txt and FAILED, and is raised as JobError outside the process of `main`."""
    out = Path(HydraConfig.get().runtime.output_dir)
    workers = _workers()
    if workers is None and not _COMMAND:
        server.start()  # in a SLURM job; at the command line `main` has decided it
    if workers is not None and workers.rank > 0:  # a SLURM job of several tasks; under torchrun `main` does this
        workers.wait_for_work()
        return None
    if workers is not None:
        workers.report_failure = lambda text: _print_failure(_record_failure(out, text))
    _run_logs[:] = [RunLog()]
    logging.getLogger().addHandler(_run_logs[0])
    began, failed = time.monotonic(), True
    try:
        utility = job(cfg, workers)
        failed = False
        return utility
    except Exception as error:
        interrupts.safe_point()  # the workers were killed for it
        text = str(error) if isinstance(error, UsageError | WorkerError) else "".join(traceback.format_exception(error))
        if isinstance(error, UsageError):  # one line, whatever the value was that it shows
            text = text.replace("\n", " ")
        failure = _failed(_record_failure(out, text))
        if sweep := current():
            spent = time.monotonic() - began
            left = sweep.end_job("failed", spent if _run_logs[0].has_begun else None)
            log.info("%s failed after %s: %s%s", sweep.job(HydraConfig.get().job.num), duration(spent), out.name, left)
        _run_logs[0].write(printable(f"soul_exp: failed: {failure}"))
        if _COMMAND:  # raised, it would make Hydra print a line of its own
            return None
        raise failure from None
    finally:
        logging.getLogger().removeHandler(_run_logs[0])
        _run_logs[0].close()
        if workers is not None and not _COMMAND:
            workers.release(int(failed))


def _record_failure(out: Path, text: str) -> str:
    """The message about the failed run in `out`; writes `text`, the reason, to its folder.

    Not to the folder of a run that has finished, or that another process runs, when a check stopped this command.
    """
    from soul_exp import results

    with contextlib.suppress(OSError):  # a full disk may be what failed; the lock's Timeout is one too
        if _run_logs[0].has_begun:
            write_atomically(out / ERROR, text)
        else:
            with locked(out / ".lock", timeout=0):
                if not (out / results.NAME).exists():
                    write_atomically(out / ERROR, text)
    return f"{out.name}: {text.strip()}"


_COMMAND: list[str] = []  # the arguments, in the process that runs `main`


def main() -> None:
    """`python -m soul_exp`: one run, or with -m a sweep. Exits 1 if a job failed and names it."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's own printer
    FAILED.clear()
    sys.argv.sort(key=lambda argument: argument in MULTIRUN)  # behind a flag Hydra's parser takes no more overrides
    sys.argv[1:] = map(overrides.with_home, sys.argv[1:])
    _COMMAND[:] = sys.argv
    open_standard_streams()
    interrupts.install()
    environment, workers = None, None
    code: Any = 1
    try:
        environment = launch_environment()
        if environment is None and not any(argument.startswith(WITHOUT_WORKERS) for argument in sys.argv[1:]):
            if any(argument.startswith("compute=zero") for argument in sys.argv[1:]):
                os.environ.setdefault(server.PRELOAD, ",".join([*server.MODULES, server.ZERO]))
            server.start()  # it imports while this process composes and checks
        if set(help_page.FLAGS) & set(sys.argv):
            print(help_page.page(sys.argv[1:]), flush=True)
            code = 0
        else:
            workers = _workers()
            code = workers.wait_for_work() if workers is not None and workers.rank > 0 else _command(workers)
        interrupts.safe_point()
    except KeyboardInterrupt:
        code = interrupts.exit_code()
        interrupts.write_last_line()
    except UsageError as error:  # of the help page or the environment, or the processes do not find each other
        print(f"soul_exp: {error}", file=sys.stderr)
    except SystemExit as stop:  # of Hydra's own flags, or a callback's refusal
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    finally:
        if environment is not None:  # all is printed; a signal of the launcher must not change the exit code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if workers is not None and workers.rank == 0:
            workers.release(int(bool(code)), wait=code not in (130, 143))
    interrupts.finish(int(code or 0))
    sys.exit(code)


def _command(workers: WorkerGroup | None) -> int:
    """Let Hydra execute the command; prints every failure and returns the exit code."""
    try:
        if workers is not None and sys.argv[-1] in MULTIRUN:
            raise UsageError(_no_sweep(workers))
        overrides.check(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(start)()
    except UsageError as error:
        print(f"soul_exp: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not FAILED and overrides.is_of_hydra(error):  # Hydra raises the errors of SLURM jobs too
            print(f"soul_exp: {overrides.message(error, sys.argv[1:])}", file=sys.stderr)
            return 1
        interrupts.safe_point()
        from submitit.core.utils import UncompletedJobError

        if isinstance(error, UncompletedJobError):  # not submitted, or killed before it could report anything
            lines = str(error).splitlines()  # what it is, the job's log, and in its last lines why
            FAILED.append("\n".join([f"SLURM: {lines[0]}", *lines[1:3], *lines[3:][-5:]]))
        if not FAILED:
            if isinstance(error, OSError):
                print(f"soul_exp: the run's folder cannot be written: {error}", file=sys.stderr)
                return 1
            raise
    for message in FAILED:
        _print_failure(message)
    if sweep := current():
        print(sweep.summary([message.partition(":")[0] for message in FAILED]), flush=True)
    return 1 if FAILED else 0


def _print_failure(message: str) -> None:
    print(printable(f"soul_exp: failed: {message}"), file=sys.stderr, flush=True)


def _workers() -> WorkerGroup | None:
    """All processes of this run, where a launcher has started several; else None."""
    if launch_environment() is None:
        return None
    from soul_exp.distributed import join

    return join.worker_group()


def _no_sweep(workers: WorkerGroup) -> str:
    return (
        f"-m is a sweep, and each of its jobs needs fresh processes, but {workers.launcher} has started these "
        f"{workers.size}: type it without {workers.launcher}, compute.processes={workers.size} starts them for each"
    )
