"""Before the jobs of a command: how many a sweep has, and whether what they will write fits on the disk."""

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from soul_exp import compat, compose, sweep
from soul_exp.distributed import interrupts
from soul_exp.errors import UnreachableError, UsageError
from soul_exp.files import missing
from soul_exp.options import option_of
from soul_exp.results import NAME, typed

MOST_JOBS = 10_000


class BeforeJobs(Callback):
    """Begins a run or a sweep; prints what a sweep will need on the disk, and exits where that is more than is free."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with contextlib.suppress(OmegaConfBaseException):  # Hydra will raise it
            sweep.begin_command(missing(Path(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from soul_exp.checks.options import check_flags

        try:
            compose.check_optional(config.hydra.runtime.choices)
            for name in _names(config):  # else a job would find it out, after those before it
                compose.run_name(name)
            check_flags(_resolved(config))  # those of all jobs; each job checks what it varies
            total = None  # of another sweeper the number of jobs is unknown
            if compat.is_basic(config.hydra.sweeper["_target_"]):
                total = len(combinations(config))
                print(forecast(config), flush=True)
            is_local = compat.is_basic(config.hydra.launcher["_target_"])
            folder = Path(config.hydra.sweep.dir)
            sweep.begin_command(missing(folder), sweep.Sweep(total, folder, is_local))
        except UsageError as error:
            sys.exit(f"soul_exp: {error}")  # Hydra turns an Exception into a warning


def forecast(config: DictConfig) -> str:
    """One line on what the sweep of `config` will need. Raises UsageError if it does not fit."""
    from soul_exp import sequence
    from soul_exp.checks import disk

    jobs = combinations(config)  # of those that write the same amount one is composed
    if len(jobs) > MOST_JOBS:
        raise UsageError(f"this sweep has {len(jobs)} jobs, expected at most {MOST_JOBS}: divide it")
    folder = Path(config.hydra.sweep.dir)
    # what has finished has its model already
    finished = set() if config.overwrite else {frozenset(typed(path.parent) or ()) for path in folder.glob(f"*/{NAME}")}
    left = [job for job in jobs if frozenset(job) not in finished] or jobs[:1]
    kinds = Counter(tuple(override for override in job if option_of(compose.option_key(override)).size) for job in left)
    needs: list[disk.Need | None] = []
    for kind, count in kinds.items():
        interrupts.safe_point()
        if count:
            try:
                needs += [sequence.need(composed(config, kind))] * count
            except UnreachableError:
                raise  # once, and not by each job after its own attempts
            except (HydraException, OmegaConfBaseException, OSError, ValueError):
                needs += [None] * count  # the job itself reports why it cannot work
    at_once = 1 if compat.is_basic(config.hydra.launcher["_target_"]) else len(jobs)
    return disk.check_sweep(needs, folder, Path(compose.absolute(str(config.cache))), at_once)


def _names(config: DictConfig) -> list[str]:
    """The values of the option `name` in the jobs of the sweep `config`."""
    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    varied = [each for each in overrides if each.get_key_element() == "name" and each.is_discrete_sweep()]
    return [text.strip("'\"") for each in varied for text in each.sweep_string_iterator()] or [config.name]


def combinations(config: DictConfig) -> list[tuple[str, ...]]:
    """The overrides of every job, as Hydra's BasicSweeper will combine them."""
    params = config.hydra.sweeper.params
    lines = [*(f"{key}={params[key]}" for key in params or ()), *compose.overrides_of(config.hydra)]
    values: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(lines):
        key = override.get_key_element()
        varied = override.is_discrete_sweep()
        given = override.sweep_string_iterator() if varied else [override.get_value_element_as_str()]
        values[key] = [f"{key}={value}" for value in given]
    return list(itertools.product(*values.values()))


def composed(config: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The plain configuration of one job of the sweep `config`."""
    job = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
    state = Singleton.get_state()
    try:
        HydraConfig.instance().set_config(job)
        choices = dict(job.hydra.runtime.choices)
        with open_dict(job):
            del job["hydra"]
        return compose.plain(job, choices)
    finally:
        Singleton.set_state(state)


def _resolved(config: DictConfig) -> dict[str, Any]:
    """The sections of `config` as plain data, less those that cannot be resolved, which each job reports."""
    found: dict[str, Any] = {}
    for key in set(map(str, config)) - {"hydra"}:
        with contextlib.suppress(OmegaConfBaseException):
            value = config[key]
            found[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return found
