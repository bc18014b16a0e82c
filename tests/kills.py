"""Kills of a run by the hundred, and what is left behind by each."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from starts import Start, members

from soul_exp import results
from soul_exp.training import checkpoints

# 12 steps, a checkpoint every other one; curvature, momentum, dropout and a schedule, so that all of them must survive
TINY = [
    "task.num_authors=6", "task.num_forget_authors=2", "task.num_holdout_authors=1", "task.validation_fraction=0",
    "task.train_varied=false",
    "model.scratch.vocab_size=300", "model.scratch.config.hidden_size=32", "model.scratch.config.intermediate_size=32",
    "+model.scratch.config.attention_dropout=0.1", "train.dropout=true", "model.max_length=512",
    "prepare.epochs=0.6", "prepare.logging_steps=1", "prepare.save_steps=2", "evaluate.max_new_tokens=1",
    "train.max_steps=12", "train.batch_size=4", "train.logging_steps=1", "train.save_steps=2",
    "optimizer.interval=3", "optimizer.lr=1e-3", "wandb.mode=disabled",
]  # fmt: skip
CHEAP = ("forget_quality", "mia_auc", "forget_probability", "retain_probability")  # the metrics that are computed


# --- what a run leaves ----------------------------------------------------------------------------------------------


def numbers(out: Path) -> tuple[Any, ...]:
    """All that must be bit-equal: the metrics, the last training numbers, every logged step, the weights."""
    found = results.read(out)
    assert found is not None
    model = hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()
    values = [
        found.metrics,
        found.training,
        found.num_steps,
        found.passes,
        found.status,
        found.reason,
        list(found.notes),
    ]
    shown = json.dumps(values, sort_keys=True)  # a history read back from a checkpoint is sorted
    return shown, (out / "train.jsonl").read_text(), model


def assert_absent_or_complete(out: Path) -> None:
    """results.json is not there, or has every key."""
    path = out / results.NAME
    if path.exists():
        assert set(json.loads(path.read_text())) == {f.name for f in fields(results.Results)}


# --- kills ----------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """How many kills of which kind met a running start, and where they hit it."""

    kills: dict[str, int] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    runs: int = 0

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    def count(self, kind: str, place: str) -> None:
        self.kills[kind] = self.kills.get(kind, 0) + 1
        self.places[place] = self.places.get(place, 0) + 1


KINDS = ("launcher -9", "worker -9", "launcher TERM")
SAVE = "during a save"
MOMENTS = ("any time", "any time", "checkpoint", "checkpoint", "results")


def kill_once(start: Start, rng: random.Random, seconds: float, report: Report, moments: Sequence[str]) -> bool:
    """Kill `start` at one of `moments`, drawn from `rng`, within about `seconds`; False if it had ended before that."""
    kind = min(rng.sample(KINDS, len(KINDS)), key=lambda kind: report.kills.get(kind, 0))  # all of them come up
    moment = rng.choice(moments)
    wanted: Callable[[], bool] = {
        "any time": lambda: True,
        "checkpoint": _once(lambda: _is_saving(start.out), after=rng.randrange(4)),
        "results": lambda: (start.out / "model").exists(),
    }[moment]
    delay = rng.uniform(0, {"any time": seconds, "checkpoint": rng.choice([0.005, 0.02]), "results": 0.4}[moment])
    while not wanted():
        if start.is_over():
            return False
        time.sleep(0.0005)
    time.sleep(delay)
    workers = [pid for pid in members(start.pid) if pid != start.pid]
    if start.is_over() or (kind == "worker -9" and not workers):
        return False
    victim = rng.choice(workers) if kind == "worker -9" else start.pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGTERM if kind == "launcher TERM" else signal.SIGKILL)
    if start.end() == 0:
        return False
    report.count(kind, _place(start.out))
    return True


def _is_saving(out: Path) -> bool:
    # not Path.glob, which raises when a folder goes as it looks into it: the run may be at its end
    found = glob.glob(str(out / "checkpoints" / "*" / "checkpoint-*"))
    return any(not (Path(path) / checkpoints.COMPLETE).exists() for path in found)


def _once(condition: Callable[[], bool], after: int) -> Callable[[], bool]:
    """`condition`, once it has become true `after` times before: not always the first save is to be hit."""
    seen, was = 0, False

    def check() -> bool:
        nonlocal seen, was
        now = condition()
        seen, was = seen + (now and not was), now
        return now and seen > after

    return check


def _place(out: Path) -> str:
    """Where the run was when it was killed, by what it left."""
    if _is_saving(out):
        return SAVE
    if (out / "model").exists():
        return "after training"
    return "between saves" if list(out.glob("checkpoints/*/checkpoint-*")) else "before the first save"


def chains(
    config: dict[str, Any], folder: Path, *, seed: int, kills: int, expected: tuple[Any, ...], seconds: float
) -> Report:
    """Runs that are killed again and again and started again until they end, `kills` kills in all.

    At least a quarter of them during a save. Asserts after each kill that nothing is left half or running, and after
    each run that its numbers are `expected`.
    """
    report, rng = Report(), random.Random(seed)
    while (short := report.total < kills) or report.places.get(SAVE, 0) < kills / 4:
        moments = MOMENTS if short else ("checkpoint",)
        out = folder / f"run-{report.runs}"
        planned = rng.randint(2, 7)  # kills of this run at most; the last start is left alone
        for number in range(planned + 1):
            start = Start(config, out)
            report.starts += 1
            if number < planned and kill_once(start, rng, seconds, report, moments):
                assert_absent_or_complete(out)
                (folder / "report").write_text(f"{report}\n")  # of a soak that is still going on
                continue
            code = start.end()
            assert code == 0, start.text()[-3000:]
            break
        assert numbers(out) == expected, f"{out}: {start.text()[-3000:]}"
        report.runs += 1
    return report
