"""Workers that a launcher has started: rank 0 checks, prepares and tunes; the others wait until it gives them work.

They meet in a store: under torchrun the agent's, under SLURM one that rank 0 serves. It holds the plan (what to run),
then the process group, then the first failure: a rank that fails ends all of them, whatever they are waiting for.
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

from soul_exp.distributed import interrupts, ranks
from soul_exp.distributed.environment import LaunchEnvironment, launch_environment, launch_variables
from soul_exp.distributed.output import QUIET, rank_log, silence_libraries
from soul_exp.distributed.processes import die_with_parent, waiting_for_slurm, worker_error
from soul_exp.errors import UsageError

log = logging.getLogger(__name__)

MEETING_TIMEOUT = timedelta(minutes=5)  # until every process has connected to the store
POLL_SECONDS = 0.3
NOTICE_SECONDS = 3.0  # a failed rank waits so long: rank 0 reports it before the launcher ends everything
RELEASE_SECONDS = 60.0  # rank 0 waits at most so long until the others have read its last message
PLAN, FAILED, DONE = "plan", "failed", "done"
STOP = b"stop"


@dataclass(frozen=True)
class WorkerGroup:
    """All workers of this run, this process being one of them."""

    environment: LaunchEnvironment
    store: dist.Store
    report_failure: Callable[[str], None] = print  # rank 0 calls it when another rank fails

    @property
    def rank(self) -> int:
        return self.environment.rank

    @property
    def size(self) -> int:
        return self.environment.num_processes

    @property
    def launcher(self) -> str:
        return self.environment.launcher

    def run_on_all(self, function: Callable[..., Any], *args: Any, compute: Mapping[str, Any], logs: Path) -> Any:
        """Run `function(rank, *args)` in every process at once; rank 0 calls it, and gets its own value."""
        plan = (function, args, dict(compute), str(logs))
        self.store.set(PLAN, pickle.dumps(plan))  # type: ignore[arg-type] # bytes are taken as they are
        return _work(self, *plan)

    def release(self, failed: bool, interrupted: bool = False) -> None:
        """Tell the other ranks that no work is left; rank 0 calls it and, unless interrupted, waits until they know."""
        with contextlib.suppress(RuntimeError):  # the store may be gone, and the others with it
            self.store.compare_set(PLAN, "", (STOP + str(int(failed)).encode()).decode())
            if interrupted:  # the others cannot finish a plan without rank 0
                self.store.compare_set(FAILED, "", json.dumps({"rank": self.rank, "text": "interrupted"}))
                return
            deadline = time.monotonic() + RELEASE_SECONDS
            while self.store.add(DONE, 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def wait_for_work(self) -> int:
        """Wait for rank 0's plan, for days if necessary, and run it; returns the exit code. Ranks above 0 call it."""
        try:
            while not self.store.check([PLAN]):
                interrupts.safe_point()
                time.sleep(POLL_SECONDS)
            plan = self.store.get(PLAN)
        except RuntimeError:  # rank 0 has died, and the store with it: the launcher reports it
            return 1
        try:
            if plan.startswith(STOP):
                return int(plan[len(STOP) :])
            _work(self, *pickle.loads(plan))
            return 0
        except Exception:  # it is in this rank's log, and rank 0 reports it
            return 1
        finally:
            with contextlib.suppress(RuntimeError):
                self.store.add(DONE, 1)


@functools.cache
def worker_group() -> WorkerGroup | None:
    """The group of this process, which connects once; None if no launcher has started it."""
    environment = launch_environment()
    if environment is None:
        return None
    if environment.launcher == "torchrun":
        die_with_parent(os.getppid())  # a killed agent ends no worker
    os.environ.update(QUIET)
    return WorkerGroup(environment, _store(environment, serve=environment.serves_store))


def _work(
    group: WorkerGroup, function: Callable[..., Any], args: tuple[Any, ...], compute: Mapping[str, Any], logs: str
) -> Any:
    os.environ["OMP_NUM_THREADS"] = str(compute["threads"])
    level = logging.getLogger().level if group.rank == 0 else logging.INFO
    with _watching(group, Path(logs)), rank_log(Path(logs), group.rank, level), waiting_for_slurm():
        silence_libraries()
        if group.size > 1 or compute["deepspeed"]:
            _form_process_group(group, compute["device"])
        else:
            for name in launch_variables():
                del os.environ[name]
        returned = function(group.rank, *args)
        ranks.leave_group()
        return returned


def _form_process_group(group: WorkerGroup, device: str) -> None:
    local_rank = group.environment.local_rank
    if device == "cuda":
        local_rank %= torch.cuda.device_count()  # SLURM may show each task its own GPU only
        torch.cuda.set_device(local_rank)
    variables: dict[str, Any] = {"RANK": group.rank, "WORLD_SIZE": group.size, "LOCAL_RANK": local_rank}
    variables |= {"MASTER_ADDR": group.environment.host, "MASTER_PORT": group.environment.port}
    os.environ.update({name: str(value) for name, value in variables.items()})  # accelerate and DeepSpeed read them
    ranks.start_group(device, store=dist.PrefixStore("group", group.store), rank=group.rank, world_size=group.size)


@contextlib.contextmanager
def _watching(group: WorkerGroup, logs: Path) -> Iterator[None]:
    """In the block, this process ends when another one fails, even in a collective, and the others when it fails."""
    over = threading.Event()
    store = _store(group.environment, serve=False)
    watcher = threading.Thread(target=_watch, args=(group, store, logs, over), daemon=True)
    watcher.start()
    try:
        yield
    except Exception:
        failure = json.dumps({"rank": group.rank, "text": traceback.format_exc()})
        with contextlib.suppress(RuntimeError):
            first = group.store.compare_set(FAILED, "", failure).decode()
            if json.loads(first)["rank"] != group.rank:  # this failure follows from the other's
                watcher.join()  # which does not return
            if group.rank > 0:
                time.sleep(NOTICE_SECONDS)
        raise
    finally:
        over.set()
        watcher.join()


def _watch(group: WorkerGroup, store: dist.Store, logs: Path, over: threading.Event) -> None:
    while not over.wait(POLL_SECONDS):
        try:
            if not store.check([FAILED]):
                continue
            failure = json.loads(store.get(FAILED))
        except RuntimeError:  # rank 0 has died
            os._exit(1)
        if failure["rank"] == group.rank:
            return
        if group.rank == 0:
            group.report_failure(str(worker_error(failure["text"].strip(), failure["rank"], group.size, logs)))
        else:
            with contextlib.suppress(RuntimeError):
                store.add(DONE, 1)
            time.sleep(NOTICE_SECONDS)
        os._exit(1)  # the main thread may be inside a collective that never ends


def _store(environment: LaunchEnvironment, serve: bool) -> dist.Store:
    try:
        store = dist.TCPStore(
            environment.host, environment.port, is_master=serve, timeout=MEETING_TIMEOUT, wait_for_workers=False
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"rank {environment.rank} of {environment.num_processes}, started by {environment.launcher}, cannot reach "
            f"the others at {environment.host}:{environment.port} ({reason}): export MASTER_ADDR=<the first node> and "
            f"MASTER_PORT=<a free port>"
        ) from error
    return dist.PrefixStore(f"soul_exp/{environment.store_prefix}", store)
