"""What a stage is: a name, whether a run wants it, and one function; and what stages hand on to each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from soul_exp.artifacts import prepared_models
from soul_exp.build import Config
from soul_exp.comparison import compared
from soul_exp.data import content_hash
from soul_exp.errors import UsageError
from soul_exp.models import loading
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import LanguageModel
from soul_exp.run import Run
from soul_exp.stages.wandb_log import WandbLog
from soul_exp.tasks.task import Task
from soul_exp.training.train import Outcome

# in a run's folder
MODEL, RECORDS, ATTACKS, CHECKPOINTS, LOSSES = "model", "records", "attacks", "checkpoints", "train.jsonl"
J = TypeVar("J", bound="Job")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run at work."""

    config: Config
    run: Run
    out: Path
    reasons: Mapping[str, str]  # metric -> why it is not available
    notes: Sequence[str] = ()  # what the checks found out about the models, for the reader of the results
    seconds: Mapping[str, float] = field(default_factory=dict)  # stage -> wall-clock seconds
    trials: Sequence[Mapping[str, Any]] = ()
    cached: Sequence[str] = ()  # the models whose answers were in the cache before this run


@dataclass(frozen=True, kw_only=True)
class RankJob(Job):
    """A run at work, on one of its ranks; a stage leaves the model and the outcome here for the next."""

    fingerprint: str  # of everything that decides the run's numbers
    device: str
    wandb_log: WandbLog | None  # of rank 0
    lm: LanguageModel | None = None  # the model to evaluate
    outcome: Outcome | None = None  # of the training; None where nothing was trained

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.wandb_log is not None

    def load(self, checkpoint: Checkpoint, may_have_diverged: bool = False) -> LanguageModel:
        """The model in `checkpoint` on its ranks and on their device, as this run's compute divides it."""
        lm = prepared_models.load(self.run.model, checkpoint, self.run.compute.deepspeed, may_have_diverged)
        loading.move(lm.model, self.device)
        return lm


@dataclass(frozen=True)
class Stage(Generic[J]):
    """One of a run's stages: `function` does its work and hands the job on."""

    name: str
    wanted: Callable[[Run], bool]
    function: Callable[[J], J]
    listed: bool = True  # whether the option `stages` names it


def check_unchanged(hashes: Mapping[str, str], task: Task) -> None:
    """Raises UsageError unless `task`, as a stage reads it, has the data, with these `hashes`, of the run's check."""
    if changed := [name for name in hashes if task.hashes.get(name) != hashes[name]]:
        found = f"the data have changed since this command checked them ({', '.join(changed)})"
        raise UsageError(f"{found}: type it again, and change no file while a run works")


def fingerprint(config: Config, run: Run) -> str:
    """A hash of everything that decides the numbers of a run of `config`; `run` tells the data."""
    return content_hash([compared(config), prepared_models.data_hashes(run)])
