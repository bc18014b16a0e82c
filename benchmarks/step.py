"""One optimizer step as the SOUL release takes it and as soul_exp takes it, on the same rows, in one run.

    python benchmarks/step.py [--device cuda --model 1b] [--optimizer adam] [--rows embedded] [--compile]

The release's: every text padded to 512 tokens, batch 1 with 4 accumulation steps, forget and retain row each in a
forward pass of its own, logits and fp32 loss at all 512 positions, its optimizer. Ours: `soul_exp.training.train` on
the same 4 + 4 rows, its data loading and logging included. The loss is gradient difference, clipped at 1, and the run
first compares both gradients. All take turns, step by step, in random order, so that a busy machine slows all of them
alike; the ways between the two say which change gains what. On the CPU the ratio is of CPU seconds, which other work
disturbs little; on CUDA of wall-clock seconds. Memory is of processes that run one way only. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before soul_exp imports tqdm

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from soul_exp import losses
from soul_exp.compose import conf_dir
from soul_exp.data import Encoded, Part, Template, pad
from soul_exp.losses import IGNORED, Objective, Scored
from soul_exp.models import loading
from soul_exp.models.language_model import LanguageModel, train_tokenizer
from soul_exp.optim import AdamW, Sophia
from soul_exp.tasks.task import Task
from soul_exp.tasks.tofu import tofu
from soul_exp.training.schedule import Schedule
from soul_exp.training.stream import Stream
from soul_exp.training.train import train

LENGTH = 512  # tokens to which the release pads every text
ROWS = 4  # of each part a step
CLIP, LR = 1.0, 1e-6
WARM = 5  # steps before the clock starts
OBJECTIVE = Objective(losses.grad_ascent, "nll")
PARTS = ("forget", "retain")
Rows = Mapping[str, Sequence[Encoded]]


@dataclass(frozen=True)
class Way:
    """How the gradient and the update of one step are computed."""

    name: str
    length: int | None = None  # tokens to which every text is padded; None: to the longest of its forward pass
    rows: int = ROWS  # of each part a forward pass
    together: bool = True  # both parts in one forward pass
    at_answers: bool = True  # logits at answer positions only
    ours: bool = True  # our optimizer


WAYS = (  # each changes one thing of the one before it
    Way("the release's", LENGTH, 1, together=False, at_answers=False, ours=False),
    Way("texts padded to the longest of their pass", None, 1, together=False, at_answers=False, ours=False),
    Way("both parts in one forward pass", None, 1, at_answers=False, ours=False),
    Way("4 + 4 rows at once, no accumulation", at_answers=False, ours=False),
    Way("logits at answer positions only", ours=False),
    Way("our optimizer"),
)
PRODUCT = "ours: the product's trainer"


# --- a step, in any of the ways -----------------------------------------------------------------------------------


def passes_of(way: Way, rows: Rows, pad_id: int) -> list[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The forward passes of a step: the parts in each, and its batch, whose `whole` are labels at all positions."""
    found = []
    for start in range(0, ROWS, way.rows):
        block = {part: list(rows[part][start : start + way.rows]) for part in PARTS}
        for parts in [PARTS] if way.together else [(part,) for part in PARTS]:
            encoded = [row for part in parts for row in block[part]]
            batch = pad(encoded, pad_id)
            more = max(0, (way.length or 0) - batch["input_ids"].shape[1])
            batch["input_ids"] = F.pad(batch["input_ids"], (0, more), value=pad_id)
            batch["attention_mask"] = F.pad(batch["attention_mask"], (0, more))
            batch["whole"] = torch.full_like(batch["input_ids"], IGNORED)
            for i, row in enumerate(encoded):
                batch["whole"][i, row.num_prompt : len(row.ids)] = torch.tensor(row.ids[row.num_prompt :])
            found.append((parts, batch))
    return found


def leave_gradient(way: Way, lm: LanguageModel, passes: Sequence[tuple[tuple[str, ...], dict[str, Tensor]]]) -> None:
    """The gradient of minus the forget plus the retain NLL per token, means over sequences, added to the weights'."""
    waiting: dict[str, Any] = {}
    for parts, batch in passes:
        if way.at_answers:
            logits, labels = lm.reader(lm.model, batch), batch["labels"]
        elif way.together:
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            logits, labels = lm.model(**inputs, use_cache=False).logits[:, :-1], batch["whole"][:, 1:]
        else:  # the model's own loss, of one row and so of one sequence
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            waiting[parts[0]] = lm.model(**inputs, labels=batch["whole"], use_cache=False).loss
            if len(waiting) == len(PARTS):
                (OBJECTIVE.total(-waiting["forget"], waiting["retain"]) * way.rows / ROWS).backward()
                waiting = {}
            continue
        blocks = {part: slice(i * way.rows, (i + 1) * way.rows) for i, part in enumerate(parts)}
        scored = {part: Scored(logits[block], labels[block]) for part, block in blocks.items()}
        (OBJECTIVE.total(*OBJECTIVE.terms(scored)) * way.rows / ROWS).backward()


class PlainSophia(torch.optim.Optimizer):
    """The arithmetic of the release's Sophia, one operation and one tensor after the other."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": LR})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state, g = self.state[p], p.grad
                if not state:
                    state["m"], state["h"] = torch.zeros_like(p), torch.zeros_like(p)
                m, h = state["m"], state["h"]
                m.mul_(0.9).add_(g, alpha=0.1)
                h.mul_(0.95).addcmul_(g, g, value=0.05)
                m.mul_(0.9).add_(g, alpha=0.1)  # its 0.9 is applied twice a step
                share = (m.abs() / (0.04 * 5120 * h + 1e-15)).clamp(None, 1)
                p.addcmul_(m.sign(), share, value=-group["lr"])


OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {  # the release's, and ours of the same rule
    "sophia": (
        PlainSophia,
        functools.partial(
            Sophia, lr=LR, betas=(0.81, 0.95), rho=0.04, eps=1e-15, estimator="gradient", num_labels=5120
        ),
    ),
    # transformers' adamw_torch, as the release sets it; on the CPU torch loops over tensors
    "adam": (functools.partial(torch.optim.AdamW, lr=LR, weight_decay=0.0), functools.partial(AdamW, lr=LR)),
}


class Taken:
    """A copy of the model on which steps are taken in any way, outside of the product's trainer."""

    def __init__(self, lm: LanguageModel, optimizer: str, device: str) -> None:
        model = copy.deepcopy(lm.model).train()
        model.get_output_embeddings()._forward_pre_hooks.clear()  # the copy of the reader's hook, which is not ours
        loading.move(model, device)
        self.lm, self.device = LanguageModel.of(model, lm.tokenizer, lm.template, lm.max_length), device
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = tuple(make(self.params) for make in OPTIMIZERS[optimizer])

    def gradient(self, way: Way, rows: Rows) -> Callable[[], None]:
        """Computes the gradient, clipped, when called; padding and transfer are done now."""
        passes = passes_of(way, rows, self.lm.pad_id)
        passes = [(parts, {k: v.to(self.device) for k, v in batch.items()}) for parts, batch in passes]

        def taken() -> None:
            leave_gradient(way, self.lm, passes)
            nn.utils.clip_grad_norm_(self.params, CLIP)

        return taken

    def step(self, way: Way, rows: Rows) -> Callable[[], None]:
        """Takes one optimizer step when called."""
        gradient, optimizer = self.gradient(way, rows), self.optimizers[way.ours]

        def taken() -> None:
            gradient()
            optimizer.step()
            optimizer.zero_grad()

        return taken


# --- what is measured on --------------------------------------------------------------------------------------------


def rows_wanted(wanted: str) -> tuple[Task, str]:
    """The task, and what to say of where its rows are from."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SOUL_EXP_DATA", beside)) / "tofu"
    if wanted == "real" and folder.is_dir():
        return tofu(str(folder), num_authors=40), "real TOFU, 40 authors"
    why = "" if wanted == "embedded" else " (real TOFU was not found: set SOUL_EXP_DATA to the folder that has tofu/)"
    return tofu(), f"embedded TOFU{why}"


def language_model(name: str, task: Task) -> LanguageModel:
    """conf/model/tiny.yaml from scratch in fp32, or a Llama of 0.99 B weights in bf16."""
    scratch: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model" / "tiny.yaml")["scratch"])
    config, size = scratch["config"], scratch["vocab_size"]
    if name == "1b":  # a vocabulary of 4,096 flatters the release: full logits cost it least
        config |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        config |= {"num_key_value_heads": 8, "initializer_range": 0.02}
        size = 4096
    texts = ["".join(Template().texts(item)) for item in task.target_rows]
    tokenizer = train_tokenizer(texts, size, 1024)
    model = loading.from_scratch(config, tokenizer, seed=0)
    dtype = torch.bfloat16 if name == "1b" else torch.float32
    return LanguageModel.of(model.to(dtype), tokenizer, Template(), 1024)


@dataclass(frozen=True)
class Bench:
    """The rows of a run, in the order in which the product's trainer visits them."""

    lm: LanguageModel
    parts: Mapping[str, tuple[Part, Sequence[Encoded]]]
    optimizer: str
    device: str
    num_steps: int

    @functools.cached_property
    def stream(self) -> Stream:
        return Stream(self.parts, num_steps=self.num_steps, batch_size=ROWS, seed=0)

    def rows(self, step: int) -> Rows:
        entries = [self.stream[step * ROWS + i] for i in range(ROWS)]
        return {part: [entry[part][1] for entry in entries] for part in PARTS}

    def train(self, callback: TrainerCallback) -> None:
        """The product's training; `callback` looks on."""
        with tempfile.TemporaryDirectory() as folder:
            train(
                self.lm.model, self.lm.reader, self.parts, objective=OBJECTIVE,
                make_optimizer=OPTIMIZERS[self.optimizer][1],
                schedule=Schedule(1, ROWS, max_steps=self.num_steps, lr_scheduler="constant", warmup_ratio=0.0,
                                  max_grad_norm=CLIP),
                seed=0, pad_id=self.lm.pad_id, folder=Path(folder), label="ours", device=self.device,
                callbacks=[callback],
            )  # fmt: skip


# --- time -----------------------------------------------------------------------------------------------------------


def now(device: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds, once the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


class Turns(TrainerCallback):
    """After each step of the product's trainer one step in each of `ways`, on the same rows; seconds by name."""

    def __init__(self, bench: Bench, ways: Sequence[Way]) -> None:
        self.bench, self.ways, self.order = bench, ways, random.Random(0)
        self.taken = Taken(bench.lm, bench.optimizer, bench.device)
        self.seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in (*(w.name for w in ways), PRODUCT)}
        self.agreement: dict[str, float] = {}
        self.warm = 0.0
        self.start = now(bench.device)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = now(self.bench.device)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first update all weights are equal: so must the gradients be."""
        if state.global_step:
            return
        found = {}
        for way in self.ways:
            self.taken.gradient(way, self.bench.rows(0))()
            found[way.name] = [p.grad.float() for p in self.taken.params if p.grad is not None]
            self.taken.optimizers[0].zero_grad()
        found[PRODUCT] = [p.grad.float() for p in self.bench.lm.model.parameters() if p.grad is not None]
        first = found[self.ways[0].name]
        norm = torch.stack([g.norm() for g in first]).norm()
        for name, other in found.items():
            apart = torch.stack([(a - b).norm() for a, b in zip(first, other, strict=True)]).norm()
            self.agreement[name] = float(apart / norm)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        end = now(self.bench.device)
        if state.global_step <= WARM:
            self.warm += end[0] - self.start[0]
        else:
            self.seconds[PRODUCT].append((end[0] - self.start[0], end[1] - self.start[1]))
        for way in self.order.sample(list(self.ways), len(self.ways)):  # whom one follows decides what is cached
            step = self.taken.step(way, self.bench.rows(state.global_step - 1))
            start = now(self.bench.device)
            step()
            end = now(self.bench.device)
            if state.global_step > WARM:
                self.seconds[way.name].append((end[0] - start[0], end[1] - start[1]))
        self.start = now(self.bench.device)


class Profiled(TrainerCallback):
    """Milliseconds a step in which the device is at work, from its kernels' own times."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.profile = bench, profile(activities=[ProfilerActivity.CUDA])
        self.milliseconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (WARM, self.bench.num_steps):
            torch.cuda.synchronize()
        if state.global_step == WARM:
            self.profile.start()
        if state.global_step == self.bench.num_steps:
            self.profile.stop()
            self.milliseconds = busy(self.profile) / (self.bench.num_steps - WARM)


def busy(found: profile) -> float:
    return sum(event.self_device_time_total for event in found.key_averages()) / 1e3  # it counts microseconds


# --- memory ---------------------------------------------------------------------------------------------------------


def resident(field: str) -> float:
    """MiB that this process holds (VmRSS) or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


class Peak(TrainerCallback):
    """MiB at most between two moments: of the device in all, or resident beyond what was resident before."""

    def __init__(self, device: str) -> None:
        self.device, self.before, self.mib = device, 0.0, 0.0

    def on_train_begin(self, args: Any = None, state: Any = None, control: Any = None, **_: Any) -> None:
        gc.collect()
        if self.device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            self.before = resident("VmRSS")
        else:
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, args: Any = None, state: Any = None, control: Any = None, **_: Any) -> None:
        at_most = torch.cuda.max_memory_allocated() / 2**20 if self.device != "cpu" else resident("VmHWM")
        self.mib = at_most - self.before


def peak_of(bench: Bench, only: str) -> float:
    peak = Peak(bench.device)
    if only == "ours":
        bench.train(peak)
    else:
        taken = Taken(bench.lm, bench.optimizer, bench.device)
        peak.on_train_begin()
        for step in range(bench.num_steps):
            taken.step(WAYS[0], bench.rows(step))()
        peak.on_train_end()
    return peak.mib


def peak_in_a_process_of_its_own(only: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", only]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["mib"])


# --- what is printed ------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], scale: float = 1e3) -> str:
    return f"{scale * statistics.median(values):.2f} ({scale * min(values):.2f} to {scale * max(values):.2f})"


def report(bench: Bench, turns: Turns, clock: int, memory: Mapping[str, float], ours: str = PRODUCT) -> None:
    """The release's step beside ours; `clock` 0 takes the ratio of wall-clock seconds, 1 of CPU seconds."""
    steps = range(WARM, bench.num_steps)
    rows = [row for step in steps for part in PARTS for row in bench.rows(step)[part]]
    real = sum(len(row.ids) for row in rows) / len(steps)
    answers = sum(len(row.ids) - row.num_prompt for row in rows) / len(steps)
    padded = sum(
        2 * ROWS * max(len(row.ids) for part in PARTS for row in bench.rows(step)[part]) for step in steps
    ) / len(steps)
    release = WAYS[0].name
    print(f"A step has {real:.0f} real tokens, {answers:.0f} of them of answers; the release runs the model on "
          f"{2 * ROWS * LENGTH} positions and ours on {padded:.0f}.\n")  # fmt: skip
    print("| step | wall ms, median (range) | CPU ms, median (range) | real tokens/s | answer tokens/s | peak MiB |")
    print("|---|---|---|---|---|---|")
    medians = {}
    for name in (release, PRODUCT):
        wall, cpu = ([pair[i] for pair in turns.seconds[name]] for i in (0, 1))
        medians[name] = (statistics.median(wall), statistics.median(cpu))
        rate = medians[name][clock]
        print(f"| {ours if name == PRODUCT else name} | {spread(wall)} | {spread(cpu)} | {real / rate:.0f} | "
              f"{answers / rate:.0f} | {memory[name]:.0f} |")  # fmt: skip
    pairs = list(zip(turns.seconds[release], turns.seconds[PRODUCT], strict=True))
    wall, cpu = ([a[i] / b[i] for a, b in pairs] for i in (0, 1))
    print(f"| **ratio, turn by turn** | **{spread(wall, 1)}** | **{spread(cpu, 1)}** | | | "
          f"**{memory[release] / memory[PRODUCT]:.2f}** |\n")  # fmt: skip


def ladder(turns: Turns, clock: int, kind: str) -> None:
    print(f"| step | {kind} ms, median | gains | times the release's speed | gradient apart from the release's |")
    print("|---|---|---|---|---|")
    before = first = None
    for name, pairs in turns.seconds.items():
        median = statistics.median(pair[clock] for pair in pairs)
        first, before = first or median, before or median
        apart = turns.agreement[name]
        print(f"| {name} | {1e3 * median:.2f} | {before / median:.2f} | {first / median:.2f} | {apart:.0e} |")
        before = median


def gpu_time(bench: Bench, turns: Turns) -> None:
    """How much of a step's wall-clock time the device is at work: a small share is a step bound by launches."""
    profiled = Profiled(bench)
    bench.train(profiled)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for step in range(WARM):
            turns.taken.step(WAYS[0], bench.rows(step))()
        torch.cuda.synchronize()
    print("\n| step | wall ms | ms in which the GPU is at work | share |\n|---|---|---|---|")
    for name, milliseconds in ((WAYS[0].name, busy(found) / WARM), (PRODUCT, profiled.milliseconds)):
        wall = 1e3 * statistics.median(pair[0] for pair in turns.seconds[name])
        print(f"| {name} | {wall:.2f} | {milliseconds:.2f} | {milliseconds / wall:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="tiny", choices=["tiny", "1b"], help="1b: bf16, on CUDA only")
    parser.add_argument("--rows", default="real", choices=["real", "embedded"], help="embedded where there are no real")
    parser.add_argument("--optimizer", default="sophia", choices=list(OPTIMIZERS), help="sophia: the release's rule")
    parser.add_argument("--compile", action="store_true", help="ours once more, its forward pass by torch.compile")
    parser.add_argument("--repeats", type=int, default=30, help="turns that are counted")
    parser.add_argument("--only", choices=["release", "ours"], help=argparse.SUPPRESS)  # a child that measures memory
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(0, "not measured on CUDA: there is no CUDA device here\n")
    if args.model == "1b" and args.device == "cpu":
        parser.error("--model 1b: give --device cuda")
    if args.device == "cpu":
        torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    task, source = rows_wanted(args.rows)
    lm = language_model(args.model, task)
    encoded = {part: [item for row in task.parts[part].rows for item in row] for part in PARTS}
    parts = {part: (task.parts[part], lm.encode(items)) for part, items in encoded.items()}
    bench = Bench(lm, parts, args.optimizer, args.device, WARM + (WARM if args.only else args.repeats))
    if args.only:
        print(json.dumps({"mib": peak_of(bench, args.only)}))
        return
    clock, kind = (1, "CPU") if args.device == "cpu" else (0, "wall")
    where = "CPU, 1 thread" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"`python {shlex.join(sys.argv)}`\n")
    print(f"{sum(p.numel() for p in lm.model.parameters()):,} weights, {str(lm.model.dtype).removeprefix('torch.')}, "
          f"{args.optimizer}, {source}, {where}, torch {torch.__version__}, {args.repeats} turns.")  # fmt: skip
    start = copy.deepcopy(lm.model.state_dict())
    turns = Turns(bench, WAYS)
    bench.train(turns)
    memory = {name: peak_in_a_process_of_its_own(key) for key, name in (("release", WAYS[0].name), ("ours", PRODUCT))}
    report(bench, turns, clock, memory)
    ladder(turns, clock, kind)
    if args.device == "cuda":
        gpu_time(bench, turns)
    if args.compile:
        lm.model.load_state_dict(start)
        del turns
        lm.model.compile(dynamic=True)
        compiled = Turns(bench, WAYS[:1])
        bench.train(compiled)
        print(f"\nWith torch.compile; the first {WARM} steps, in which it compiles, took {compiled.warm:.1f} s.")
        report(bench, compiled, clock, memory, "ours, compiled (memory: not compiled)")


if __name__ == "__main__":
    main()
