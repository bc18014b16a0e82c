"""How long it takes until work begins, side by side with an older checkout: `start.py OLD [--repeats 3]`.

OLD is a checkout of the commit to compare with, for instance made by `git worktree add --detach ../old COMMIT`. Both
run with this interpreter and take turns. Measured, in wall-clock and, of all its processes, CPU seconds:

- import: `import soul_exp.experiment` in a new process;
- worker: the first and the second call of `launch` in a process, each of one worker that does nothing;
- main job: `python -m soul_exp` with its models and their answers in the cache;
- sweep: a job after the first, where each takes one training step.

Nothing is asserted. Work beside it disturbs wall-clock seconds most: read the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

NEW = Path(__file__).resolve().parents[1]
ONE_STEP = ("train.max_steps=1", "evaluate.max_new_tokens=1", "utility_suite=none", "save=none")
JOBS = 4  # of a sweep
WORKERS = """
import tempfile, time
from pathlib import Path
from soul_exp.distributed.processes import launch

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            start = time.perf_counter()
            launch(abs, processes=1, threads=1, logs=Path(folder), alone=True)
            print(time.perf_counter() - start)
"""


class Seconds(NamedTuple):
    wall: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: the processes of a command that has ended come to this one
    taken: dict[str, dict[str, list[Seconds]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {"old": options.old.resolve(), "new": NEW}
        for name, checkout in checkouts.items():  # fills the caches
            run(checkout, Path(folder) / name, "-m", "soul_exp", "name=first")
        for turn in tqdm(range(options.repeats), desc="turns"):
            for name, checkout in checkouts.items():
                measure(checkout, Path(folder) / name, turn, taken[name])
    print(f"{'':<28}{'old: wall':>10}{'CPU':>8}{'new: wall':>11}{'CPU':>8}{'ratio: wall':>13}{'CPU':>7}")
    for what in taken["old"]:
        old, new = (Seconds(*map(statistics.median, zip(*taken[name][what], strict=True))) for name in ("old", "new"))
        ratios = [n / o if o else float("nan") for n, o in zip(new, old, strict=True)]
        print(
            f"{what:<28}{old.wall:>10.2f}{old.cpu:>8.2f}{new.wall:>11.2f}{new.cpu:>8.2f}{ratios[0]:>13.2f}{ratios[1]:>7.2f}"
        )


def measure(checkout: Path, place: Path, turn: int, taken: dict[str, list[Seconds]]) -> None:
    """One turn of every measurement with the code of `checkout`, in the folder `place`."""
    taken["import"].append(run(checkout, place, "-c", "import soul_exp.experiment")[0])
    (place / "workers.py").write_text(WORKERS)
    _, printed = run(checkout, place, "workers.py")
    for what, seconds in zip(("first worker", "second worker"), printed.split(), strict=True):
        taken[what].append(Seconds(float(seconds), float("nan")))
    taken["main job, warm cache"].append(run(checkout, place, "-m", "soul_exp", f"name=main-{turn}")[0])
    sweep = [*ONE_STEP, "-m", "seed=0"]
    one = run(checkout, place, "-m", "soul_exp", *sweep, f"name=one-{turn}")[0]
    sweep[-1] = "seed=" + ",".join(map(str, range(JOBS)))
    several = run(checkout, place, "-m", "soul_exp", *sweep, f"name=several-{turn}")[0]
    each = [(all_ - first) / (JOBS - 1) for all_, first in zip(several, one, strict=True)]
    taken["a further job of a sweep"].append(Seconds(*each))


def run(checkout: Path, place: Path, *arguments: str) -> tuple[Seconds, str]:
    """The seconds of this interpreter with these arguments and the code of `checkout`, and what it printed."""
    place.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "SOUL_EXP_CACHE": str(place / "cache")}
    before, start = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=place, env=environment, text=True, capture_output=True)
    wall = time.perf_counter() - start
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()  # for the fork server, which ends after the command
    after = os.times()
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Seconds(wall, cpu), done.stdout


if __name__ == "__main__":
    main()
