"""The C kernel (cpu.c): compiled at first use by the system's C compiler, kept in a cache folder of this user alone."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

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
PREFIX = "cpu-"  # of a compiled kernel's file name
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
    key = hashlib.sha256(repr((FLAGS, _processor())).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    own = _own_folder()
    reason = "no C compiler (cc, gcc or clang) was found"
    if own is not None and (library := _load(own, key)) is not None:
        return library, None
    if compiler := shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        with nullcontext(own) if own and os.access(own, os.W_OK) else TemporaryDirectory(prefix="soul_exp-") as folder:
            start, part = time.perf_counter(), Path(folder) / f".{key}.{platform.node()}.{os.getpid()}"
            done = subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(part), "-lm"], capture_output=True, text=True
            )
            reason = f"the C compiler failed: {' '.join(done.stderr.split())[:300]}"
            if done.returncode == 0:
                part.chmod(0o500)
                name = f"{PREFIX}{key}-{_digest(part.read_bytes())}{sysconfig.get_config_var('SHLIB_SUFFIX')}"
                part.replace(Path(folder) / name)  # in one step: another process may compile it too
                log.info("compiled the optimizer kernel in %.1f s: %s", time.perf_counter() - start, folder)
                library = _load(Path(folder), key)
                reason = f"the compiled kernel does not load; may {folder} hold programs (no noexec mount)?"
                return library, None if library is not None else reason
    return None, reason


def _own_folder() -> Path | None:
    """The folder of compiled kernels, which nobody but this user can change; None if there is none, and no home."""
    with suppress(OSError, RuntimeError):  # it is a file, or cannot be made; there is no home
        given = os.environ.get("XDG_CACHE_HOME", "")
        folder = (Path(given) if given.startswith("/") else Path.home() / ".cache") / "soul_exp" / "kernels"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
        if state.st_uid == os.geteuid():
            if state.st_mode & 0o077:
                folder.chmod(0o700)
            return folder
        log.warning("%s belongs to another user: the optimizer kernel is not loaded from there", folder)
    return None


def _load(folder: Path, key: str) -> ctypes.CDLL | None:
    """The kernel `key` in `folder`; a file that is damaged or that another user could have written is removed.

    Its name holds the checksum of its content. Linux loads the file that was read, whatever stands at its path by then.
    """
    for path in folder.glob(f"{PREFIX}{key}-*"):
        # an OSError: it is a link, or removed by another process; or the file system runs no code
        with suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            state = os.fstat(file.fileno())
            is_own = state.st_uid == os.geteuid() and not state.st_mode & 0o022
            if is_own and path.stem.endswith(f"-{_digest(file.read())}"):
                opened = f"/proc/self/fd/{file.fileno()}"
                library = ctypes.CDLL(opened if sys.platform == "linux" else str(path))
                library.update.restype = None
                pointer, number = ctypes.c_void_p, ctypes.c_int64
                library.update.argtypes = [pointer, pointer, number, number, pointer]
                return library
            log.warning("%s is damaged, or another user could have written it: it is not used", path)
            path.unlink()
    return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines that differ."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = [line for line in text.splitlines() if line.startswith(wanted)]
    return f"{platform.machine()} {' '.join(sorted(set(lines)))}"
