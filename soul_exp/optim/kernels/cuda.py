"""The Triton kernel: all tensors of a pass in one launch, for CUDA; held to plain.py bit for bit.

TRITON_INTERPRET=1 runs it on CPU tensors, slowly, for tests. A program updates BLOCK coordinates of one tensor, which
it finds through a table of addresses, one row of COLUMNS for each tensor: hundreds of small tensors cost one launch.
"""

# mypy: disable-error-code="no-untyped-def"
# (in a @triton.jit function an annotation is code for the device: constexpr is the only one that it may have)

import contextlib
import functools
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import CLIPPING, REFRESHES, SQUARING, STATISTICS, Numbers, Operands, unsuitable

BLOCK = 1024
COLUMNS = 7  # addresses of grad, weight, m, h and spare (0: none), number of coordinates, key
ALIGNED = 16  # bytes of an address, and coordinates of a tensor, that allow 16-byte loads


@triton.jit
def _mix(x):  # plain.mix
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _place(row, column: tl.constexpr, at, bf16: tl.constexpr, aligned: tl.constexpr):
    start = tl.load(row + column).to(tl.pointer_type(tl.uint16 if bf16 else tl.float32))
    if aligned:
        start = tl.multiple_of(start, 16)  # of the pointer: on the number it would be lost, and 16-byte loads with it
    return start + at


@triton.jit
def _read(place, inside, bf16: tl.constexpr):
    raw = tl.load(place, inside, other=0)
    return (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True) if bf16 else raw


@triton.jit
def _write(place, x, inside, bf16: tl.constexpr):
    """Stores fp32 `x`, which a bf16 tensor holds exactly after `_nearest`."""
    tl.store(place, (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16) if bf16 else x, inside)


@triton.jit
def _nearest(x, bf16: tl.constexpr):
    """fp32 `x` rounded to bf16, ties to even, by its bits: the interpreter's own cast truncates."""
    if bf16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        return x


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _pass(
    table,  # [tensors, COLUMNS] int64
    owners,  # [programs] int32: each program's tensor
    blocks,  # [programs] int32: which of its blocks
    statistics,  # [8] float64
    partial,  # [7, programs] float64, written when counting
    lr,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    scale,
    eps,
    limit,  # gradients are finite (and so are their squares, where needed) below it
    rule: tl.constexpr,
    rounding: tl.constexpr,
    grad_bf16: tl.constexpr,
    weight_bf16: tl.constexpr,
    m_bf16: tl.constexpr,
    h_bf16: tl.constexpr,
    has_m: tl.constexpr,
    has_h: tl.constexpr,
    clips: tl.constexpr,
    counting: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    program = tl.program_id(0)
    row = table + tl.load(owners + program) * 7
    size = tl.load(row + 5)
    if aligned:
        size = tl.multiple_of(size, 16)
    at = tl.load(blocks + program).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size

    # every load before the first store or reduction, so that all are on their way at once
    g = _read(_place(row, 0, at, grad_bf16, aligned), inside, grad_bf16)
    if has_m:
        w_place = _place(row, 1, at, weight_bf16, aligned)
        w_old = _read(w_place, inside, weight_bf16)
        w = w_old
        m_place = _place(row, 2, at, m_bf16, aligned)
        m_old = _read(m_place, inside, m_bf16)
    if has_h:
        h_place = _place(row, 3, at, h_bf16, aligned)
        h_old = _read(h_place, inside, h_bf16)
        h = h_old
        h_new = h_old
    if rounding == "master" and has_m:
        spare_place = _place(row, 4, at, False, aligned)
        spare = _read(spare_place, inside, False)
        w = spare
    if rounding == "kahan" and has_m:
        spare_place = _place(row, 4, at, True, aligned)
        spare = _read(spare_place, inside, True)
        w = w_old + spare

    finite = tl.abs(g) < limit
    if has_h and rule != "sophia":
        c = g if rule == "refresh" else g * g
        h = h_old * beta2 + c * rest2
        h_new = tl.where(finite, _nearest(h, h_bf16), h_old)
        _write(h_place, h_new, inside, h_bf16)
    if has_m:  # otherwise a refresh: only h moves
        if rule == "lion":  # its direction looks at the momentum before that moves
            u = _sign(m_old * beta1 + g * rest1)
            m = m_old * beta2 + g * rest2
        else:
            m = m_old * beta1 + g * rest1
        if rule == "signum":
            u = _sign(m)
        elif rule == "adamw":
            u = tl.div_rn(m, tl.sqrt_rn(h) * scale + eps)
        elif clips:
            u = tl.minimum(tl.maximum(tl.div_rn(m, tl.maximum(h * scale, eps)), -1.0), 1.0)
        w = w * decay - u * lr

        m_new = tl.where(finite, _nearest(m, m_bf16), m_old)
        _write(m_place, m_new, inside, m_bf16)
        if rounding == "stochastic":
            key = tl.load(row + 6)
            low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
            noise = _mix(_mix(at.to(tl.uint32) + low) ^ high) & 0xFFFF
            w_new = ((w.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            w_new = _nearest(w, weight_bf16)
        if rounding == "master":
            _write(spare_place, tl.where(finite, w, spare), inside, False)
        elif rounding == "kahan":
            _write(spare_place, tl.where(finite, _nearest(w - w_new, True), spare), inside, True)
        w_new = tl.where(finite, w_new, w_old)
        _write(w_place, w_new, inside, weight_bf16)

    bad = tl.sum((inside & (finite == 0)).to(tl.int32))
    if bad > 0:
        tl.atomic_add(statistics + 7, bad.to(tl.float64))
    if counting:
        counted = inside & finite
        out = partial + program
        step = tl.num_programs(0)
        m2 = tl.where(counted, m_new, 0.0).to(tl.float64)
        dw = tl.where(counted, w_new - w_old, 0.0).to(tl.float64)
        idle = counted & (m_new == 0)
        if has_h:
            h2 = tl.where(counted, h_new, 0.0).to(tl.float64)
            idle = idle & (h_new == 0)
            tl.store(out + 5 * step, tl.sum(h2 * h2))
        if clips:
            won = counted & (tl.abs(m_new) < h_new * scale)
            tl.store(out, tl.sum(won.to(tl.int32)).to(tl.float64))
        changed = counted & (w_new.to(tl.uint32, bitcast=True) != w_old.to(tl.uint32, bitcast=True))
        tl.store(out + step, tl.sum(idle.to(tl.int32)).to(tl.float64))
        tl.store(out + 2 * step, tl.sum(inside.to(tl.int32)).to(tl.float64))
        tl.store(out + 3 * step, tl.sum(changed.to(tl.int32)).to(tl.float64))
        tl.store(out + 4 * step, tl.sum(m2 * m2))
        tl.store(out + 6 * step, tl.sum(dw * dw))


def obstacle(batch: Sequence[Operands]) -> str | None:
    """Why the Triton kernel cannot update these tensors, None if it can."""
    return unsuitable(batch, "CUDA", lambda t: t.is_cuda or bool(os.environ.get("TRITON_INTERPRET")))


def update(
    rule: str, numbers: Numbers, batch: Sequence[Operands], rounding: str, statistics: Tensor, counting: bool
) -> None:
    """plain.update for tensors of equal dtypes on one device: nothing is read back, at most two launches."""
    first = batch[0]
    counting = counting and rule not in REFRESHES
    for aligned in (True, False):
        chosen = [o for o in batch if _aligned(o) == aligned and o.grad.numel()]
        if not chosen:
            continue
        rows = tuple(v for o in chosen for v in _row(o))
        device = first.grad.device
        owners, blocks = _layout(tuple(o.grad.numel() for o in chosen), device)
        partial = torch.zeros((7, len(owners)) if counting else (1,), dtype=torch.float64, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _pass[(len(owners),)](
                _table(rows, device),
                owners,
                blocks,
                statistics,
                partial,
                *map(float, numbers),
                2.0**64 if rule in SQUARING else float("inf"),
                rule=rule,
                rounding=rounding,
                grad_bf16=_is_bf16(first.grad),
                weight_bf16=_is_bf16(first.weight),
                m_bf16=_is_bf16(first.m),
                h_bf16=_is_bf16(first.h),
                has_m=first.m is not None,
                has_h=first.h is not None,
                clips=rule in CLIPPING,
                counting=counting,
                aligned=aligned,
                block=BLOCK,
                enable_fp_fusion=False,  # no a * b + c in one rounding
            )
        if counting:
            statistics[: len(STATISTICS) - 1] += partial.sum(1)


def _is_bf16(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.bfloat16


def _row(o: Operands) -> list[int]:
    key = o.key - (1 << 64) if o.key >> 63 else o.key  # the same 64 bits as a signed number
    return [*(0 if t is None else t.data_ptr() for t in (o.grad, o.weight, o.m, o.h, o.spare)), o.grad.numel(), key]


def _aligned(o: Operands) -> bool:
    return o.grad.numel() % ALIGNED == 0 and all(t.data_ptr() % ALIGNED == 0 for t in o.tensors())


@functools.lru_cache(maxsize=16)
def _table(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """[tensors, COLUMNS] on `device`; gradients have the same addresses again in most steps, which then reuse it."""
    table = torch.tensor(rows, dtype=torch.int64).view(-1, COLUMNS)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@functools.lru_cache(maxsize=16)
def _layout(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tensor of each program and the number of its block there, both [programs] int32."""
    counts = torch.tensor([-(-size // BLOCK) for size in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    blocks = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
    return owners.to(torch.int32).to(device), blocks.to(torch.int32).to(device)
