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

log = logging.getLogger(__name__)

PREFIX = "best-"  # and the step: a folder beside the checkpoints
MOMENT = "best.json"  # in it, written last: without it the folder does not count


@dataclass(frozen=True)
class Moment:
    """A step of a training and the validation metrics of its weights; a metric is None where they are not finite."""

    step: int
    metrics: Mapping[str, float | None]

    def rank(self, enough: float) -> tuple[bool, float]:
        """What the best is the largest of: those that keep `enough`, by forget quality; else by what they keep."""
        forgotten, kept = self.metrics[FORGET_QUALITY], self.metrics[RETAIN]
        if forgotten is None or kept is None:
            return False, float("-inf")
        return (True, forgotten) if kept >= enough else (False, kept)


class Best(TrainerCallback):
    """At every checkpoint and at the end puts the validation probes to the model, and keeps its weights if they lead.

    `enough` is the validation retain probability to keep; the earliest of equals leads. A resumed training finds the
    leader of before in `folder`.
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
        self.seen: int | None = None  # the last step judged

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.judge(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.seen != state.global_step:
            self.judge(state.global_step)

    def judge(self, step: int) -> None:
        self.seen = step
        now, leader = Moment(step, self.validate()), self.leader()
        if leader is not None and leader.rank(self.enough) >= now.rank(self.enough):
            return
        place = self.place(now)
        if self.first:
            shutil.rmtree(place, ignore_errors=True)
        self.save(place)
        if self.first:
            write_json(place / MOMENT, asdict(now))
            for other in self.folder.glob(f"{PREFIX}*"):
                if other != place:
                    shutil.rmtree(other)
            log.info("save=best: step %d leads, %s", step, _told(now))

    def leader(self) -> Moment | None:
        """The best moment so far; of two, where a kill left both, the better."""
        found = [Moment(**json.loads(path.read_text())) for path in self.folder.glob(f"{PREFIX}*/{MOMENT}")]
        return max(found, key=lambda moment: (moment.rank(self.enough), -moment.step), default=None)

    def place(self, moment: Moment) -> Path:
        """Where the weights of `moment` are."""
        return self.folder / f"{PREFIX}{moment.step}"


def note(moment: Moment, num_steps: int) -> str:
    """What a reader of the results has to know: these are not the last weights."""
    return f"save=best: the weights of step {moment.step} of {num_steps}, {_told(moment)}"


def _told(moment: Moment) -> str:
    forgotten, kept = moment.metrics[FORGET_QUALITY], moment.metrics[RETAIN]
    if forgotten is None or kept is None:
        return "whose weights are not finite"
    return f"validation log10 forget quality {forgotten:.3g} at retain probability {kept:.3g}"
