"""How unlearning proceeds: what the validation part says at every n-th step of a training, which it does not change."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from soul_exp.artifacts.scores import Validated
from soul_exp.files import json_lines, write_atomically

NAME = "trajectory.jsonl"  # in a run's folder: step, seconds of training, and what `Validated` holds, a line each


class ByStep:
    """What the validation part says of the weights of a step, evaluated once for all callbacks that ask for it."""

    def __init__(self, validate: Callable[[], Validated]) -> None:
        self.validate = validate
        self.seconds = 0.0  # of all evaluations
        self.last: tuple[int, Validated] | None = None

    def __call__(self, step: int) -> Validated:
        """The numbers of the weights of `step`, the present ones; every rank calls it."""
        if self.last is None or self.last[0] != step:
            start = time.perf_counter()
            self.last = step, self.validate()
            self.seconds += time.perf_counter() - start
        return self.last[1]


class Trajectory(TrainerCallback):
    """Evaluates the validation part before the first step, at every multiple of `every` steps, and after the last.

    All ranks evaluate together; the first writes `path`, one JSON object per line. `seconds` counts from the start of
    the training, over all starts of a run that was killed, without evaluations of the validation part.
    """

    def __init__(self, every: int, path: Path, validated: ByStep, first: bool) -> None:
        self.every, self.path, self.validated, self.first = every, path, validated, first
        self.lines: list[dict[str, Any]] = []
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # a resumed run repeats the steps after its checkpoint
        before = read(self.path)
        self.lines = [line for line in before if line["step"] <= state.global_step]
        self.start += self.seconds - (self.lines[-1]["seconds"] if self.lines else 0.0)
        self.add(state.global_step)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.validated.seconds - self.start

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.add(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.add(state.global_step)

    def add(self, step: int) -> None:
        """Evaluate the weights of `step`, once."""
        if self.lines and self.lines[-1]["step"] == step:
            return
        seconds, found = self.seconds, self.validated(step)
        self.lines.append({"step": step, "seconds": seconds, **found.metrics, "collapsed": found.collapsed})
        if self.first:
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a trajectory, in the order of their steps; none without a file."""
    return list(json_lines(path))
