"""Which weights are best: the rule by which trials of `tune`, and checkpoints with save=best, are compared."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from soul_exp.artifacts.scores import FLUENCY, FORGET_QUALITY, RETAIN, S_MIA, UTILITY, VALIDATION, Validated
from soul_exp.results import write_json

log = logging.getLogger(__name__)

PREFIX = "best-"  # and the step: a folder beside the checkpoints
KEPT = (RETAIN, UTILITY, FLUENCY)  # of the target, a share that is stated
CANDIDATE = "best.json"  # in it, written last: without it the folder does not count


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights that may be selected, and what the validation part says of them; see `Validated`."""

    metrics: Mapping[str, float | None]
    collapsed: str | None = None
    diverged: str | None = None  # why, or None

    def __str__(self) -> str:
        forgotten, kept = self.metrics.get(FORGET_QUALITY), self.metrics.get(RETAIN)
        if forgotten is None or kept is None:
            return "whose weights are not finite"
        others = ((name, self.metrics.get(name)) for name in (*KEPT[1:], S_MIA))
        more = [f"{name.removeprefix(VALIDATION)} {value:.3g}" for name, value in others if value is not None]
        found = f"validation log10 forget quality {forgotten:.3g} at retain probability {kept:.3g}"
        return ", ".join([found, *more, *(["collapsed"] if self.collapsed else [])])


@dataclass(frozen=True, kw_only=True)
class AtStep(Candidate):
    """The weights of a step of a training."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Trial(Candidate):
    """What one learning rate and one gamma came to."""

    lr: float
    gamma: float
    num_steps: int
    seconds: float  # of unlearning


def lost(found: Candidate, start: Mapping[str, float], keep: float) -> str | None:
    """Why `found` does not count, or None if it does.

    It counts if it has not collapsed and keeps at least the share `keep` of each of KEPT that `start` has, the numbers
    of the target.
    """
    shares = ((name, found.metrics.get(name), keep * start[name]) for name in KEPT if name in start)
    low = [
        f"{name} {'lost' if value is None else f'{value:.3g}'}, expected {least:.3g} or more"
        for name, value, least in shares
        if value is None or value < least - 1e-9
    ]
    reasons = [*low, *([f"collapsed ({found.collapsed})"] if found.collapsed else [])]
    return "; ".join(reasons) or None


Order = tuple[int, float, float]


def order(found: Candidate, start: Mapping[str, float], *, keep: float, s_mia: float = 0.0) -> Order:
    """Larger is better: first what counts, as `lost` says, then what has `s_mia` or more, then the forget quality.

    Of equal forget qualities, as where the test is at its floor, the larger s_mia is better.

    Of candidates that do not count, the one is better that has not collapsed, and then that keeps more: the least share
    of the target's numbers decides. What diverged or is not finite comes last.
    """
    forgotten, metrics = found.metrics.get(FORGET_QUALITY), found.metrics
    if found.diverged is not None or forgotten is None or metrics.get(RETAIN) is None:
        return 0, float("-inf"), 0.0
    if lost(found, start, keep) is None:
        shown = metrics.get(S_MIA) or 0.0
        return (4 if shown >= s_mia else 3), forgotten, shown
    shares = [(metrics.get(name) or 0.0) / start[name] for name in KEPT if start.get(name)]
    return (1 if found.collapsed else 2), min(shares, default=0.0), forgotten


def best_forgetting(trials: Sequence[Trial], start: Mapping[str, float], *, keep: float, s_mia: float = 0.0) -> Trial:
    """The largest validation log10 forget quality (an oracle) among trials that keep the target's validation numbers.

    `keep` is the share of them (`start`, the target's) that is enough, and a trial that collapsed does not count: see
    `lost`. Trials with a validation s_mia of `s_mia` or more come first. A trial that diverged does not count. Ties go
    to the larger s_mia, the smaller learning rate, then the gamma named first. If none counts: the one that keeps most;
    if all diverged: the smallest learning rate, so that the run reports it.
    """
    by_rate = sorted(trials, key=lambda trial: trial.lr)
    return max(by_rate, key=lambda trial: order(trial, start, keep=keep, s_mia=s_mia))


@dataclass(eq=False)
class KeepBest(TrainerCallback):
    """save=best: evaluates validation probes at each checkpoint and at the end, and keeps the first best weights."""

    folder: Path  # a resumed training finds the best so far there
    start: Mapping[str, float]  # the validation numbers of the target
    validated: Callable[[int], Validated]  # of the present weights, those of a step
    save: Callable[[Path], None]
    first: bool
    keep: float
    s_mia: float = 0.0
    considered: int | None = None  # the last step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.consider(state.global_step)

    on_train_end = on_save

    def consider(self, step: int) -> None:
        """Evaluate the weights of `step`, once, and keep them in the place of the best so far if they are better."""
        if step == self.considered:
            return
        self.considered = step
        now, best = AtStep(step=step, **vars(self.validated(step))), self.best_so_far()
        if best is not None and self.order(best) >= self.order(now):
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

    def order(self, found: AtStep) -> Order:
        """`order` of this run."""
        return order(found, self.start, keep=self.keep, s_mia=self.s_mia)

    def best_so_far(self) -> AtStep | None:
        """The best checkpoint; of two, where a kill left both, the better."""
        found = [AtStep(**json.loads(path.read_text())) for path in self.folder.glob(f"{PREFIX}*/{CANDIDATE}")]
        return max(found, key=lambda each: (self.order(each), -each.step), default=None)

    def end(self, num_steps: int) -> tuple[Path, str]:
        """Where the best weights of a training of `num_steps` steps are, and what a reader has to know of them."""
        self.consider(num_steps)  # it may have ended before its time
        best = self.best_so_far()
        assert best is not None
        note = f"save=best: the weights of step {best.step} of {num_steps}, {best}; its rule is an oracle"
        if why := lost(best, self.start, self.keep):
            note += f"; no checkpoint kept enough, this one the most ({why})"
        return self.folder / f"{PREFIX}{best.step}", note
