"""The command line: Hydra composes, `experiment.run` runs; a sweep's jobs each in fresh processes, failures named."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from soul_exp.errors import UsageError

log = logging.getLogger("soul_exp")

ERROR = "error.txt"  # in a failed run's folder: why
TUNED = ("optimizer.", "loss.", "train.")  # the sections that an entry of tuned/ sets; of which these change no number:
NO_NUMBER = ("train.micro_batch_size", "train.logging_steps", "train.save_steps", "train.gradient_checkpointing")
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
    OmegaConf.register_new_resolver("equal", lambda a, b: a == b, replace=True)
    OmegaConf.register_new_resolver("device", _device, replace=True)
    OmegaConf.register_new_resolver("choice", _choice, replace=True)
    OmegaConf.register_new_resolver("cpus", lambda processes, threads: processes * threads, replace=True)
    OmegaConf.register_new_resolver("gpus", lambda device, n: n if device == "cuda" else None, replace=True)


def plain(cfg: DictConfig, choices: dict[str, str]) -> dict[str, Any]:
    """The resolved configuration as plain data, with every local path made absolute."""
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    config["choices"] = {group: choices[group] for group in CHOICES}
    config["cache"] = _absolute(config["cache"])
    for section, key in (("task", "source"), ("model", "path"), ("retrained", "path"), ("retrained", "records")):
        value = config[section].get(key)
        if isinstance(value, str) and value and (value.startswith((".", "/", "~")) or Path(value).exists()):
            config[section][key] = _absolute(value)
    return config


def tuned_on(config: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    """On what this run's numbers were tuned; None where they are not those that were, or are not used as they were."""
    if any(key.startswith(TUNED) and key not in NO_NUMBER for key in map(_key, overrides)):  # typed by hand
        return None
    if config["tuned"] and config["adapter"]:
        log.info("untuned: the numbers of conf/tuned/ are for unlearning every weight, not for an adapter")
        return None
    return config["tuned"]


def job(cfg: DictConfig) -> float | None:
    """One run; returns what a sweeper maximises (utility), or None."""
    _say_device_to_deepspeed()
    from soul_exp import experiment, tables

    hydra_config = HydraConfig.get()
    out = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode == RunMode.MULTIRUN:
        log.info("--- job %s: %s", hydra_config.job.num, out.name)
    config = plain(cfg, dict(hydra_config.runtime.choices))
    config["tuned"] = tuned_on(config, hydra_config.overrides.task)
    results = experiment.run(config, out)
    if results is None:
        return None
    print(tables.comparison(results))
    print(f"results: {out / 'results.json'}")
    return results.utility


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
    """`job`, here or, importable by name, in another process; raises only JobError, and leaves it in error.txt."""
    out = Path(HydraConfig.get().runtime.output_dir)
    (out / ERROR).unlink(missing_ok=True)
    try:
        return job(cfg)
    except Exception as error:
        text = str(error) if isinstance(error, UsageError) else "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):  # a full disk may be what failed
            (out / ERROR).write_text(text)
        raise _failed(f"{out.name}: {text.strip()}") from None


def main() -> None:
    """`python -m soul_exp`: one run, or with -m a sweep. Exits 1 if a job failed and names it."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's own printer
    FAILED.clear()
    sys.argv[1:] = _flags_last(sys.argv[1:])
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(start)()
    except KeyboardInterrupt:
        print("soul_exp: interrupted; the same command resumes where this one stopped", file=sys.stderr)
        sys.exit(130)
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"soul_exp: {_told(error)}")
    except Exception as error:
        from submitit.core.utils import UncompletedJobError

        if isinstance(error, UncompletedJobError):  # not submitted, or killed before it could say anything
            lines = str(error).splitlines()  # what it is, the job's log, and in its last lines why
            FAILED.append("\n".join([f"SLURM: {lines[0]}", *lines[1:3], *lines[3:][-5:]]))
        if not FAILED:
            if isinstance(error, BrokenPipeError):  # `--help | head`: the reader has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            if isinstance(error, OSError):
                sys.exit(f"soul_exp: the run's folder cannot be written: {error}")
            raise
        for message in FAILED:
            print(f"soul_exp: failed: {message}", file=sys.stderr)
        sys.exit(1)


def _flags_last(arguments: list[str]) -> list[str]:
    """The flags of Hydra behind the overrides: between them its parser takes no more overrides."""
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
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


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _say_device_to_deepspeed() -> None:
    """Before anything imports DeepSpeed: left to find out that there is no GPU, it warns, in every process."""
    if _device() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


register_resolvers()  # at import: in a SLURM job Hydra composes before it calls anything of ours
