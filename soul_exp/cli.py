"""The command line: Hydra composes, `sequence.run` runs; each job of a sweep in fresh processes; failures are named."""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from soul_exp import help_page, overrides, sweep
from soul_exp.compose import check_optional, conf_dir, of_job
from soul_exp.distributed import interrupts, server
from soul_exp.distributed.environment import launch_environment
from soul_exp.distributed.output import RunLog, open_standard_streams
from soul_exp.errors import UsageError, WorkerError
from soul_exp.files import write_atomically
from soul_exp.report.labels import printable
from soul_exp.results import ERROR, LOG, TYPED

if TYPE_CHECKING:
    from soul_exp.distributed.join import WorkerGroup

log = logging.getLogger("soul_exp")

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

    gc.freeze()
    gc.enable()
    interrupts.safe_point()
    hydra_config = HydraConfig.get()
    out, ours = Path(hydra_config.runtime.output_dir), sweep.current()
    if sweep.is_swept():
        number = hydra_config.job.num
        log.info("--- %s: %s", ours.job(number) if ours else f"job {number + 1}", out.name)
        if workers is not None and _COMMAND:
            raise UsageError(_no_sweep(workers))
    else:  # in a sweep it was done before the first job
        check_optional(hydra_config.runtime.choices)
    config = of_job(cfg, hydra_config, (workers.size, workers.launcher) if workers is not None else None)
    if ours and (twin := ours.twin(config, out.name)):
        return twin.utility
    start, run_log = time.monotonic(), _run_logs[0]
    results = sequence.run(config, out, workers, functools.partial(_begin, cfg, out))
    spent = time.monotonic() - start if run_log.has_begun else None
    if results:
        (out / ERROR).unlink(missing_ok=True)  # of a try before
        for line in sweep.shown(results, out, run_log):
            run_log.write(line)
            if ours is None:
                print(line, flush=True)
    if ours:
        ours.end_job(out, results, spent)
    return results.utility if results else None


def _begin(cfg: DictConfig, out: Path, sentence: str) -> None:
    """Write down what the run in `out` was typed as, and remove the reason of a failure before: its checks are over.

    Hydra itself would do so before them, and so into the folder of a run that has finished or is at work. `sentence` is
    what the run will write to the disk; for a sweep's jobs it was printed before the first.
    """
    if not sweep.is_swept():
        log.info(sentence)
    parts = {"config": cfg, "hydra": HydraConfig.instance().cfg, "overrides": HydraConfig.get().overrides.task}
    (out / TYPED).mkdir(exist_ok=True)
    for name, part in parts.items():
        write_atomically(out / TYPED / f"{name}.yaml", OmegaConf.to_yaml(part))
    (out / ERROR).unlink(missing_ok=True)
    _run_logs[0].begin(out / LOG)


_run_logs: list[RunLog] = []  # of the run at work: one


def start(cfg: DictConfig) -> float | None:
    """Run `job`; a failure goes to error.txt and sweep.FAILED, and is raised as JobError outside the process of `main`.

    A run that its checks refuse leaves its folder as it was: there is no error.txt, and no folder that was not there.
    """
    out = Path(HydraConfig.get().runtime.output_dir)
    workers = _workers()
    if workers is None and not _COMMAND:
        server.start()  # in a SLURM job; at the command line `main` has decided it
    if workers is not None and workers.rank > 0:  # a SLURM job of several tasks; under torchrun `main` does this
        workers.wait_for_work()
        return None
    run_log = RunLog()
    if workers is not None:
        workers.report_failure = lambda text: _print_failure(sweep.record_failure(out, text, run_log.has_begun))
    _run_logs[:] = [run_log]
    logging.getLogger().addHandler(run_log)
    began, code = time.monotonic(), 1
    try:
        utility = job(cfg, workers)
        code = 0
        return utility
    except Exception as error:
        interrupts.safe_point()  # the workers were killed for it
        text = str(error) if isinstance(error, UsageError | WorkerError) else "".join(traceback.format_exception(error))
        if isinstance(error, UsageError):  # one line, whatever the value was that it shows
            text = text.replace("\n", " ")
        failure = sweep.failed(sweep.record_failure(out, text, run_log.has_begun))
        if ours := sweep.current():
            ours.end_failed_job(out, time.monotonic() - began if run_log.has_begun else None)
        run_log.write(printable(f"soul_exp: {failure}"))
        if _COMMAND:  # raised, it would make Hydra print a line of its own
            return None
        raise failure from None
    finally:
        logging.getLogger().removeHandler(run_log)
        run_log.close()
        sweep.remove_unused(out)
        if workers is not None and not _COMMAND:
            workers.release(code)


_COMMAND: list[str] = []  # the arguments, in the process that runs `main`


def main() -> None:
    """`python -m soul_exp`: one run, or with -m a sweep. Exits 1 if a job failed and names it."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's own printer
    sweep.begin_command()
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
        if not sweep.FAILED and overrides.is_of_hydra(error):  # Hydra raises the errors of SLURM jobs too
            print(f"soul_exp: {overrides.message(error, sys.argv[1:])}", file=sys.stderr)
            return 1
        interrupts.safe_point()
        from submitit.core.utils import UncompletedJobError

        if isinstance(error, UncompletedJobError):  # not submitted, or killed before it could report anything
            lines = str(error).splitlines()  # what it is, the job's log, and in its last lines why
            sweep.FAILED.append("\n".join([f"failed: SLURM: {lines[0]}", *lines[1:3], *lines[3:][-5:]]))
        if not sweep.FAILED:
            if isinstance(error, OSError):
                print(f"soul_exp: the run's folder cannot be written: {error}", file=sys.stderr)
                return 1
            raise
    for message in sweep.FAILED:
        _print_failure(message)
    if ours := sweep.current():
        print(ours.summary(len(sweep.FAILED)), flush=True)
    return 1 if sweep.FAILED else 0


def _print_failure(message: str) -> None:
    print(printable(f"soul_exp: {message}"), file=sys.stderr, flush=True)


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
