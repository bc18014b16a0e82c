"""The C kernel (cpu.c): compiled at first use by the system's C compiler, kept in the user's cache folder."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from . import ROUNDINGS, RULES, STATISTICS, Numbers, Operands, unsuitable

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = [
    *("-O3", "-march=native", "-shared", "-fPIC"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),  # vector code, every operation rounded by IEEE
    "-fopenmp-simd",  # pragmas only: no OpenMP runtime
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
]
SMALL = 1 << 16  # coordinates below which a second thread costs more than it saves
ALIGNED = 64  # coordinates: threads meet at cache lines
COLUMNS = 7  # of the table that cpu.c calls Operands


class Pass(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int) for name in "rule rounding grad_bf16 weight_bf16 m_bf16 h_bf16 counting".split()
    ] + [(name, ctypes.c_float) for name in Numbers._fields]


def obstacle(batch: Sequence[Operands]) -> str | None:
    """Why the C kernel cannot update these tensors, None if it can."""
    return unsuitable(batch, "the CPU", lambda t: t.is_cpu) or _library()[1]


def update(
    rule: str, numbers: Numbers, batch: Sequence[Operands], rounding: str, statistics: Tensor, counting: bool
) -> None:
    """plain.update for tensors of equal dtypes, in torch.get_num_threads() threads and in one pass over memory."""
    library, reason = _library()
    assert library is not None, reason
    first = batch[0]
    bf16 = [t is not None and t.dtype == torch.bfloat16 for t in (first.grad, first.weight, first.m, first.h)]
    work = Pass(RULES.index(rule), ROUNDINGS.index(rounding), *bf16, counting, *numbers)
    sizes = [o.grad.numel() for o in batch]
    rows = [0] * (COLUMNS * len(batch))
    for number, column in enumerate(list(zip(*batch, strict=True))[:5]):
        if column[0] is not None:
            rows[number::COLUMNS] = map(Tensor.data_ptr, column)
    rows[5::COLUMNS], rows[6::COLUMNS] = sizes, [o.key for o in batch]
    table = (ctypes.c_uint64 * len(rows))(*rows)
    total = sum(sizes)

    def share(begin: int, end: int) -> list[float]:
        sums = (ctypes.c_double * len(STATISTICS))()
        library.update(ctypes.byref(work), table, begin, end, sums)
        return list(sums)

    threads = max(1, min(torch.get_num_threads(), total // SMALL))
    cuts = [total * i // threads // ALIGNED * ALIGNED for i in range(threads)] + [total]
    if threads == 1:
        shares = [share(0, total)] if total else []
    else:
        shares = list(_pool(os.getpid(), threads).map(share, cuts, cuts[1:]))
    for sums in shares:
        statistics += torch.tensor(sums, dtype=torch.float64)


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """`process` is part of the key because a forked child inherits the pool but not its threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="soul_exp-optim")


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled kernel, or None and the reason why there is none."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    command = [compiler or "cc", *FLAGS]
    key = hashlib.sha256(repr((command, _processor())).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    name = f"cpu-{key}{sysconfig.get_config_var('SHLIB_SUFFIX')}"
    with _cache_folder() as folder:
        if not (folder / name).exists():
            if compiler is None:
                return None, "no C compiler (cc, gcc or clang) was found"
            start, part = time.perf_counter(), folder / f"{name}.{platform.node()}.{os.getpid()}"
            done = subprocess.run([*command, str(SOURCE), "-o", str(part), "-lm"], capture_output=True, text=True)
            if done.returncode:
                return None, f"the C compiler failed: {' '.join(done.stderr.split())[:300]}"
            part.replace(folder / name)  # in one step: another process may compile it too
            log.info("compiled the optimizer kernel in %.1f s: %s", time.perf_counter() - start, folder / name)
        try:
            library = ctypes.CDLL(str(folder / name))
        except OSError as error:
            return None, f"the compiled kernel does not load: {error}"
    library.update.restype = None
    library.update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    return library, None


@contextmanager
def _cache_folder() -> Iterator[Path]:
    """The user's cache folder, or for this process alone a temporary one if that cannot be written to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "soul_exp"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.access(folder, os.W_OK):
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="soul_exp-") as temporary:
            yield Path(temporary)


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines that differ."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = [line for line in text.splitlines() if line.startswith(wanted)]
    return f"{platform.machine()} {' '.join(sorted(set(lines)))}"
