"""How a worker process begins and ends: threads, seeds, device, process group; its hardware; the memory it held."""

import os
import platform
import resource
import sys
from pathlib import Path

import torch
from transformers import set_seed

from soul_exp import compat
from soul_exp.distributed import ranks
from soul_exp.errors import counted
from soul_exp.models import attention
from soul_exp.run import Compute


def start_process(compute: Compute, rank: int, *, seed: int, attention_kernel: str) -> str:
    """Threads, seeds, device and, where there are several ranks, their process group; returns the device."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    set_seed(seed)
    attention.choose_kernel(attention_kernel)
    device = "cpu"
    if compute.device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    if compute.deepspeed:
        compat.skip_shared_memory_operator()
    if compute.processes > 1:
        ranks.start_group(device)
    return device


def end_process() -> None:
    """Leave the process group, where there is one, together."""
    ranks.barrier()
    ranks.leave_group()


def hardware(device: str) -> str:
    """The name of the device; of a CPU its model, as the kernel states it, its instructions and the number of cores.

    Two machines may state the same model and yet run other kernels of torch, which round otherwise.
    """
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    stated = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in stated.splitlines() if line.startswith("model name")]
    name = (names or [platform.processor() or platform.machine()])[0]
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {counted(os.cpu_count() or 1, 'core')}"


def peak_memory_gib(device: str) -> float:
    """The most memory that this process has held, in GiB: of the device, or resident on the CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
