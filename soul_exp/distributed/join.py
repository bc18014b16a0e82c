"""Workers that a launcher has started: rank 0 checks, prepares and tunes; the others wait until it gives them work.

They meet in a store: under torchrun the agent's, under SLURM one that rank 0 serves. It holds the plan (what to run),
then the process group, then how the work ended. A rank that fails ends all of them, whatever they are waiting for.
"""

import contextlib
import functools
import json
import logging
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from soul_exp.distributed import interrupts, ranks
from soul_exp.distributed.environment import LaunchEnvironment, launch_environment, launch_variables
from soul_exp.distributed.output import QUIET, rank_log, silence_libraries
from soul_exp.distributed.processes import group_variables, waiting_for_slurm, worker_error
from soul_exp.errors import UsageError

MEETING_TIMEOUT = timedelta(minutes=5)  # until every process has connected to the store
FOR_EVER = timedelta(days=1000)
POLL_SECONDS = 0.3
NOTICE_SECONDS = 3.0  # a failed rank waits so long: rank 0 reports it before the launcher ends everything
RELEASE_SECONDS = 60.0  # rank 0 waits at most so long until the others know that the work is over
PLAN, END, LEFT = "plan", "end", "left"
NOTHING = b"nothing"  # a plan


class WorkerGroup:
    """All workers of this run, this process being one of them: `rank` of `size`, started by `launcher`."""

    def __init__(self, environment: LaunchEnvironment) -> None:
        self.environment, self.launcher = environment, environment.launcher
        self.rank, self.size = environment.rank, environment.num_processes
        self.report_failure: Callable[[str], None] = print  # rank 0 calls it when another rank fails
        self.logs, self.exit_code = Path(), 1
        self.store = _store(environment, serve=environment.serves_store)
        self.watcher = threading.Thread(target=self._watch, args=(_store(environment, serve=False),), daemon=True)
        self.watcher.start()

    def run_on_all(self, function: Callable[..., Any], *args: Any, compute: Mapping[str, Any], logs: Path) -> Any:
        """Run `function(rank, *args)` in every process at once; rank 0 calls it, and gets its own value."""
        plan = (function, args, dict(compute), logs)
        self.store.set(PLAN, pickle.dumps(plan))  # type: ignore[arg-type] # bytes are taken as they are
        return self._work(*plan)

    def wait_for_work(self) -> int:
        """Wait for rank 0's plan, for days if necessary, and run it; returns the exit code. Ranks above 0 call it."""
        with contextlib.suppress(RuntimeError):  # rank 0 has died, and the store with it
            while not self.store.check([PLAN]):
                interrupts.safe_point()
                time.sleep(POLL_SECONDS)
            if (plan := self.store.get(PLAN)) != NOTHING:
                with contextlib.suppress(Exception):  # it is in this rank's log, and rank 0 reports it
                    self._work(*pickle.loads(plan))
        self.watcher.join()
        return self.exit_code

    def release(self, code: int, wait: bool = True) -> None:
        """Let the other ranks end with the exit code `code`, and `wait` until they know it; rank 0 calls it."""
        with contextlib.suppress(RuntimeError):  # the store may be gone, and the others with it
            self.store.compare_set(PLAN, "", NOTHING.decode())
            self._end(code, "" if wait else "interrupted")  # without rank 0 the others cannot finish a plan
            deadline = time.monotonic() + RELEASE_SECONDS
            while wait and self.store.add(LEFT, 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def _work(self, function: Callable[..., Any], args: tuple[Any, ...], compute: Mapping[str, Any], logs: Path) -> Any:
        self.logs = logs
        os.environ["OMP_NUM_THREADS"] = str(compute["threads"])
        level = logging.getLogger().level if self.rank == 0 else logging.INFO
        try:
            with rank_log(logs, self.rank, level), waiting_for_slurm():
                silence_libraries()
                if self.size > 1 or compute["deepspeed"]:
                    self._form_process_group(compute["device"])
                else:
                    for name in launch_variables():
                        del os.environ[name]
                returned = function(self.rank, *args)
                ranks.leave_group()
                return returned
        except Exception:
            with contextlib.suppress(RuntimeError):
                self._end(1, traceback.format_exc())
                if self.rank > 0:
                    time.sleep(NOTICE_SECONDS)
            raise

    def _form_process_group(self, device: str) -> None:
        local_rank = self.environment.local_rank
        if device == "cuda":
            local_rank %= torch.cuda.device_count()  # SLURM may show each task its own GPU only
            torch.cuda.set_device(local_rank)
        where = (self.environment.host, self.environment.port)
        os.environ.update(group_variables(self.rank, local_rank, self.size, *where))  # DeepSpeed and accelerate read it
        ranks.start_group(device, store=dist.PrefixStore("group", self.store), rank=self.rank, world_size=self.size)

    def _end(self, code: int, text: str) -> None:
        """Say how the work ended, unless another rank has: then this rank's failure follows from it, and it ends."""
        said = self.store.compare_set(END, "", json.dumps({"rank": self.rank, "code": code, "text": text}))
        if json.loads(said)["rank"] != self.rank:
            self.watcher.join()

    def _watch(self, store: dist.Store) -> None:
        """Wait for the end; after a failure end this process, whose main thread may be in an endless collective."""
        try:
            store.wait([END], FOR_EVER)
            end = json.loads(store.get(END))
            self.exit_code = end["code"]
            if end["rank"] == self.rank:
                return
            store.add(LEFT, 1)
        except RuntimeError:  # rank 0 has died: the launcher reports it
            os._exit(1)
        if end["text"]:
            if self.rank == 0:
                self.report_failure(str(worker_error(end["text"].strip(), end["rank"], self.size, self.logs)))
            else:
                time.sleep(NOTICE_SECONDS)
            os._exit(1)


@functools.cache
def worker_group() -> WorkerGroup | None:
    """The group of this process, which connects once; None if no launcher has started it."""
    environment = launch_environment()
    if environment is None:
        return None
    if environment.launcher == "torchrun":
        interrupts.die_with_parent(os.getppid())  # a killed agent ends no worker
    os.environ.update(QUIET)
    return WorkerGroup(environment)


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
