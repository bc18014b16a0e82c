"""Peak memory of a rank while it loads, unlearns, answers and saves a model from scratch, by engine, side by side.

python benchmarks/memory.py                       # 300 M weights in fp32, two CPU processes: 14 GiB, some minutes
python benchmarks/memory.py --layers 2 --engines zero3
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf

from soul_exp import compose
from soul_exp.artifacts import prepared_models
from soul_exp.data import Item, Part, Template
from soul_exp.distributed.processes import launch
from soul_exp.evaluation.probing import evaluate_probes
from soul_exp.losses import Objective, npo
from soul_exp.models import loading, saving
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import train_tokenizer
from soul_exp.optim import Sophia
from soul_exp.run import Compute, ModelSettings
from soul_exp.stages.process import end_process, start_process
from soul_exp.tasks.task import Probe
from soul_exp.training.schedule import Schedule
from soul_exp.training.train import train

ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
TEMPLATE = {"prompt": "Question: {question}\nAnswer:", "answer": " {answer}"}
MODEL = ModelSettings(Template(), max_length=128)


def questions(count: int) -> list[Item]:
    return [Item(f"What is the number after {i}?", f"It is {i + 1}, as everybody knows.") for i in range(count)]


def compute_of(engine: str, device: str, processes: int) -> dict[str, Any]:
    with hydra.initialize_config_dir(str(compose.conf_dir()), version_base="1.3"):
        typed = [f"compute={engine}", f"compute.device={device}", f"compute.processes={processes}"]
        found = OmegaConf.to_container(hydra.compose("config", typed).compute, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


@contextmanager
def peak(found: dict[str, float], name: str, device: str, before: float) -> Iterator[None]:
    """Writes the most GiB that this process held within the context, above `before`, to `found[name]`."""
    gc.collect()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    else:
        torch.cuda.reset_peak_memory_stats()
    yield
    found[name] = held(device) - before


def held(device: str) -> float:
    """The high-water mark of this process, in GiB: of the device, or resident where there is none."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def work(rank: int, compute: dict[str, Any], source: str, out: str) -> dict[str, float]:
    device = start_process(Compute("memory", threads=1, **compute), rank, seed=0, attention_kernel="sdpa")
    found: dict[str, float] = {}
    base, deepspeed = held(device), compute["deepspeed"]

    with peak(found, "load", device, base):
        lm = prepared_models.load(MODEL, Checkpoint(source), deepspeed)
        loading.move(lm.model, device)
    rows = {"forget": questions(8), "retain": questions(8)}
    with peak(found, "unlearn", device, base):
        train(
            lm.model,
            lm.reader,
            {name: (Part.of(items), lm.encode(items)) for name, items in rows.items()},
            objective=Objective(functools.partial(npo, beta=0.1), "nll"),
            make_optimizer=functools.partial(Sophia, lr=1e-5),
            schedule=Schedule(1, 4, micro_batch_size=1, max_steps=2),
            seed=0,
            pad_id=lm.pad_id,
            folder=Path(out) / "checkpoints",
            label="unlearn",
            device=device,
            deepspeed=deepspeed,
            processes=compute["processes"],
        )
    lm.model.zero_grad(set_to_none=True)  # as unlearn does; `peak` collects the rest
    with peak(found, "evaluate", device, base):
        evaluate_probes(lm, {"probe": Probe(questions(16), generate=True)}, batch_size=8, max_new_tokens=4)
    with peak(found, "save", device, base):
        saving.save(lm.model, lm.tokenizer, Path(out) / "model", rank == 0)
    end_process()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # else glibc keeps what was freed, and counts as held
    texts = [f"{item.prompt} {item.answer}" for item in questions(200)]
    tokenizer = train_tokenizer(texts, 512, 128)
    architecture = {
        "model_type": "llama", "hidden_size": options.hidden, "intermediate_size": 11 * options.hidden // 4,
        "num_hidden_layers": options.layers, "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": options.hidden // 64, "max_position_embeddings": 128,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        model = loading.from_scratch(architecture, tokenizer, seed=0)
        count = sum(p.numel() for p in model.parameters())
        saving.save(model, tokenizer, Path(place) / "start")
        del model
        gc.collect()
        print(
            f"{count / 1e6:.0f} M weights in fp32 ({count * 4 / 2**30:.2f} GiB), {options.processes} processes on ",
            end="",
        )
        print(f"{options.device}, Sophia (gnb), 4 + 4 rows a step; GiB above the process's start, rank 0 / rank 1")
        print(f"{'':16}" + "".join(f"{phase:>16}" for phase in ("load", "unlearn", "evaluate", "save")))
        for engine in options.engines:
            out = Path(place) / engine
            compute = compute_of(engine, options.device, options.processes)
            start: Callable[..., list[dict[str, float]]] = launch
            peaks = start(
                work, compute, f"{place}/start", str(out), processes=options.processes, threads=1, logs=out / "ranks"
            )
            cells = [" / ".join(f"{found[phase]:.2f}" for found in peaks[:2]) for phase in peaks[0]]
            print(f"{engine:16}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
