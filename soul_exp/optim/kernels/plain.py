"""The reference: every rule as separate torch operations, slow and obvious, on any device and dtype.

Each line is one IEEE-rounded operation. `alpha=`, `value=`, `lerp` and `addcmul` are avoided: their vector body and
scalar tail may round differently, so that a result would depend on where a tensor was cut.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import CLIPPING, REFRESHES, SQUARING, Numbers, Operands


def obstacle(batch: Sequence[Operands]) -> str | None:
    """None: plain torch can update every tensor."""
    return None


def update(
    rule: str, numbers: Numbers, batch: Sequence[Operands], rounding: str, statistics: Tensor, counting: bool
) -> None:
    """Apply `rule` to each of `batch` in place and add to `statistics`, [8] float64."""
    for o in batch:
        real = torch.float64 if any(t.dtype == torch.float64 for t in o.tensors()) else torch.float32
        g, m, h = (None if t is None else t.to(real) for t in (o.grad, o.m, o.h))
        assert g is not None
        finite = (g * g if rule in SQUARING else g).isfinite()
        statistics[7] += g.numel() - finite.sum()
        if rule in REFRESHES:
            assert o.h is not None and h is not None
            o.h.copy_(torch.where(finite, curvature(h, g, numbers, squared=rule == "refresh_squared"), h))
            continue
        assert o.weight is not None and o.m is not None and m is not None
        old = o.weight.clone()
        w, m, h = moved(rule, effective(o, rounding, real), m, h, g, numbers)
        store(o, w, rounding, finite)
        o.m.copy_(torch.where(finite, m, o.m.to(real)))
        if o.h is not None and h is not None:
            o.h.copy_(torch.where(finite, h, o.h.to(real)))
        if counting:
            statistics[:7] += counted(o, old, finite, real, numbers.scale if rule in CLIPPING else None)


def curvature(h: Tensor, g: Tensor, n: Numbers, squared: bool) -> Tensor:
    c = g * g if squared else g
    return h * n.beta2 + c * n.rest2


def moved(
    rule: str, w: Tensor, m: Tensor, h: Tensor | None, g: Tensor, n: Numbers
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, momentum and curvature (or second moment) after `rule`."""
    w = w * n.decay
    if rule == "lion":
        u = (m * n.beta1 + g * n.rest1).sign()
        return w - u * n.lr, m * n.beta2 + g * n.rest2, None
    m = m * n.beta1 + g * n.rest1
    if rule == "signum":
        return w - m.sign() * n.lr, m, None
    assert h is not None
    if rule in ("sophia_refresh", "adamw"):
        h = curvature(h, g, n, squared=True)
    if rule == "adamw":
        root = h.double().sqrt().to(h.dtype)  # torch's fp32 square root is one unit off in 1 of 150 on some CPUs
        u = m / (root * n.scale + n.eps)
    else:
        u = (m / (h * n.scale).clamp(min=n.eps)).clamp(-1, 1)
    return w - u * n.lr, m, h


def effective(o: Operands, rounding: str, real: torch.dtype) -> Tensor:
    """The weight in the precision of the arithmetic: wider than the model's, where a spare tensor holds the rest."""
    assert o.weight is not None
    if o.spare is None:
        return o.weight.to(real)
    return o.spare if rounding == "master" else o.weight.to(real) + o.spare.to(real)


def store(o: Operands, w: Tensor, rounding: str, finite: Tensor) -> None:
    """Round `w` and store it; where `finite` is false nothing changes."""
    assert o.weight is not None
    rounded = stochastic(w, o.key) if rounding == "stochastic" else w.to(o.weight.dtype)
    if o.spare is not None:
        spare = w if rounding == "master" else (w - rounded.to(w.dtype)).to(o.spare.dtype)
        o.spare.copy_(torch.where(finite, spare, o.spare))
    o.weight.copy_(torch.where(finite, rounded, o.weight))


def stochastic(w: Tensor, key: int) -> Tensor:
    """fp32 `w` as bf16, rounded up with the probability that keeps its mean, by noise of (key, position) alone."""
    position = torch.arange(w.numel(), device=w.device).view(w.shape)
    noise = mix(mix((position + (key & 0xFFFFFFFF)) & 0xFFFFFFFF) ^ (key >> 32)) & 0xFFFF
    bits = w.contiguous().view(torch.int32).to(torch.int64) + noise
    return (bits & ~0xFFFF).to(torch.int32).view(torch.float32).to(torch.bfloat16)


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (held in int64) in which every input bit flips about half of the output's.

    The multipliers are those of Wellons 2018, "Prospecting for hash functions" (lowbias32).
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def counted(o: Operands, old: Tensor, finite: Tensor, real: torch.dtype, scale: float | None) -> Tensor:
    """[7] float64: STATISTICS without the last, of the stored tensors."""
    assert o.weight is not None and o.m is not None
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()]
    m = o.m.to(real)
    h = torch.zeros_like(m) if o.h is None else o.h.to(real)
    won = (m.abs() < h * scale) & finite if scale is not None else torch.zeros_like(finite)
    untouched = (m == 0) & (h == 0) & finite
    changed = o.weight.contiguous().view(integer) != old.contiguous().view(integer)
    squares = [torch.where(finite, x.double(), 0).square() for x in (m, h, o.weight.to(real) - old.to(real))]
    total = torch.tensor(m.numel(), device=m.device)
    sums = [won.sum(), untouched.sum(), total, changed.sum(), *(x.sum() for x in squares)]
    return torch.stack([x.double() for x in sums])
