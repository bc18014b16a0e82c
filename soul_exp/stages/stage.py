"""What a stage is: a name, whether a run wants it, and one function; and what stages hand on to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from soul_exp.artifacts.prepared_models import data_hashes
from soul_exp.build import Config
from soul_exp.comparison import compared
from soul_exp.data import content_hash
from soul_exp.distributed.join import WorkerGroup
from soul_exp.models.language_model import LanguageModel
from soul_exp.run import Run
from soul_exp.stages.wandb_log import WandbLog
from soul_exp.training.train import Outcome

MODEL, RECORDS, CHECKPOINTS, LOSSES = "model", "records", "checkpoints", "train.jsonl"  # in a run's folder
J = TypeVar("J")


@dataclass(frozen=True)
class Job:
    """A run at work, in the process that started it."""

    config: Config
    run: Run
    out: Path
    reasons: Mapping[str, str]  # metric -> why it is not available
    group: WorkerGroup | None = None  # the processes of the run, where they exist already
    seconds: Mapping[str, float] = field(default_factory=dict)  # stage -> wall-clock seconds
    trials: Sequence[Mapping[str, Any]] = ()

    def with_seconds(self, stage: str, seconds: float) -> Job:
        return replace(self, seconds={**self.seconds, stage: seconds})


@dataclass
class RankJob:
    """A run at work, on one of its ranks; a stage leaves the model and the outcome here for the next."""

    config: Config
    run: Run
    out: Path
    reasons: Mapping[str, str]
    seconds: dict[str, float]
    trials: Sequence[Mapping[str, Any]]
    fingerprint: str  # of everything that decides the run's numbers
    device: str
    first: bool  # whether this is rank 0, which writes
    wandb_log: WandbLog | None  # of rank 0
    lm: LanguageModel | None = None  # the model to evaluate
    outcome: Outcome | None = None  # of the training; None where nothing was trained


@dataclass(frozen=True)
class Stage(Generic[J]):
    """One of a run's stages: `function` does its work and hands the job on."""

    name: str
    wanted: Callable[[Run], bool]
    function: Callable[[J], J]


def fingerprint(config: Config, run: Run) -> str:
    """A hash of everything that decides the numbers of a run of `config`; `run` tells the data."""
    return content_hash([compared(config), data_hashes(run)])
