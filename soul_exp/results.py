"""results.json, the only contract between running and analysing: a documented type, written whole or not at all."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import DEVNULL, CalledProcessError, check_output
from typing import Any

from soul_exp.errors import UsageError
from soul_exp.files import write_atomically

FORMAT = 1
NAME = "results.json"
HEADLINE = ("forget_quality", "utility", "mia_auc")
OLDER = {"utility_suite": "none", "utility_limit": None, "utility_data": None}  # options that older files lack
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "deepspeed",
    "hydra-core",
    "lm_eval",
    "numpy",
    "scipy",
    "rouge-score",
)


@dataclass(frozen=True)
class Results:
    """One run. A metric that could not be had is null in `metrics` and its reason stands in `reasons`.

    `metrics` maps a model (`original`, `unlearned`, `retrained`, and perhaps `input_based`: the original under a system
    prompt that asks it not to reveal) to its metrics; `forget_quality`, `utility` and
    `mia_auc` are the unlearned model's, once more, at the top. Logarithms are to base 10 where the name says log10.
    `suite` maps the same models to their scores in the utility suite that `config` names; empty where there is none.
    """

    name: str  # the experiment: the folder that holds its runs
    status: str  # "finished" | "diverged": it was stopped, or weights or a metric of the unlearned model are not finite
    reason: str | None  # why it diverged
    caption: str  # what was forgotten, for tables
    choices: Mapping[str, str]  # group -> choice: model, task, loss, optimizer, compute, precision, adapter
    tuned: str | None  # on what this combination was tuned; None: untuned
    config: Mapping[str, Any]  # the resolved configuration
    metrics: Mapping[str, Mapping[str, float | None]]
    reasons: Mapping[str, str]  # metric -> why it is null; model.metric where it is so of that model alone
    training: Mapping[str, float | None]  # the last logged training numbers: losses, win_rate
    num_steps: int
    seconds: Mapping[str, float]  # stage -> wall-clock seconds
    peak_memory_gib: float  # of the largest process; device memory where there is a device
    seeds: Mapping[str, int]
    data_hashes: Mapping[str, str]
    commit: str | None
    versions: Mapping[str, str]
    forget_quality: float | None = None
    utility: float | None = None
    mia_auc: float | None = None
    notes: Sequence[str] = ()  # what a reader of the numbers has to know, such as: it degenerated to sign descent
    scorer: Mapping[str, Any] | None = None  # of toxicity: name, revision, auc on the num_test texts it never saw
    trials: Sequence[Mapping[str, Any]] = ()  # those that `config`'s learning rate and gamma were chosen from
    suite: Mapping[str, Mapping[str, Mapping[str, float]]] = field(
        default_factory=dict
    )  # model -> task -> metric -> value
    format: int = field(default=FORMAT)


def write(folder: Path, results: Results) -> Path:
    """Write `folder/results.json` atomically; what is not finite becomes null."""
    return write_json(folder / NAME, asdict(results))


def read(folder: Path) -> Results | None:
    """The results in `folder`, or None if it has none. Raises UsageError if the file is not ours."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        found = Results(**json.loads(path.read_text()))
        if not isinstance(found.config, dict) or not isinstance(found.metrics, dict):
            raise TypeError("config and metrics are expected to be objects")
        return replace(found, config={**OLDER, **found.config})
    except (json.JSONDecodeError, TypeError) as error:
        raise UsageError(
            f"{path} is not a results file of format {FORMAT} ({error}): remove it and run again"
        ) from error


def write_json(path: Path, value: Any) -> Path:
    """Write `value` as JSON in one atomic step: the file is absent, old or whole, never half."""
    return write_atomically(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """The installed version of each package that numbers may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit(folder: Path) -> str | None:
    """The git commit that `folder` was checked out from, with "+changes" where files differ; None outside git."""
    try:
        head = check_output(["git", "-C", str(folder), "rev-parse", "HEAD"], stderr=DEVNULL, text=True).strip()
        changed = check_output(["git", "-C", str(folder), "status", "--porcelain", "-uno"], stderr=DEVNULL, text=True)
    except (CalledProcessError, FileNotFoundError):
        return None
    return head + ("+changes" if changed.strip() else "")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
