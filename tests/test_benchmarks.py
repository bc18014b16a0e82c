"""What the benchmarks compare is the same work."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import items

from soul_exp.evaluation.probing import scored_items
from soul_exp.losses import Scored
from soul_exp.models.language_model import LanguageModel
from soul_exp.optim import Sophia
from soul_exp.tasks.task import Probe


def benchmark(name: str) -> ModuleType:
    """benchmarks/<name>.py, which is no part of the package."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def step() -> ModuleType:
    return benchmark("step")


def test_both_ways_to_get_likelihoods_read_the_same_numbers(step: ModuleType, lm: LanguageModel) -> None:
    onepass = benchmark("onepass")
    probes = {
        "forget": Probe(items(9), paraphrases=items(9, 9)),
        "retain": Probe(items(5, 20)),
        "holdout": Probe(items(7, 30)),
    }
    texts = onepass.passes(probes)
    assert {metric: len(each) for metric, each in texts.items()} == {
        "probability": 21, "truth ratio": 9, "extraction strength": 14, "exact memorisation": 14,
        **dict.fromkeys(("loss", "zlib", "reference", "min_k", "min_k_plus_plus"), 16),
    }  # fmt: skip
    lm.model.eval()
    every = [item for probe in probes.values() for item in scored_items(probe)]
    alone = {metric: [onepass.alone(lm, item, metric) for item in each] for metric, each in texts.items()}
    apart = onepass.compare(lm, every, texts, alone)
    assert max(apart.values()) < 1e-5 and apart["probability"] < 3e-6 and apart["first choices"] == 0
    alone["loss"][3] = alone["loss"][3] + 0.1
    assert onepass.compare(lm, every, texts, alone)["log-probability"] == pytest.approx(0.1, abs=1e-5)


def test_every_way_to_take_a_step_leaves_the_same_gradient(step: ModuleType, lm: LanguageModel) -> None:
    """The one that the rows give one by one, without padding."""
    rows = {"forget": lm.encode(items(4)), "retain": lm.encode(items(4, start=30))}
    taken = step.Taken(lm, "sophia", "cpu")

    def gradient() -> torch.Tensor:
        found = torch.cat([p.grad.flatten() for p in taken.params if p.grad is not None])
        taken.optimizers[0].zero_grad()
        return found

    for part, sign in (("forget", -1), ("retain", 1)):
        for row in rows[part]:
            logits = taken.lm.model(torch.tensor([row.ids])).logits[:, row.num_prompt - 1 : -1]
            (sign * Scored(logits, torch.tensor([row.ids[row.num_prompt :]])).mean_nll.sum() / 4).backward()
    expected = gradient()
    assert expected.norm() > 0.1
    for way in step.WAYS:
        step.leave_gradient(way, taken.lm, step.passes_of(way, rows, lm.pad_id))
        torch.testing.assert_close(gradient(), expected, rtol=0, atol=1e-6, msg=way.name)


def test_the_plain_loop_takes_the_steps_of_our_sophia(step: ModuleType) -> None:
    start = torch.linspace(-1, 1, 101)
    plain, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    of_release = step.PlainSophia([plain])
    of_ours = step.OPTIMIZERS["sophia"][1]([ours])
    assert isinstance(of_ours, Sophia)
    generator = torch.Generator().manual_seed(0)
    for optimizer in (of_release, of_ours):
        optimizer.param_groups[0]["lr"] = 1e-2
    for _ in range(5):
        plain.grad = 1e-3 * torch.randn(101, generator=generator)
        ours.grad = plain.grad.clone()
        of_release.step()
        of_ours.step()
    moved = (plain - start).abs()
    assert 0.01 < float((moved < 0.049).float().mean()) < 0.99  # some coordinates were clipped at every step, some not
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)
