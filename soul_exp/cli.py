"""The command line: Hydra composes, `sequence.run` runs; a sweep's jobs each in fresh processes, failures named."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from soul_exp import interrupts
from soul_exp.errors import UsageError, WorkerError
from soul_exp.files import write_whole
from soul_exp.world import found

if TYPE_CHECKING:
    from soul_exp.join import Crew

log = logging.getLogger("soul_exp")

ERROR = "error.txt"  # in a failed run's folder: why
TYPED = ".hydra"  # in a run's folder: the configuration as Hydra composed it, and the overrides that were typed
TUNED = ("optimizer.", "loss.", "train.")  # the sections that an entry of tuned/ sets; of which these change no number:
NO_NUMBER = ("train.micro_batch_size", "train.logging_steps", "train.save_steps", "train.gradient_checkpointing")
SUITE_METRICS = "soul_exp.metrics.suite."  # a task that reports one of them wants a suite, unless told otherwise
MULTIRUN = ("-m", "--multirun")
PATHS = {  # options that may name files
    "task": ("source", "forget", "retain", "holdout", "requests", "rtp", "scorer"),
    "model": ("path", "tokenizer"),
    "retrained": ("path", "records"),
}
CHOICES = ("model", "task", "loss", "optimizer", "compute", "precision", "adapter")


def conf_dir() -> Path:
    """The folder of the configuration: inside an installed package, beside a checkout's."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "conf", here.parent / "conf") if (path / "config.yaml").is_file())


def run_folder(overrides: str) -> str:
    """The name of a run's folder: its overrides, in characters that paths and Hydra's command line leave alone."""
    name = re.sub(r"[^\w.+-]+", "_", overrides).strip("_") or "default"
    return name if len(name) <= 160 else f"{name[:140]}-{hashlib.sha256(overrides.encode()).hexdigest()[:10]}"


def register_resolvers() -> None:
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    OmegaConf.register_new_resolver("not", lambda value: not value, replace=True)
    OmegaConf.register_new_resolver("either", lambda condition, yes, no: yes if condition else no, replace=True)
    OmegaConf.register_new_resolver("equal", lambda a, b: a == b, replace=True)
    OmegaConf.register_new_resolver("taught_here", _taught_here, replace=True)
    OmegaConf.register_new_resolver("device", _device, replace=True)
    OmegaConf.register_new_resolver("choice", _choice, replace=True)
    OmegaConf.register_new_resolver("cpus", lambda processes, threads: processes * threads, replace=True)
    OmegaConf.register_new_resolver("gpus", lambda device, n: n if device == "cuda" else None, replace=True)


def plain(cfg: DictConfig, choices: dict[str, str]) -> dict[str, Any]:
    """The resolved configuration as plain data, with every local path made absolute."""
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    config["choices"] = {group: choices[group] for group in CHOICES}
    config["cache"] = _absolute(config["cache"])
    config["utility_suite"] = suite_of(config)
    if config["utility_data"]:
        config["utility_data"] = _absolute(str(config["utility_data"]))
    for section, keys in PATHS.items():
        for key in keys:
            value = config[section].get(key)
            if isinstance(value, list):
                config[section][key] = [_absolute(path) if _is_path(path) else path for path in value]
            elif _is_path(value):
                config[section][key] = _absolute(value)
    return config


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and (value.startswith((".", "/", "~")) or Path(value).exists())


def suite_of(config: Mapping[str, Any]) -> str:
    """The utility suite that `utility_suite` means in this configuration: its own name, or what auto stands for."""
    if config["utility_suite"] != "auto":
        return str(config["utility_suite"])
    metrics = config["task"]["metrics"]  # as typed, so anything; `check` refuses what is not a metric
    entries = metrics.values() if isinstance(metrics, Mapping) else ()
    if not any(str(entry.get("_target_")).startswith(SUITE_METRICS) for entry in entries if isinstance(entry, Mapping)):
        return "none"
    from soul_exp import recipes

    return "embedded" if not config["model"]["path"] or recipes.is_general(config) else "paper"


def check_optional(choices: Mapping[str, str | None]) -> None:
    """Raises UsageError if a preset, method or budget that was asked for is not there: Hydra passes over such ones."""
    for group in ("experiment", "method", "budget"):
        options = GlobalHydra.instance().config_loader().get_group_options(group)
        if choices.get(group) and choices[group] not in options:
            raise UsageError(f"{group}={choices[group]} is unknown: choose one of {', '.join(options)}")


def tuned_on(config: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    """On what this run's numbers were tuned; None where they are not those that were, or are not used as they were."""
    if any(key.startswith(TUNED) and key not in NO_NUMBER for key in map(_key, overrides)):  # typed by hand
        return None
    if config["tuned"] and config["adapter"]:
        log.info("untuned: the numbers of conf/tuned/ are for unlearning every weight, not for an adapter")
        return None
    return config["tuned"]


def job(cfg: DictConfig, crew: Crew | None = None) -> float | None:
    """One run, in the processes of `crew` if there is one; returns what a sweeper maximises (utility), or None."""
    interrupts.safe_point()
    _say_device_to_deepspeed()
    from soul_exp import display, sequence

    interrupts.safe_point()
    hydra_config = HydraConfig.get()
    out = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode == RunMode.MULTIRUN:
        log.info("--- job %s: %s", hydra_config.job.num, out.name)
    if hydra_config.mode == RunMode.RUN:  # else it was done before the first job
        check_optional(hydra_config.runtime.choices)
    config = plain(cfg, dict(hydra_config.runtime.choices))
    config["tuned"] = tuned_on(config, hydra_config.overrides.task)
    if crew is not None:
        _take_size(config, crew, hydra_config)
    begin = functools.partial(_begin, cfg, out)
    results = sequence.run(config, out, crew, part_of_sweep=hydra_config.mode == RunMode.MULTIRUN, begin=begin)
    if results is None:
        return None
    if (out / ERROR).is_file():  # of a try before
        (out / ERROR).unlink()
    print(display.comparison(results))
    near = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    print(f"results: {near / 'results.json'}")
    if config["task"].get("requests"):
        print(f"all requests: python -m soul_exp.tables {near}")
    sys.stdout.flush()
    return results.utility


def _take_size(config: dict[str, Any], crew: Crew, hydra_config: Any) -> None:
    """compute.processes is the crew's size. Raises UsageError if another was typed, or if this is a sweep's job."""
    if _COMMAND and hydra_config.mode == RunMode.MULTIRUN:
        raise UsageError(_no_sweep(crew))
    typed = "compute.processes" in map(_key, hydra_config.overrides.task)
    if typed and config["compute"]["processes"] != crew.size:
        raise UsageError(
            f"compute.processes={config['compute']['processes']}, but {crew.world.by} has started {crew.size}: "
            f"leave compute.processes out, or start as many"
        )
    config["compute"]["processes"] = crew.size


def _begin(cfg: DictConfig, out: Path) -> None:
    """Write down what the run in `out` was typed as, and remove the reason of a failure before: its checks are over.

    Hydra itself would do so before them, and so into the folder of a run that has finished or is at work.
    """
    if (out / ERROR).is_dir():
        raise UsageError(f"{out / ERROR} is a folder, but a failed run writes its reason there: remove it")
    parts = {"config": cfg, "hydra": HydraConfig.instance().cfg, "overrides": HydraConfig.get().overrides.task}
    (out / TYPED).mkdir(exist_ok=True)
    for name, part in parts.items():
        write_whole(out / TYPED / f"{name}.yaml", OmegaConf.to_yaml(part))
    (out / ERROR).unlink(missing_ok=True)
    _BEGUN.add(out)


_BEGUN: set[Path] = set()  # the folders of this command's runs whose checks are over

FAILED: list[str] = []  # of this command: the names of its failed jobs and why, wherever they ran


class JobError(RuntimeError):
    """A job failed: its name and why; unpickled, as from SLURM, it enters FAILED, since Hydra raises the first only."""

    def __reduce__(self) -> tuple[Callable[[str], JobError], tuple[Any, ...]]:
        return _failed, self.args


def _failed(message: str) -> JobError:
    if message not in FAILED:
        FAILED.append(message)
    return JobError(message)


def start(cfg: DictConfig) -> float | None:
    """`job`; a failure is left in error.txt and FAILED, and raised (as JobError) where `main` is another process's."""
    out = Path(HydraConfig.get().runtime.output_dir)
    crew = _crew()
    if crew is not None and crew.rank > 0:  # a SLURM job of several tasks; under torchrun `main` has seen to it
        crew.follow()
        return None
    if crew is not None:
        crew = replace(crew, tell=lambda text: _tell(_left(out, text)))
    _BEGUN.discard(out)
    failed = True
    try:
        utility = job(cfg, crew)
        failed = False
        return utility
    except Exception as error:
        interrupts.safe_point()  # the workers were killed for it
        text = str(error) if isinstance(error, UsageError | WorkerError) else "".join(traceback.format_exception(error))
        failure = _failed(_left(out, text))
        if _COMMAND:  # Hydra would print a line of its own before ours
            return None
        raise failure from None
    finally:
        if crew is not None and not _COMMAND:
            crew.dismiss(failed)


def _left(out: Path, text: str) -> str:
    """The message about the failed run in `out`; `text`, the reason, stays in its folder.

    The folder of a run that has finished, or that another process is at, is not that of a command which was refused.
    """
    from soul_exp import results

    with contextlib.suppress(OSError):  # a full disk may be what failed; the lock's Timeout is one too
        if out in _BEGUN:
            write_whole(out / ERROR, text)
        else:
            with FileLock(out / ".lock", timeout=0):
                if not (out / results.NAME).exists():
                    write_whole(out / ERROR, text)
    return f"{out.name}: {text.strip()}"


_COMMAND: list[str] = []  # the arguments, in the process whose `main` it is


def main() -> None:
    """`python -m soul_exp`: one run, or with -m a sweep. Exits 1 if a job failed and names it."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's own printer
    FAILED.clear()
    sys.argv[1:] = _flags_last(sys.argv[1:])
    _COMMAND[:] = sys.argv
    interrupts.install()
    world, crew = found(), None
    code: Any = 1
    try:
        crew = _crew()
        code = crew.follow() if crew is not None and crew.rank > 0 else _command(crew)
        interrupts.safe_point()
    except KeyboardInterrupt:
        code = interrupts.exit_code()
        interrupts.write_last_line()
    except UsageError as error:  # the processes do not find each other
        print(f"soul_exp: {error}", file=sys.stderr)
    except SystemExit as stop:  # of Hydra's own flags, or a callback's refusal
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    finally:
        if world is not None:  # the last word is said; whoever started us may now end us
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if crew is not None and crew.rank == 0:
            crew.dismiss(bool(code), interrupted=code in (130, 143))
    interrupts.finish(int(code or 0))
    sys.exit(code)


def _command(crew: Crew | None) -> int:
    """Let Hydra carry out the command; tells every failure and returns the exit code."""
    try:
        if crew is not None and sys.argv[-1] in MULTIRUN:
            raise UsageError(_no_sweep(crew))
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(start)()
    except (UsageError, HydraException, OmegaConfBaseException) as error:
        print(f"soul_exp: {_told(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        interrupts.safe_point()
        from submitit.core.utils import UncompletedJobError

        if isinstance(error, UncompletedJobError):  # not submitted, or killed before it could say anything
            lines = str(error).splitlines()  # what it is, the job's log, and in its last lines why
            FAILED.append("\n".join([f"SLURM: {lines[0]}", *lines[1:3], *lines[3:][-5:]]))
        if not FAILED:
            if isinstance(error, BrokenPipeError):  # `--help | head`: the reader has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
            if isinstance(error, OSError):
                print(f"soul_exp: the run's folder cannot be written: {error}", file=sys.stderr)
                return 1
            raise
    for message in FAILED:
        _tell(message)
    return 1 if FAILED else 0


def _tell(message: str) -> None:
    print(f"soul_exp: failed: {message}", file=sys.stderr, flush=True)


def _crew() -> Crew | None:
    """All processes of this run, where somebody else has started several."""
    if found() is None:
        return None
    _say_device_to_deepspeed()
    from soul_exp import join

    return join.crew()


def _no_sweep(crew: Crew) -> str:
    return (
        f"-m is a sweep, and each of its jobs needs fresh processes, but {crew.world.by} has started these "
        f"{crew.size}: type it without {crew.world.by}, compute.processes={crew.size} starts them for every job"
    )


def _flags_last(arguments: list[str]) -> list[str]:
    """The flags of Hydra behind the overrides: between them its parser takes no more overrides."""
    flags = [argument for argument in arguments if argument in MULTIRUN]
    return [argument for argument in arguments if argument not in flags] + flags


def _told(error: BaseException) -> str:
    """What Hydra and OmegaConf say of an error, its causes included: the options of a group stand in one of them."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).strip()
        text = "\n".join(line for line in text.splitlines() if not line.startswith("To append to your config"))
        if text and not any(text in line for line in lines):
            lines.append(text)
        cause = cause.__cause__
    return "\n".join(lines)


def _choice(group: str, *, _root_: DictConfig) -> str:
    """The option chosen in a group; Hydra's own ${hydra:} does not know it before a sweep's first job."""
    hydra_config = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    return str(hydra_config.runtime.choices[group])


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute().resolve())


def _taught_here(path: str | None, stages: Sequence[str]) -> bool:
    """Whether the models that are compared are made from scratch, with general questions in their training.

    Where `path` is only measured, it says nothing of the others, unless it is one of them.
    """
    from soul_exp import recipes

    return path is None or (list(stages) == ["evaluate"] and recipes.is_taught(path))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _say_device_to_deepspeed() -> None:
    """Before anything imports DeepSpeed: left to find out that there is no GPU, it warns, in every process."""
    if _device() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


register_resolvers()  # at import: in a SLURM job Hydra composes before it calls anything of ours
