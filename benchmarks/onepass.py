"""Likelihoods of the answers to a task's probes: one pass over all, beside a forward pass for each text and metric.

    python benchmarks/onepass.py                            # the main job's probes and model, one CPU thread
    python benchmarks/onepass.py --device cuda --model 1b   # 0.99 B random weights in bf16

The second way reads one text at a time, as OpenUnlearning's code does with a batch of one: each metric and each attack
tokenises its own texts and runs the model on them again, with logits at all positions. Both read the same tokens, and
the run first compares log-probabilities, statistics and first choices. They take turns. On the CPU the ratio is of CPU
seconds, on CUDA of wall-clock seconds. What reads more than tokens costs the same in both ways and stands apart:
gradient norms. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping, Sequence

os.environ.setdefault("TQDM_DISABLE", "1")  # before soul_exp imports tqdm

import numpy as np
import torch
from step import language_model, now

from soul_exp.data import Item
from soul_exp.evaluation.gradients import gradient_norms
from soul_exp.evaluation.probing import evaluating, likelihoods, scored_items
from soul_exp.models import loading
from soul_exp.models.language_model import LanguageModel
from soul_exp.tasks.task import ATTACKED, Probe
from soul_exp.tasks.tofu import tofu

ATTACKS = ("loss", "zlib", "reference", "min_k", "min_k_plus_plus")  # of tokens
BATCH = 128  # evaluate.batch_size


def passes(probes: Mapping[str, Probe]) -> dict[str, list[Item]]:
    """Metric -> the texts on which it runs the model, in the way of a pass per metric."""
    own = [item for probe in probes.values() for item in probe.items]
    memorised = [item for name in ("forget", "retain") for item in probes[name].items]
    attacked = [item for name in ATTACKED for item in probes[name].items]
    others = [item for probe in probes.values() for item in scored_items(probe)[len(probe.items) :]]
    return {
        "probability": own,
        "truth ratio": others,
        "extraction strength": memorised,
        "exact memorisation": memorised,
        **dict.fromkeys(ATTACKS, attacked),
    }


@torch.no_grad()
def alone(lm: LanguageModel, item: Item, metric: str) -> np.ndarray:
    """What `metric` reads of one text, [numbers, tokens of the answer and its end]."""
    (row,) = lm.encode([item])
    device = next(lm.model.parameters()).device
    ids = torch.tensor([row.ids], device=device)
    logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    table, labels = logits[row.num_prompt - 1 : -1].float().log_softmax(-1), ids[0, row.num_prompt :]
    own = table.gather(1, labels[:, None])[:, 0]
    if metric in ("extraction strength", "exact memorisation"):
        found = [(table.argmax(-1) == labels).float()]
    elif metric == "min_k_plus_plus":
        p = table.exp()
        mean = (p * table).sum(-1)
        found = [own, mean, (p * (table - mean[:, None]).square()).sum(-1)]
    else:
        found = [own]
    return torch.stack(found).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("tiny", "1b"), default="tiny")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = tofu()
    lm = language_model(options.model, task)
    loading.move(lm.model, options.device)
    lm.model.eval()
    metrics = passes(task.probes)
    items = [item for probe in task.probes.values() for item in scored_items(probe)]

    def one_pass(batch_size: int) -> Callable[[], object]:
        return lambda: likelihoods(lm, items, batch_size=batch_size)

    def one_by_one() -> dict[str, list[np.ndarray]]:
        return {metric: [alone(lm, item, metric) for item in texts] for metric, texts in metrics.items()}

    attacked = metrics["loss"]
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "a pass per text and metric": (one_by_one, sum(map(len, metrics.values()))),
        "every text once, one at a time": (one_pass(1), len(items)),
        f"one pass, {BATCH} texts at a time": (one_pass(BATCH), len(items)),
        "gradient norms, either way": (lambda: gradient_norms(lm, attacked), len(attacked)),
    }
    with evaluating(lm):
        apart = compare(lm, items, metrics, one_by_one())
        print("apart at most:", ", ".join(f"{name} {value:.1e}" for name, value in apart.items()), "\n")
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, (work, _) in ways.items():
                start = now(options.device)
                work()
                end = now(options.device)
                taken[name].append((end[0] - start[0], end[1] - start[1]))
    report(options.device, ways, taken)


def compare(
    lm: LanguageModel,
    items: Sequence[Item],
    metrics: Mapping[str, Sequence[Item]],
    found: Mapping[str, Sequence[np.ndarray]],
) -> dict[str, float]:
    """How far both ways are apart at most, on the same texts."""
    known = dict(zip(items, likelihoods(lm, items, batch_size=BATCH), strict=True))
    apart: dict[str, float] = {"probability": 0.0, "log-probability": 0.0, "mean": 0.0, "variance": 0.0}
    apart["first choices"] = 0
    for metric, texts in metrics.items():
        for item, theirs in zip(texts, found[metric], strict=True):
            ours = known[item]
            if metric in ("extraction strength", "exact memorisation"):
                apart["first choices"] += int(((theirs[0] > 0) != ours.right).sum())
                continue
            pairs = {"probability": (np.exp(ours.logp), np.exp(theirs[0])), "log-probability": (ours.logp, theirs[0])}
            if len(theirs) > 1:
                pairs |= {"mean": (ours.mean_logp, theirs[1]), "variance": (ours.var_logp, theirs[2])}
            for name, (a, b) in pairs.items():
                apart[name] = max(apart[name], float(np.abs(a - b).max()))
    return apart


def report(
    device: str, ways: Mapping[str, tuple[object, int]], taken: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    clock = 1 if device == "cpu" else 0
    first = [pair[clock] for pair in next(iter(taken.values()))]
    print(
        "| way | texts read | wall s, median | CPU s, median | times as fast, median (range) |\n|---|---|---|---|---|"
    )
    for name, pairs in taken.items():
        ratios = [a / pair[clock] for a, pair in zip(first, pairs, strict=True)]
        gain = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})" if name[0] != "g" else ""
        wall, cpu = (statistics.median(pair[i] for pair in pairs) for i in range(2))
        print(f"| {name} | {ways[name][1]} | {wall:.2f} | {cpu:.2f} | {gain} |")


if __name__ == "__main__":
    main()
