"""Before a sweep's first job: how many there are, and whether what they will write fits on the disk."""

from __future__ import annotations

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
from hydra.errors import HydraException, InstantiationException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from soul_exp import compat, compose
from soul_exp.distributed import interrupts
from soul_exp.errors import UsageError

# jobs that differ in these only write the same amount: one of each kind is composed
SAME_SIZE = ("seed", "loss", "optimizer", "tuned", "tune", "evaluate", "wandb", "overwrite", "hydra")
SAME_SIZE_TRAIN = "save_steps"  # of train, the only number that decides what is written


class BeforeSweep(Callback):
    """Says what a sweep will need on the disk; exits with a sentence where that is more than there is."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from soul_exp.checks.options import check_flags

        try:
            compose.check_optional(config.hydra.runtime.choices)
            check_flags(config)  # those of all jobs; each job checks what it varies
            if compat.is_basic_sweeper(config.hydra.sweeper["_target_"]):
                print(forecast(config), flush=True)  # how many jobs another one starts is its own secret
        except UsageError as error:
            sys.exit(f"soul_exp: {error}")  # Hydra turns an Exception into a warning


def forecast(config: DictConfig) -> str:
    """One line on what the sweep of `config` will need. Raises UsageError if it does not fit."""
    from soul_exp import sequence
    from soul_exp.checks import disk

    jobs = combinations(config)
    kinds = Counter(tuple(override for override in job if _decides(override)) for job in jobs)
    folder = Path(config.hydra.sweep.dir)
    if not config.overwrite:  # what has finished has its model already
        finished = len(list(folder.glob("*/results.json")))
        for _ in range(min(finished, len(jobs) - 1)):
            kinds[kinds.most_common(1)[0][0]] -= 1
    needs: list[tuple[int, Any]] = []
    cache = Path(config.cache).expanduser()
    for kind, count in kinds.items():
        interrupts.safe_point()
        if count:
            try:
                needs.append((count, sequence.need(composed(config, kind))))
            except (UsageError, InstantiationException, HydraException, OmegaConfBaseException, OSError, ValueError):
                needs.append((count, None))  # the job itself will say why it cannot work
    at_once = 1 if compat.is_basic_launcher(config.hydra.launcher["_target_"]) else len(jobs)
    return disk.check_sweep(needs, folder, cache, at_once)


def combinations(config: DictConfig) -> list[tuple[str, ...]]:
    """The overrides of every job, as Hydra's BasicSweeper will combine them."""
    params = config.hydra.sweeper.params
    lines = [*(f"{key}={params[key]}" for key in params or ()), *config.hydra.overrides.task]
    values: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(lines):
        key = override.get_key_element()
        if override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
    return list(itertools.product(*values.values()))


def composed(config: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The plain configuration of one job of the sweep `config`."""
    hydra_ = GlobalHydra.instance().hydra
    assert hydra_ is not None
    job = hydra_.config_loader.load_sweep_config(config, list(overrides))
    state = Singleton.get_state()
    try:
        HydraConfig.instance().set_config(job)
        choices = dict(job.hydra.runtime.choices)
        with open_dict(job):
            del job["hydra"]
        return compose.plain(job, choices)
    finally:
        Singleton.set_state(state)


def _decides(override: str) -> bool:
    """Whether an override may change how much a job writes."""
    key = override.split("=")[0].lstrip("+~")
    section, _, rest = key.replace("/", ".").partition(".")
    return rest == SAME_SIZE_TRAIN if section == "train" else section not in SAME_SIZE
