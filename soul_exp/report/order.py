"""In what order rows stand: as sweeps listed the values of options, and numbered their jobs."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from yaml import YAMLError

from soul_exp.errors import explained
from soul_exp.results import TYPED, Results

JOB_NUMBER = re.compile(r"^    num: (\d+)$", re.M)  # of hydra.job, in hydra.yaml


def in_job_order(folder: Path | str, runs: Mapping[str, Results]) -> dict[str, Results]:
    """The runs as their sweep numbered them, where Hydra left that in their folders; the others last, as they come."""

    def number(name: str) -> float:
        path = Path(folder) / name / TYPED / "hydra.yaml"
        found = JOB_NUMBER.search(path.read_text(errors="replace")) if path.is_file() else None
        return float(found[1]) if found else math.inf

    return {name: runs[name] for name in sorted(runs, key=number)}


def typed_order(folder: Path | str) -> dict[str, list[str]]:
    """Option or group -> its values in the order in which sweeps below `folder` listed them, as multirun.yaml has it.

    Raises UsageError for a multirun.yaml that cannot be read.
    """
    found: dict[str, list[str]] = {}
    for path in (*sorted(Path(folder).glob("multirun.yaml")), *sorted(Path(folder).glob("*/multirun.yaml"))):
        expected = "expected what Hydra writes for a sweep: remove it, and rows keep the order of their folders' names"
        with explained((ValueError, KeyError, TypeError, OSError, YAMLError, HydraException), str(path), expected):
            hydra = yaml.safe_load(path.read_text())["hydra"]
            swept = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
            for override in OverridesParser.create().parse_overrides([*hydra["overrides"]["task"], *swept]):
                # of a glob the numbers of the jobs tell the order
                if override.is_discrete_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP:
                    values = found.setdefault(override.key_or_group, [])
                    values += [text for text in override.sweep_string_iterator() if text not in values]
    return found
