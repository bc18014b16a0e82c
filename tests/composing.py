"""Configurations as the command line hands them to a run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from soul_exp import compose


def job(*overrides: str) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The configuration of one job, and the sweep that its preset states."""
    with hydra.initialize_config_dir(str(compose.conf_dir()), version_base="1.3"):
        cfg = hydra.compose("config", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        try:
            own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
            return compose.plain(own, dict(cfg.hydra.runtime.choices)), dict(cfg.hydra.sweeper.params or {})
        finally:
            HydraConfig.instance().cfg = None


def composed(place: Path, *overrides: str) -> dict[str, Any]:
    """The configuration of a job that is typed in `place`, where its cache is too."""
    with contextlib.chdir(place):
        return job(*overrides, f"cache={place / 'cache'}")[0]
