"""One pass over memory for every elementwise rule: the same update in plain torch, in C and in Triton.

A kernel is a module: `obstacle(batch)` is why it cannot update these tensors, or None, and `update(...)` applies a rule
to them and adds to the [8] sums of STATISTICS. fp32 results agree bit for bit: each operation is one IEEE rounding.
"""

import functools
import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

log = logging.getLogger(__name__)

STATISTICS = (
    "won",  # |m| < rho B h, strictly; 0 for rules that do not clip
    "untouched",  # m and h (where there is one) both 0
    "total",  # coordinates
    "changed",  # the stored weight differs, bit for bit
    "sum_m2",
    "sum_h2",
    "sum_dw2",  # (w_new - w_old)^2 of the stored weights
    "nonfinite",  # coordinates left as they are; they count here and in total, nowhere else
)
RULES = ("refresh", "refresh_squared", "sophia", "sophia_refresh", "signum", "lion", "adamw")
REFRESHES = ("refresh", "refresh_squared")  # these change h and nothing else
SQUARING = ("refresh_squared", "sophia_refresh", "adamw")  # here g^2 has to be finite, not only g
CLIPPING = ("sophia", "sophia_refresh")
ROUNDINGS = ("nearest", "master", "kahan", "stochastic")
MODULES = {"plain": "plain", "cpu": "cpu", "triton": "cuda"}  # kernel -> its module, imported when it is used


class Numbers(NamedTuple):
    """The constants of one update, rounded to the arithmetic's precision on arrival."""

    lr: float
    decay: float  # 1 - lr * weight_decay
    beta1: float
    rest1: float  # 1 - beta1
    beta2: float
    rest2: float  # 1 - beta2
    scale: float  # sophia: rho B; adamw: 1 / sqrt(1 - beta2^step)
    eps: float


class Operands(NamedTuple):
    """The tensors that one update reads and writes, of equal shape; None where the rule does not use one."""

    grad: Tensor
    weight: Tensor | None = None
    m: Tensor | None = None
    h: Tensor | None = None
    spare: Tensor | None = None  # the fp32 master weight, or kahan's compensation
    key: int = 0  # 64 bits that select the noise of stochastic rounding

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.grad, self.weight, self.m, self.h, self.spare) if t is not None]


def unsuitable(batch: Sequence[Operands], device: str, on_device: Callable[[Tensor], bool]) -> str | None:
    """Why contiguous float32 and bfloat16 tensors of `device` are not what `batch` holds, None if they are."""
    for column in list(zip(*batch, strict=True))[:5]:  # all gradients, all weights and so on
        first = column[0]
        if first is None:  # the rule does not use these
            continue
        if not on_device(first):
            return f"it takes tensors of {device}, not of {first.device.type}"
        if first.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, not {first.dtype}"
        if not all(map(Tensor.is_contiguous, column)):
            return "a tensor is not contiguous"
    return None


class Kernel(Protocol):
    def obstacle(self, batch: Sequence[Operands]) -> str | None: ...

    def update(
        self, rule: str, numbers: Numbers, batch: Sequence[Operands], rounding: str, statistics: Tensor, counting: bool
    ) -> None: ...


def key_of(*parts: int) -> int:
    """64 bits that depend on every one of `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def choose(batch: Sequence[Operands]) -> list[tuple[Kernel, Sequence[Operands]]]:
    """The fastest kernel for each of `batch`, all of one dtype and device; RuntimeError if SOUL_EXP_KERNELS cannot."""
    forced = os.environ.get("SOUL_EXP_KERNELS", "")
    name = forced or ("triton" if batch[0].grad.is_cuda else "cpu")
    reason = _missing(name) or _kernel(name).obstacle(batch)
    if reason is None:
        return [(_kernel(name), batch)]
    if forced:
        raise RuntimeError(f"SOUL_EXP_KERNELS={forced}: {reason}; unset it, or set it to plain")
    if len(batch) > 1:  # one unusual tensor does not slow the others
        return [chosen for operands in batch for chosen in choose([operands])]
    _log_once(name, reason)
    return [(_kernel("plain"), batch)]


@functools.cache
def _missing(name: str) -> str | None:
    return "triton is not installed" if name == "triton" and importlib.util.find_spec("triton") is None else None


@functools.cache
def _kernel(name: str) -> Kernel:
    if name not in MODULES:
        raise RuntimeError(f"SOUL_EXP_KERNELS={name} is unknown: choose plain, cpu or triton, or unset it")
    return cast(Kernel, importlib.import_module(f".{MODULES[name]}", __name__))


@functools.cache
def _log_once(name: str, reason: str) -> None:
    log.info("optimizer steps in plain torch instead of the %s kernel: %s", name, reason)
