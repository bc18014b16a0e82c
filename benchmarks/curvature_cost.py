"""What a training step costs under each optimizer, as a ratio to AdamW's, all in one run and interleaved.

    python benchmarks/curvature_cost.py [--hidden 128 --layers 2 --steps 60 --rounds 3] [--device cuda]

A step is loss=npo on 8 forget and 8 retain rows of the embedded TOFU, as the main job's. On the CPU it is CPU seconds
of one thread, which other work on the machine disturbs little; on CUDA wall-clock seconds after a synchronisation. The
median over the rounds of the mean over the steps. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before soul_exp imports tqdm: a bar a training is no report

import torch
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from soul_exp import losses
from soul_exp.data import Template
from soul_exp.losses import Objective
from soul_exp.models import loading
from soul_exp.models.language_model import LanguageModel, train_tokenizer
from soul_exp.optim import SAM, AdamW, Hybrid, Lion, MeZO, Muon, Signum, Sophia
from soul_exp.tasks.tofu import tofu
from soul_exp.training.schedule import Schedule
from soul_exp.training.train import train

WARM = 10  # steps before the clock starts: a whole interval, so that equally many curvature passes are inside

P = functools.partial
OPTIMIZERS: dict[str, tuple[Callable[..., Any], bool]] = {  # name -> optimizer, whether gradients are compared
    "adam": (P(AdamW, lr=1e-5), False),
    "torch's AdamW": (P(torch.optim.AdamW, lr=1e-5), False),
    "sgd": (P(torch.optim.SGD, lr=1e-5, momentum=0.9), False),
    "signum": (P(Signum, lr=1e-5), False),
    "lion": (P(Lion, lr=1e-5), False),
    "sophia_soul (gradient, k 1)": (P(Sophia, lr=1e-5, estimator="gradient", num_labels=5120, rho=0.04), False),
    "sophia gnb k 10, retain": (P(Sophia, lr=1e-5), False),
    "sophia gnb k 10, both": (P(Sophia, lr=1e-5, curvature_on="both"), False),
    "sophia gnb k 1, retain": (P(Sophia, lr=1e-5, interval=1), False),
    "sophia hutchinson k 10, retain": (P(Sophia, lr=1e-5, estimator="hutchinson"), False),
    "sophia hutchinson k 10, 2 rows": (P(Sophia, lr=1e-5, estimator="hutchinson", curvature_rows=2), False),
    "sophia hutchinson k 10, both": (P(Sophia, lr=1e-5, estimator="hutchinson", curvature_on="both"), False),
    "muon": (P(Muon, lr=1e-5), False),
    "sam": (P(SAM, lr=1e-5, base=AdamW), False),
    "mezo": (P(MeZO, lr=1e-9), False),
    "hybrid": (P(Hybrid, lr=1e-5, first_order=AdamW, zeroth_order=P(MeZO, lr=1e-9)), False),
    "adam, log_gradients every 5": (P(AdamW, lr=1e-5), True),
}


class Clock(TrainerCallback):
    def __init__(self, device: str) -> None:
        self.device, self.start, self.stop = device, 0.0, 0.0

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM:
            self.start = self.now()
        if state.global_step == state.max_steps:
            self.stop = self.now()


def seconds_a_step(lm: LanguageModel, parts: dict[str, Any], name: str, steps: int, device: str) -> float:
    make, log_gradients = OPTIMIZERS[name]
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        train(
            lm.model, lm.reader, parts, objective=Objective(P(losses.npo, beta=0.03), gamma=10.0), make_optimizer=make,
            schedule=Schedule(1, 8, max_steps=WARM + steps, logging_steps=5, log_gradients=log_gradients), seed=0,
            pad_id=lm.pad_id, folder=Path(folder), label=name, device=device, callbacks=[clock],
        )  # fmt: skip
    return (clock.stop - clock.start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="a multiple of 10")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(0, "not measured on CUDA: there is no CUDA device here\n")
    if args.device == "cpu":
        torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    task = tofu()
    texts = ["".join(Template().texts(item)) for item in task.target_rows]
    config = {
        "model_type": "llama", "hidden_size": args.hidden, "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers, "num_attention_heads": max(1, args.hidden // 32), "initializer_range": 0.06,
        "max_position_embeddings": 1024, "tie_word_embeddings": False,
    }  # fmt: skip
    model = loading.from_scratch(config, train_tokenizer(texts, 1024, 1024), seed=0)
    tokenizer = train_tokenizer(texts, 1024, 1024)
    lm = LanguageModel.of(model.to(getattr(torch, args.dtype)), tokenizer, Template(), 1024)
    rows = {name: task.parts[name] for name in ("forget", "retain")}
    parts = {name: (part, lm.encode([item for row in part.rows for item in row])) for name, part in rows.items()}
    measured: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for _ in range(args.rounds):
        for name in OPTIMIZERS:
            measured[name].append(seconds_a_step(lm, parts, name, args.steps, args.device))
    base = statistics.median(measured["adam"])
    kind = "CPU ms" if args.device == "cpu" else f"ms on {torch.cuda.get_device_name()}"
    print(f"\n{sum(p.numel() for p in model.parameters()):,} weights in {args.dtype}, torch {torch.__version__}, "
          f"{platform.machine()}, {args.rounds} rounds of {args.steps} steps\n")  # fmt: skip
    print(f"| optimizer | {kind} a step | ratio to adam | lowest to highest |\n|---|---|---|---|")
    for name, values in measured.items():
        low, high = min(values) / base, max(values) / base
        print(f"| {name} | {1e3 * statistics.median(values):.2f} | {statistics.median(values) / base:.3f} "
              f"| {low:.3f} to {high:.3f} |")  # fmt: skip


if __name__ == "__main__":
    main()
