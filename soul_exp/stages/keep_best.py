"""save=best: the weights of the checkpoint that forgets most on the validation part and keeps enough there."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from soul_exp.artifacts.scores import FORGET_QUALITY, RETAIN
from soul_exp.results import write_json
from soul_exp.stages.selection import order

log = logging.getLogger(__name__)

PREFIX = "best-"  # and the step: a folder beside the checkpoints
CANDIDATE = "best.json"  # in it, written last: without it the folder does not count


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


class KeepBest(TrainerCallback):
    """At every checkpoint and at the end evaluates the validation probes, and keeps the weights if they are the best.

    `enough` is the validation retain probability to keep; of equals the earliest is best. A resumed training finds the
    best so far in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        enough: float,
        validate: Callable[[], Mapping[str, float | None]],
        save: Callable[[Path], None],
        first: bool,
    ) -> None:
        self.folder, self.enough, self.validate, self.save, self.first = folder, enough, validate, save, first
        self.considered: int | None = None  # the last step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.consider(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.considered != state.global_step:
            self.consider(state.global_step)

    def consider(self, step: int) -> None:
        """Evaluate the weights of `step`, and keep them in the place of the best so far if they are better."""
        self.considered = step
        now, best = Candidate(step, self.validate()), self.best_so_far()
        if best is not None and order(best.metrics, self.enough) >= order(now.metrics, self.enough):
            return
        folder = self.folder_of(now)
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

    def folder_of(self, candidate: Candidate) -> Path:
        """Where the weights of `candidate` are."""
        return self.folder / f"{PREFIX}{candidate.step}"

    def end(self, num_steps: int) -> tuple[Path, str]:
        """Where the best weights of a training of `num_steps` steps are, and what a reader has to know of them."""
        if self.considered != num_steps:  # it ended before its time
            self.consider(num_steps)
        best = self.best_so_far()
        assert best is not None
        return self.folder_of(best), f"save=best: the weights of step {best.step} of {num_steps}, {best}"
