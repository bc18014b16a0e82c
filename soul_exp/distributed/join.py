"""Work with workers that exist already: rank 0 leads (checks, prepares, tunes), the others wait for what it hands them.

They meet in a store: under torchrun the agent's, under SLURM one that rank 0 serves. It holds the plan, then the
process group, then who failed first: a rank that fails ends all of them, whatever they are waiting for.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from soul_exp.distributed import interrupts
from soul_exp.distributed.environment import World, found, outer_variables
from soul_exp.distributed.processes import QUIET, die_with, quieten, rank_log, told, uninterrupted
from soul_exp.errors import UsageError

log = logging.getLogger(__name__)

MEET = timedelta(minutes=5)  # until every process has found the store
POLL_SECONDS = 0.3
NOTICE_SECONDS = 3.0  # a failed rank stays so long, so that rank 0 can tell it before the launcher ends everything
FAREWELL_SECONDS = 60.0  # rank 0 waits so long for the others to have read its last word
PLAN, FAILED, DONE = "plan", "failed", "done"
STOP = b"stop"


@dataclass(frozen=True)
class Crew:
    """All workers of this run, this one among them."""

    world: World
    store: dist.Store
    tell: Callable[[str], None] = print  # rank 0 gives another rank's failure to the user

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def size(self) -> int:
        return self.world.size

    def lead(self, function: Callable[..., Any], *args: Any, compute: Mapping[str, Any], logs: Path) -> Any:
        """`function(rank, *args)` in every process of the crew at once; rank 0's value."""
        plan = (function, args, dict(compute), str(logs))
        self.store.set(PLAN, pickle.dumps(plan))  # type: ignore[arg-type] # bytes are taken as they are
        return _work(self, *plan)

    def dismiss(self, failed: bool, interrupted: bool = False) -> None:
        """Rank 0's last word: nothing (more) is to be done. Unless interrupted it waits until the others have heard."""
        with contextlib.suppress(RuntimeError):  # the store may be gone, and with it whoever would listen
            self.store.compare_set(PLAN, "", (STOP + str(int(failed)).encode()).decode())
            if interrupted:  # what they do with a plan, they cannot end without rank 0
                self.store.compare_set(FAILED, "", json.dumps({"rank": self.rank, "text": "interrupted"}))
                return
            deadline = time.monotonic() + FAREWELL_SECONDS
            while self.store.add(DONE, 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def follow(self) -> int:
        """What a rank above 0 does: wait for rank 0's plan, for days if need be, and carry it out. Its exit code."""
        try:
            while not self.store.check([PLAN]):
                interrupts.safe_point()
                time.sleep(POLL_SECONDS)
            plan = self.store.get(PLAN)
        except RuntimeError:  # rank 0 has died, and the store with it: whoever started us says so
            return 1
        try:
            if plan.startswith(STOP):
                return int(plan[len(STOP) :])
            _work(self, *pickle.loads(plan))
            return 0
        except Exception:  # it is in this rank's log, and rank 0 tells it
            return 1
        finally:
            with contextlib.suppress(RuntimeError):
                self.store.add(DONE, 1)


@functools.cache
def crew() -> Crew | None:
    """The crew of this process, met once; None if it is on its own."""
    world = found()
    if world is None:
        return None
    if world.by == "torchrun":
        die_with(os.getppid())  # the agent, killed, ends nothing by itself
    os.environ.update(QUIET)
    return Crew(world, _store(world, serve=world.serves))


def _work(
    crew: Crew, function: Callable[..., Any], args: tuple[Any, ...], compute: Mapping[str, Any], logs: str
) -> Any:
    os.environ["OMP_NUM_THREADS"] = str(compute["threads"])
    level = logging.getLogger().level if crew.rank == 0 else logging.INFO
    with _watching(crew, Path(logs)), rank_log(Path(logs), crew.rank, level), uninterrupted():
        quieten()
        if crew.size > 1 or compute["deepspeed"]:
            _form_group(crew, compute["device"])
        else:
            for name in outer_variables():
                del os.environ[name]
        returned = function(crew.rank, *args)
        if dist.is_initialized():  # left to the interpreter's end, its threads may abort the process
            dist.destroy_process_group()
        return returned


def _form_group(crew: Crew, device: str) -> None:
    local_rank = crew.world.local_rank
    if device == "cuda":
        local_rank %= torch.cuda.device_count()  # SLURM may show each task its own GPU only
        torch.cuda.set_device(local_rank)
    variables: dict[str, Any] = {"RANK": crew.rank, "WORLD_SIZE": crew.size, "LOCAL_RANK": local_rank}
    variables |= {"MASTER_ADDR": crew.world.host, "MASTER_PORT": crew.world.port}
    os.environ.update({name: str(value) for name, value in variables.items()})  # accelerate and DeepSpeed read them
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore("group", crew.store),
        rank=crew.rank,
        world_size=crew.size,
    )


@contextlib.contextmanager
def _watching(crew: Crew, logs: Path) -> Iterator[None]:
    """End this process when another fails, even inside a collective; tell the others when this one does."""
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(crew, _store(crew.world, serve=False), logs, over), daemon=True)
    watcher.start()
    try:
        yield
    except Exception:
        failure = json.dumps({"rank": crew.rank, "text": traceback.format_exc()})
        with contextlib.suppress(RuntimeError):
            first = crew.store.compare_set(FAILED, "", failure).decode()
            if json.loads(first)["rank"] != crew.rank:  # this failure is the other's consequence
                watcher.join()  # which does not return
            if crew.rank > 0:
                time.sleep(NOTICE_SECONDS)
        raise
    finally:
        over.set()
        watcher.join()


def _watch(crew: Crew, store: dist.Store, logs: Path, over: threading.Event) -> None:
    while not over.wait(POLL_SECONDS):
        try:
            if not store.check([FAILED]):
                continue
            failure = json.loads(store.get(FAILED))
        except RuntimeError:  # rank 0 has died
            os._exit(1)
        if failure["rank"] == crew.rank:
            return
        if crew.rank == 0:
            crew.tell(str(told(failure["text"].strip(), failure["rank"], crew.size, logs)))
        else:
            with contextlib.suppress(RuntimeError):
                store.add(DONE, 1)
            time.sleep(NOTICE_SECONDS)
        os._exit(1)  # the main thread may be inside a collective that never ends


def _store(world: World, serve: bool) -> dist.Store:
    try:
        store = dist.TCPStore(
            world.host, world.port, None, is_master=serve, timeout=MEET, wait_for_workers=False, multi_tenant=False
        )
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0]
        raise UsageError(
            f"rank {world.rank} of {world.size}, started by {world.by}, cannot meet the others at {world.host}:"
            f"{world.port} ({said}): export MASTER_ADDR=<the first node> and MASTER_PORT=<a free port>"
        ) from error
    return dist.PrefixStore(f"soul_exp/{world.prefix}", store)
