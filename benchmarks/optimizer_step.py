"""How long an optimizer step takes, against the bytes that it has to move and against torch's own AdamW.

All contenders take turns, in random order, on the same weights, gradients and states, so that a busy machine slows
all of them alike. The byte floor is the time in which the machine copies as much: a pass reads or writes each tensor
once.

    python benchmarks/optimizer_step.py --elements 650000 10000000 100000000 --dtype float32 bfloat16
"""

from __future__ import annotations

import argparse
import gc
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from soul_exp.optim import AdamW, Elementwise, Lion, Signum, Sophia

LR = 1e-6
TENSORS = 40  # a small model's number; each is elements / 40
Step = Callable[[], Any]


def foreach_sophia(weights: list[Tensor], ms: list[Tensor], hs: list[Tensor], refresh: bool) -> None:
    """Sophia as one writes it with torch's multi-tensor operations."""
    grads = [w.grad for w in weights]
    if refresh:
        torch._foreach_mul_(hs, 0.95)
        torch._foreach_addcmul_(hs, grads, grads, 0.05)
    torch._foreach_mul_(ms, 0.9)
    torch._foreach_add_(ms, grads, alpha=0.1)
    scaled = torch._foreach_mul(hs, 1.0)
    torch._foreach_clamp_min_(scaled, 1e-12)
    ratio = torch._foreach_div(ms, scaled)
    torch._foreach_clamp_min_(ratio, -1.0)
    torch._foreach_clamp_max_(ratio, 1.0)
    torch._foreach_mul_(weights, 1 - LR * 0.1)
    torch._foreach_add_(weights, ratio, alpha=-LR)


def contenders(weights: list[Tensor], ms: list[Tensor], hs: list[Tensor]) -> dict[str, tuple[Step, int]]:
    """Name -> a step on the shared tensors and the number of tensor passes that it cannot do without."""

    def sharing(optimizer: torch.optim.Optimizer) -> Any:
        optimizer.step()  # makes its states, which are then replaced by the shared ones
        for p, m, h in zip(weights, ms, hs, strict=True):
            state = optimizer.state[p]
            for name, shared in {"exp_avg": m, "exp_avg_sq": h, "hessian": h}.items():
                if name in state and state[name].dtype == shared.dtype:
                    state[name] = shared
        return optimizer

    def counting(optimizer: Elementwise) -> Step:
        sharing(optimizer).counting = True
        return optimizer.step

    @torch.no_grad()
    def plain(refresh: bool) -> None:
        foreach_sophia(weights, ms, hs, refresh)

    torchs, settings = torch.optim.AdamW, {"lr": LR, "weight_decay": 0.1}
    gradient = {**settings, "estimator": "gradient", "num_labels": 5120}
    found: dict[str, tuple[Step, int]] = {
        "torch AdamW, fused": (sharing(torchs(weights, fused=True, **settings)).step, 7),
        "torch AdamW, foreach": (sharing(torchs(weights, foreach=True, **settings)).step, 7),
        "torch AdamW, for-loop": (sharing(torchs(weights, foreach=False, **settings)).step, 7),
        "Sophia in foreach operations": (lambda: plain(False), 6),
        "Sophia in foreach operations, refresh": (lambda: plain(True), 7),
        "Sophia": (sharing(Sophia(weights, **settings)).step, 6),
        "Sophia, counting": (counting(Sophia(weights, **settings)), 6),
        "Sophia, refresh": (sharing(Sophia(weights, **gradient)).step, 7),
        "Sophia, refresh, counting": (counting(Sophia(weights, **gradient)), 7),
        "AdamW": (sharing(AdamW(weights, **settings)).step, 7),
        "Lion": (sharing(Lion(weights, **settings)).step, 5),
        "Signum": (sharing(Signum(weights, **settings)).step, 5),
    }
    if weights[0].dtype == torch.bfloat16:  # passes of bfloat16: fp32 counts twice
        for rounding, passes in (("kahan", 8), ("stochastic", 6), ("master", 12)):
            found[f"Sophia, {rounding}"] = (sharing(Sophia(weights, rounding=rounding, **settings)).step, passes)
    return found


def seconds(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(elements: int, dtype: torch.dtype, repeats: int, device: torch.device) -> None:
    """Prints the table of one size and dtype."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(std: float) -> list[Tensor]:
        shape = {"size": (elements // TENSORS,), "generator": generator, "device": device}
        return [(std * torch.randn(**shape)).to(dtype) for _ in range(TENSORS)]

    weights, ms, hs = normal(0.02), normal(1e-3), [h.square_() for h in normal(1e-3)]
    for w, g in zip(weights, normal(1e-3), strict=True):
        w.requires_grad_().grad = g
    steps = contenders(weights, ms, hs)
    source, target = torch.cat(ms), torch.cat(ms)
    times: dict[str, list[float]] = {name: [] for name in ["copy", *steps]}
    order = random.Random(0)
    for _ in range(repeats):
        times["copy"].append(seconds(lambda: target.copy_(source), device))
        for name, (step, _) in order.sample(list(steps.items()), len(steps)):  # whom one follows decides what is cached
            times[name].append(seconds(step, device))
    lowest = {name: min(t[1:]) for name, t in times.items()}  # the first turn warms up
    median = {name: statistics.median(t[1:]) for name, t in times.items()}
    bandwidth = 2 * source.nbytes / lowest["copy"]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(
        f"\n{elements:,} weights in {TENSORS} tensors, {str(dtype).removeprefix('torch.')}, {where}, torch "
        f"{torch.__version__}, {repeats} turns; copy: {bandwidth / 1e9:.1f} GB/s\n"
    )
    print("| step | min ms | median ms | min / fused AdamW | median / fused AdamW | passes | min / byte floor |")
    print("|---|---|---|---|---|---|---|")
    fused = "torch AdamW, fused"
    for name, (_, passes) in steps.items():
        floor = passes * source.nbytes / bandwidth
        print(
            f"| {name} | {1e3 * lowest[name]:.3f} | {1e3 * median[name]:.3f} | {lowest[name] / lowest[fused]:.2f} | "
            f"{median[name] / median[fused]:.2f} | {passes} | {lowest[name] / floor:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, nargs="+", default=[650_000, 10_000_000], help="weights, on the CPU")
    parser.add_argument("--cuda-elements", type=int, nargs="+", default=[1_300_000_000], help="weights, on CUDA")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=12, help="turns of each contender; the first is not counted")
    parser.add_argument("--threads", type=int, default=1, help="of torch, and so of all contenders, on the CPU")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats: expected 2 or more")
    torch.set_num_threads(arguments.threads)
    print(f"`python {shlex.join(sys.argv)}`")
    sizes = [(torch.device("cpu"), n) for n in arguments.elements]
    if torch.cuda.is_available():
        sizes += [(torch.device("cuda"), n) for n in arguments.cuda_elements]
    for device, elements in sizes:
        for dtype in arguments.dtype:
            measure(elements, getattr(torch, dtype), arguments.repeats, device)
            gc.collect()  # a size's tensors before the next one's
    if not torch.cuda.is_available():
        print("\nnot measured on CUDA: no device")


if __name__ == "__main__":
    main()
