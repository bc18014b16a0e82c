"""What the fork server imports, once, before any worker is forked from it; imported nowhere else."""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import re
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import soul_exp
from soul_exp import compat, results
from soul_exp.distributed import interrupts, server
from soul_exp.distributed.output import silence_libraries
from soul_exp.errors import first_line

SURVIVE = re.compile(r"jemalloc_bg_thd|cuda\d+|")  # what a fork leaves out: pyarrow's allocator, NVML; "" has ended
NOT_INITIALIZED = 3  # what the CUDA driver answers in a process whose parent had initialized it
SECONDS = 5  # for the threads of an import to end


def fault() -> str | None:
    """Import everything; why no worker may be forked from this process, None if nothing is wrong."""
    if soul_exp.__file__ != PACKAGE:
        return f"it has imported {soul_exp.__file__}, not {PACKAGE}"
    silence_libraries()
    for name in server.modules():
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}.")
            if absent and name in (*server.MODULES, server.ZERO):
                continue  # another version of the library has no such module, so no worker needs it
            return f"{name} cannot be imported: {first_line(error)}"
    compat.remove_empty_inductor_cache()
    if "transformers.models.llama.modeling_llama" in sys.modules:
        _read_a_model()
    for thread in set(threading.enumerate()) - {threading.current_thread()}:
        thread.join(SECONDS)
    names = [_name(task) for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    if unknown := sorted(name for name in names if not SURVIVE.fullmatch(name)):
        return f"importing has started threads that do not survive a fork: {', '.join(unknown)}"
    return None


def fault_in_worker() -> str | None:
    """Why a process that the server has forked must not go on, None if nothing is wrong; the first one asks."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver, no CUDA
        return None
    if driver.cuInit(0) == NOT_INITIALIZED:
        return "importing has initialized CUDA, which does not survive a fork"
    return None


def _read_a_model() -> None:
    """Let transformers work out what it works out once, when a process first writes and reads a model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    silence_libraries()
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(folder)
        LlamaForCausalLM.from_pretrained(folder)


def _name(task: Path) -> str:
    """The name of a thread; empty if it has ended."""
    with contextlib.suppress(FileNotFoundError):
        return (task / "comm").read_text().strip()
    return ""


_pid, PACKAGE, sys.path[:] = json.loads(os.environ.pop(server.LAUNCHER))
interrupts.die_with_parent(_pid)  # of itself it would notice only after its import and its last worker
BEFORE = dict(os.environ)
gc.disable()  # what modules consist of stays: to look at it again and again is a quarter of the time of importing
FAULT = fault()
ADDED = {name: value for name, value in os.environ.items() if name not in BEFORE}  # by libraries
results.commit()  # of the code that is loaded now, whatever is checked out while it runs
TEMPORARY = [made.name for made in gc.get_objects() if isinstance(made, tempfile.TemporaryDirectory)]
PID = os.getpid()  # of the server, the parent of its workers
gc.freeze()  # the collections of a worker look at its own objects only, and leave these pages shared
gc.enable()
atexit.register(os._exit, 0)  # the server; a worker ends without
