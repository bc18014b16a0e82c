"""Which weights are best: the rule by which trials of `tune`, and checkpoints with save=best, are compared."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from soul_exp.artifacts.scores import FORGET_QUALITY, RETAIN
from soul_exp.results import write_json

log = logging.getLogger(__name__)

PREFIX = "best-"  # and the step: a folder beside the checkpoints
CANDIDATE = "best.json"  # in it, written last: without it the folder does not count


@dataclass(frozen=True)
class Trial:
    """What one learning rate and one gamma came to on the validation part; a metric is None where it is not finite."""

    lr: float
    gamma: float
    metrics: Mapping[str, float | None]
    diverged: str | None  # why, or None
    num_steps: int
    seconds: float  # of unlearning


def order(metrics: Mapping[str, float | None], enough: float) -> tuple[bool, float]:
    """Larger is better: of what keeps `enough` (retain probability) the forget quality, below that what is kept."""
    forgotten, kept = metrics.get(FORGET_QUALITY), metrics.get(RETAIN)
    if forgotten is None or kept is None:
        return False, float("-inf")
    return (True, forgotten) if kept >= enough else (False, kept)


def best_forgetting(trials: Sequence[Trial], start: Mapping[str, float], *, keep: float) -> Trial:
    """The largest validation log10 forget quality among trials that keep the target's validation retain probability.

    `keep` is the share of it (`start`, the target's metrics) that is enough. A trial that diverged does not count. Ties
    go to the smaller learning rate, then to the gamma named first. If none keeps enough: the one that keeps most; if
    all diverged: the smallest learning rate, so that the run reports it.
    """

    def value(trial: Trial) -> tuple[bool, float]:
        return order({} if trial.diverged is not None else trial.metrics, keep * start[RETAIN])

    return max(sorted(trials, key=lambda trial: trial.lr), key=value)


@dataclass(frozen=True)
class Candidate:
    """A step of a training and the validation metrics of its weights; a metric is None where they are not finite."""

    step: int
    metrics: Mapping[str, float | None]

    def __str__(self) -> str:
        forgotten, kept = self.metrics[FORGET_QUALITY], self.metrics[RETAIN]
        if forgotten is None or kept is None:
            return "whose weights are not finite"
        return f"validation log10 forget quality {forgotten:.3g} at retain probability {kept:.3g}"


@dataclass(eq=False)
class KeepBest(TrainerCallback):
    """save=best: evaluates validation probes at each checkpoint and at the end, and keeps the first best weights."""

    folder: Path  # a resumed training finds the best so far there
    enough: float  # the validation retain probability to keep
    validate: Callable[[], Mapping[str, float | None]]
    save: Callable[[Path], None]
    first: bool
    considered: int | None = None  # the last step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.consider(state.global_step)

    on_train_end = on_save

    def consider(self, step: int) -> None:
        """Evaluate the weights of `step`, once, and keep them in the place of the best so far if they are better."""
        if step == self.considered:
            return
        self.considered = step
        now, best = Candidate(step, self.validate()), self.best_so_far()
        if best is not None and order(best.metrics, self.enough) >= order(now.metrics, self.enough):
            return
        folder = self.folder / f"{PREFIX}{step}"
        if self.first:
            shutil.rmtree(folder, ignore_errors=True)
        self.save(folder)
        if self.first:
            write_json(folder / CANDIDATE, asdict(now))
            for other in self.folder.glob(f"{PREFIX}*"):
                if other != folder:
                    shutil.rmtree(other)
            log.info("save=best: step %d is the best so far, %s", step, now)

    def best_so_far(self) -> Candidate | None:
        """The best candidate; of two, where a kill left both, the better."""
        found = [Candidate(**json.loads(path.read_text())) for path in self.folder.glob(f"{PREFIX}*/{CANDIDATE}")]
        return max(found, key=lambda each: (order(each.metrics, self.enough), -each.step), default=None)

    def end(self, num_steps: int) -> tuple[Path, str]:
        """Where the best weights of a training of `num_steps` steps are, and what a reader has to know of them."""
        self.consider(num_steps)  # it may have ended before its time
        best = self.best_so_far()
        assert best is not None
        note = f"save=best: the weights of step {best.step} of {num_steps}, {best}"
        return self.folder / f"{PREFIX}{best.step}", note
