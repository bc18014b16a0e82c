"""Hydra composes; here the result becomes plain data, with absolute paths, and the resolvers of conf/ are defined."""

import functools
import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from soul_exp import options, schema
from soul_exp.errors import UsageError, explained, first_line
from soul_exp.ranges import BELOW
from soul_exp.report.labels import printable

log = logging.getLogger("soul_exp")

TUNED = ("optimizer.", "loss.", "train.")  # the sections that an entry of tuned/ sets
SUITE_METRICS = "soul_exp.metrics.suite."  # where a task reports one of them, utility_suite=auto is a suite
CHOICES = ("model", "task", "loss", "optimizer", "compute", "precision", "adapter")


def conf_dir() -> Path:
    """The folder of the configuration: inside an installed package, beside a checkout's."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "conf", here.parent / "conf") if (path / "config.yaml").is_file())


@functools.cache
def listed_targets() -> frozenset[str]:
    """Every `_target_` that a file of conf/ states: the project's tasks, metrics, losses, optimizers and adapters."""
    texts = (path.read_text(encoding="utf-8") for path in conf_dir().rglob("*.yaml"))
    return frozenset(target for text in texts for target in re.findall(r"_target_: *([\w.]+)", text))


@functools.cache
def listed_metrics() -> Mapping[str, Sequence[Any]]:
    """Metric -> every definition that a file of conf/ gives the name: a task's, an attack's, or one of all tasks."""
    found: dict[str, list[Any]] = {}
    for path in sorted(path for group in ("task", "metrics", "attack") for path in (conf_dir() / group).glob("*.yaml")):
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        for name, entry in content["metrics"].items():
            found.setdefault(name, []).append(entry)
    return found


def check_trusted(path: Path, node: Mapping[str, Any], trust: bool) -> None:
    """Raises UsageError if `node`, of a file that others may have written, calls code that conf/ does not list.

    Hydra calls every `_target_`, and those that an interpolation such as ${oc.create:...} makes. With `trust` they are
    printed instead.
    """
    texts = [(key.split(".")[-1], str(value)) for key, value in options.leaves(node, into_lists=True)]
    targets = {value for name, value in texts if name == "_target_"} - listed_targets()
    if unlisted := ", ".join(sorted(targets | {value for _, value in texts if "${" in value})):
        named = f"{path} names code that conf/ does not list: {unlisted}"
        if not trust:
            raise UsageError(f"{named}. If you trust whoever wrote that file, type --trust, which calls it")
        print(printable(f"--trust: {named}"), file=sys.stderr)


def run_folder(overrides: str) -> str:
    """The name of a run's folder: its overrides, in characters that paths and Hydra's command line leave alone."""
    name = re.sub(r"[^\w.+-]+", "_", overrides).strip("_") or "default"
    return name if len(name) <= 160 else f"{name[:140]}-{hashlib.sha256(overrides.encode()).hexdigest()[:10]}"


def run_name(name: Any) -> str:
    """`name`, the folder below runs/ that holds the runs. Raises UsageError if it would lead out of there."""
    if message := BELOW.mismatch("name", name):
        raise UsageError(message)
    return str(name)


def plain(cfg: DictConfig, choices: dict[str, str]) -> dict[str, Any]:
    """The resolved configuration as plain data, with every local path made absolute. UsageError if it does not fit."""
    try:
        config = options.with_todays_targets(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        found = " ".join(first_line(error).split())
        raise UsageError(f"{error.full_key or 'the configuration'}: {found}: correct it") from error
    config.setdefault("attack", {})  # where none is chosen
    schema.check(config)
    config["choices"] = {group: choices[group] for group in CHOICES}
    config["cache"] = absolute(config["cache"])
    config["utility_suite"] = suite_of(config)
    if config["utility_data"]:
        config["utility_data"] = absolute(str(config["utility_data"]))
    for section, key in (key.split(".") for key, option in options.TABLE.items() if option.is_path):
        value = config[section].get(key)
        if isinstance(value, list):
            config[section][key] = [absolute(path) if _is_path(path) else path for path in value]
        elif _is_path(value):
            config[section][key] = absolute(value)
    return config


def of_job(cfg: DictConfig, hydra_config: Any, started: tuple[int, str] | None = None) -> dict[str, Any]:
    """The plain configuration of a job, with what its numbers were tuned on.

    compute.processes is the number that a launcher has `started`, if any; UsageError if another one was typed.
    """
    config = plain(cfg, dict(hydra_config.runtime.choices))
    typed = overrides_of(hydra_config)
    config["tuned"] = tuned_on(config, typed)
    if started is not None:
        (size, by), given = started, config["compute"]["processes"]
        if given != size and "compute.processes" in map(option_key, typed):
            raise UsageError(f"compute.processes={given}, but {by} has started {size}: leave it out, or start as many")
        config["compute"]["processes"] = size
    return config


def overrides_of(hydra_config: Any) -> list[str]:
    """The overrides that were typed for a job; an interpolation in one stays as it is."""
    return [str(override) for override in cast(list[Any], OmegaConf.to_container(hydra_config.overrides.task))]


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and (value.startswith((".", "/", "~")) or os.path.exists(value))


def suite_of(config: Mapping[str, Any]) -> str:
    """The name of the utility suite; `auto` is resolved by the task's metrics and the model."""
    if config["utility_suite"] != "auto":
        return str(config["utility_suite"])
    metrics = config["task"]["metrics"]  # as typed, so any value; `check` reports an entry that is not a metric
    entries = metrics.values() if isinstance(metrics, Mapping) else ()
    if not any(str(entry.get("_target_")).startswith(SUITE_METRICS) for entry in entries if isinstance(entry, Mapping)):
        return "none"
    from soul_exp.build import is_general

    return "embedded" if not config["model"]["path"] or is_general(config) else "paper"


def check_optional(choices: Mapping[str, str | None]) -> None:
    """Raises UsageError if the preset, method or budget does not exist: Hydra ignores a missing optional choice."""
    for group in ("experiment", "method", "budget"):
        options = GlobalHydra.instance().config_loader().get_group_options(group)
        if (choice := choices.get(group)) and choice not in options:
            raise UsageError(f"{group}={choice} is unknown{schema.nearest(choice, options)}")


def tuned_on(config: Mapping[str, Any], overrides: Sequence[str]) -> str | None:
    """The data on which this run's numbers were tuned; None if an override changes one of them, or for an adapter."""
    typed = [key for key in map(option_key, overrides) if key.startswith(TUNED)]
    if any(options.option_of(key).changes is options.Changes.NUMBERS for key in typed):
        return None
    if config["tuned"] and config["adapter"]:
        log.info("untuned: the numbers of conf/tuned/ are for unlearning every weight, not for an adapter")
        return None
    return config["tuned"]


def _choice(group: str, *, _root_: DictConfig) -> str:
    """The option chosen in a group; Hydra's own ${hydra:} does not know it before a sweep's first job."""
    hydra_config = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    return str(hydra_config.runtime.choices[group])


def option_key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def absolute(path: str) -> str:
    """`path` from the root, UsageError if it is none; a link to a file keeps its name, whose suffix says the format."""
    with explained((OSError, RuntimeError), path, "correct the path"):
        given = Path(path).expanduser().absolute()
        real = given.resolve()
        return str(given.parent.resolve() / given.name if given.is_symlink() and real.is_file() else real)


def _taught_here(path: str | None, stages: Sequence[str]) -> bool:
    """Whether the compared models are trained from scratch, with general questions, or one such is only evaluated."""
    from soul_exp.models.checkpoint import knows_general
    from soul_exp.run import only_measures

    return path is None or (only_measures(stages) and knows_general(path))


def user_cache() -> str:
    """The folder of a user's caches, as the XDG specification says; the compiled kernels are below it too."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return given if given.startswith("/") else "~/.cache"


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


RESOLVERS: dict[str, Callable[..., Any]] = {
    "run_folder": run_folder,
    "run_name": run_name,
    "not_in_folder_names": options.not_in_folder_names,
    "not": lambda value: not value,
    "either": lambda condition, yes, no: yes if condition else no,
    "equal": lambda a, b: a == b,
    "taught_here": _taught_here,
    "device": default_device,
    "user_cache": user_cache,
    "choice": _choice,
    "cpus": lambda processes, threads: processes * threads,
    "gpus": lambda device, n: n if device == "cuda" else None,
}
for name, resolver in RESOLVERS.items():  # at import: in a SLURM job Hydra composes before it calls anything of ours
    OmegaConf.register_new_resolver(name, resolver, replace=True)
