"""How unlearning proceeds: what the validation part says at every n-th step of a training, which it does not change."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from soul_exp.artifacts.scores import Validated
from soul_exp.files import write_atomically

NAME = "trajectory.jsonl"  # in a run's folder: step, seconds of training, and what `Validated` holds, a line each


class Trajectory(TrainerCallback):
    """Evaluates the validation part before the first step, at every multiple of `every` steps, and after the last.

    All ranks call `validate` together; the first writes `path`, one JSON object per line. `seconds` counts from the
    start of the training, over all starts of a run that was killed, without the evaluations themselves.
    """

    def __init__(self, every: int, path: Path, validate: Callable[[], Validated], first: bool) -> None:
        self.every, self.path, self.validate, self.first = every, path, validate, first
        self.lines: list[dict[str, Any]] = []
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # a resumed run repeats the steps after its checkpoint
        before = read(self.path)
        self.lines = [line for line in before if line["step"] <= state.global_step]
        spent = self.lines[-1]["seconds"] if self.lines else 0.0
        self.start = time.perf_counter() - spent
        self.add(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.add(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.add(state.global_step)

    def add(self, step: int) -> None:
        """Evaluate the weights of `step`, once."""
        if self.lines and self.lines[-1]["step"] == step:
            return
        paused = time.perf_counter()
        found = self.validate()
        seconds = paused - self.start
        self.lines.append({"step": step, "seconds": seconds, **found.metrics, "collapsed": found.collapsed})
        if self.first:
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.start += time.perf_counter() - paused


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a trajectory, in the order of their steps; none without a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
