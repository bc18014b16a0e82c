"""What the fork server imports, once, before any worker is forked from it; imported nowhere else."""

import atexit
import contextlib
import gc
import importlib
import os
import threading
from pathlib import Path

from soul_exp import results
from soul_exp.distributed import interrupts, server
from soul_exp.distributed.output import say_where_deepspeed_runs
from soul_exp.errors import first_line

SURVIVE = {"jemalloc_bg_thd"}  # threads that a fork leaves out without harm: of pyarrow's allocator
SECONDS = 5  # for the threads of an import to end


def fault() -> str | None:
    """Import everything; why no worker may be forked from this process, None if nothing is wrong."""
    say_where_deepspeed_runs()
    for name in server.modules():
        try:
            importlib.import_module(name)
        except Exception as error:
            return f"{name} cannot be imported: {first_line(error)}"
    import torch

    if torch.cuda.is_initialized():
        return "importing has initialized CUDA, which does not survive a fork"
    for thread in set(threading.enumerate()) - {threading.current_thread()}:
        thread.join(SECONDS)
    names = [_name(task) for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    if unknown := sorted(set(names) - SURVIVE - {""}):
        return f"importing has started threads that do not survive a fork: {', '.join(unknown)}"
    return None


def _name(task: Path) -> str:
    """The name of a thread; empty if it has ended."""
    with contextlib.suppress(FileNotFoundError):
        return (task / "comm").read_text().strip()
    return ""


interrupts.die_with_parent(os.getppid())  # of itself it would notice only after its import and its last worker
BEFORE = dict(os.environ)
gc.disable()  # what modules consist of stays: to look at it again and again is a quarter of the time of importing
FAULT = fault()
ADDED = {name: value for name, value in os.environ.items() if name not in BEFORE}  # by libraries
results.commit()  # of the code that is loaded now, whatever is checked out while it runs
PID = os.getpid()  # of the server, the parent of its workers
gc.freeze()  # the collections of a worker look at its own objects only, and leave these pages shared
gc.enable()
atexit.register(os._exit, 0)  # the server; a worker ends without
