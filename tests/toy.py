"""The command line with a toy in place of a run: `python toy.py WORK PROCESSES`, where WORK is a function below."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from soul_exp import cli
from soul_exp.distributed.processes import launch
from soul_exp.errors import UnreachableError, UsageError


def _together() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))


def add(rank: int) -> float:
    _together()
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    print(f"rank {rank} has {total.item():g}", flush=True)
    return total.item()


def last_raises(rank: int) -> None:
    """... while rank 0 is inside a collective."""
    _together()
    if rank == dist.get_world_size() - 1:
        raise ArithmeticError("of the last rank")
    dist.all_reduce(torch.ones(1))


def last_is_killed(rank: int) -> None:
    _together()
    if rank == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def sleep(rank: int) -> None:
    """For ever, rank 0 inside a collective where there are several."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        _together()
    Path(f"asleep{rank}").write_text(f"{os.getpid()} {os.getppid()}")
    if several and rank == 0:
        dist.all_reduce(torch.ones(1))
    time.sleep(600)


def nap(rank: int, seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def sleep_alone(rank: int) -> None:
    sleep(rank)


def interrupt_itself(rank: int) -> None:
    """torch's wrapper takes a KeyboardInterrupt for a success."""
    raise KeyboardInterrupt


def exit_with_0(rank: int) -> None:
    sys.exit(0)


def refuse(rank: int) -> None:
    raise UsageError("a sentence for the user")


def reach_nothing(rank: int) -> None:
    raise UnreachableError("a sentence for the user")


def job(_: Any, workers: Any = None) -> None:
    work, processes = globals()[WORK], int(PROCESSES)
    logs = Path("ranks/toy").absolute()
    if WORK == "refuse":
        refuse(0)
    logging.getLogger().handlers[-1].begin(logs.parents[1] / "toy.log")  # a run whose work fails has begun
    if workers is not None:
        workers.run_on_all(work, compute={"threads": 1, "device": "cpu", "deepspeed": None}, logs=logs)
    else:
        print(launch(work, processes=processes, threads=1, logs=logs, alone=WORK == "sleep_alone" or processes == 1))


if __name__ == "__main__":
    WORK, PROCESSES = sys.argv[1:3]
    del sys.argv[1:3]
    cli.job = job
    cli.main()
