"""What an optimizer has the methods for is what the trainer gives it, and nothing else."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import hydra
import hydra.utils
import pytest
import torch
from test_trainer import OBJECTIVES, run
from torch.optim import Optimizer

from soul_exp import compose, optim
from soul_exp.models.language_model import LanguageModel
from soul_exp.optim import SAM, AdamW, Hybrid, Influence, Lion, MeZO, Muon, Signum, Sophia
from soul_exp.tasks.tofu import tofu
from soul_exp.training import capabilities as protocols
from soul_exp.training.capabilities import Capabilities, capabilities, is_elementwise, takes_one_step
from soul_exp.training.curvature import passes_per_step
from soul_exp.training.trainer import Unlearner

P = functools.partial
METHODS = {
    "curvature": "refreshing",
    "ascent": "ascend",
    "probe": "estimate",
    "row_gradients": "add_sample",
    "sums": "take_statistics",
}
# name -> how it is made, what it asks for, and whether ZeRO's flat partitions suit it
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], set[str], bool]] = {
    "AdamW": (P(AdamW, lr=1e-3), {"sums"}, True),
    "Lion": (P(Lion, lr=1e-3), {"sums"}, True),
    "Signum": (P(Signum, lr=1e-3), {"sums"}, True),
    "Sophia": (P(Sophia, lr=1e-3), {"sums", "curvature"}, True),
    "SAM": (P(SAM, lr=1e-3, base=torch.optim.SGD), {"ascent"}, False),
    "SAM of Sophia": (P(SAM, lr=1e-3, base=Sophia), {"ascent", "sums", "curvature"}, False),
    "MeZO": (P(MeZO, lr=1e-4), {"probe"}, False),
    "Hybrid": (P(Hybrid, lr=1e-3, first_order=AdamW, zeroth_order=P(MeZO, lr=1e-4)), {"probe"}, False),
    "Influence": (P(Influence, lr=1e-3, damping=0.1, num_samples=2), {"row_gradients"}, False),
    "Muon": (P(Muon, lr=1e-3), set(), False),
    "torch's SGD": (P(torch.optim.SGD, lr=0.05), set(), True),
    "torch's ASGD": (torch.optim.ASGD, set(), False),
}


def found(optimizer: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(capabilities(optimizer)).items() if value is not None}


def test_every_optimizer_of_the_package_is_here() -> None:
    ours = {
        name
        for name, value in vars(optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and name != "Elementwise"
    }
    assert ours <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_exactly_the_capabilities_that_it_uses_and_all_of_their_protocols(name: str) -> None:
    make, expected, elementwise = OPTIMIZERS[name]
    optimizer: Any = make([torch.nn.Parameter(torch.zeros(2, 2))])
    has = found(optimizer)
    assert set(has) == expected and is_elementwise(optimizer) is elementwise
    assert takes_one_step(make) is ("row_gradients" in expected)
    protocol_of = {field: kind for kind in PROTOCOLS for field in METHODS if METHODS[field] in vars(kind)}
    for field, value in has.items():
        assert isinstance(value, protocol_of[field])  # every attribute and method is there
        method = METHODS[field]
        wanted, given = (
            list(inspect.signature(getattr(kind, method)).parameters) for kind in (protocol_of[field], type(value))
        )
        assert given == wanted


PROTOCOLS: list[Any] = [
    kind for kind in vars(protocols).values() if isinstance(kind, type) and Protocol in kind.__bases__
]


def test_there_is_one_protocol_for_each_capability() -> None:
    assert len(PROTOCOLS) == len(METHODS) == len(vars(Capabilities()))
    assert {method for kind in PROTOCOLS for method in METHODS.values() if method in vars(kind)} == set(
        METHODS.values()
    )


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "torch's ASGD"])
def test_a_training_calls_the_methods_of_an_optimizer_s_capabilities_and_of_no_other(
    name: str, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, expected, _ = OPTIMIZERS[name]
    called: set[str] = set()

    def spying(*args: Any, **kwargs: Any) -> Optimizer:
        optimizer = make(*args, **kwargs)
        for field, value in found(optimizer).items():
            original = getattr(value, METHODS[field])

            def spy(*args: Any, field: str = field, original: Any = original) -> Any:
                called.add(field)
                return original(*args)

            monkeypatch.setattr(value, METHODS[field], spy, raising=False)
        return optimizer

    spying.func = getattr(make, "func", make)  # type: ignore[attr-defined] # of a partial
    run(lm, tmp_path, OBJECTIVES["grad_diff"], spying, ("forget", "retain"), max_steps=2)
    assert called == expected


def test_a_method_without_the_attributes_of_its_protocol_is_named_at_once() -> None:
    class Half(torch.optim.SGD):
        interval = 3

        def refreshing(self) -> None: ...

    with pytest.raises(
        TypeError, match=r"Half has refreshing\(\) but no estimator, curvature_on, curvature_rows: expected"
    ):
        capabilities(Half([torch.zeros(1)], lr=1.0))


def test_an_optimizer_of_a_user_needs_the_methods_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubling(torch.optim.SGD):
        zeroth = True

        def num_losses(self, step: int) -> int:
            return 1

        def estimate(self, loss: Callable[[], Any]) -> float:
            return 2 * float(loss())

    optimizer = Doubling([torch.zeros(1)], lr=1.0)
    assert set(found(optimizer)) == {"probe"}
    assert passes_per_step(capabilities(optimizer), 7, 8, 2) == {"forward": 1, "backward": 0}
    monkeypatch.delattr(Doubling, "num_losses")
    with pytest.raises(TypeError, match=r"Doubling has estimate\(\) but no num_losses: expected"):
        capabilities(optimizer)


# --- the passes that a training makes -----------------------------------------------------------------------------

HALF = P(MeZO, lr=1e-4)
# name -> optimizer, loss, and the passes of 5 steps of 4 rows of each of its parts, or of one step of 12
PASSES: dict[str, tuple[Callable[..., Optimizer], str, float, float]] = {
    "adam": (P(AdamW, lr=1e-3), "grad_diff", 1, 1),
    "torch's SGD": (P(torch.optim.SGD, lr=0.05), "grad_diff", 1, 1),
    "sophia": (P(Sophia, lr=1e-3, interval=2, curvature_rows=3), "grad_diff", 1 + 9 / 40, 1 + 9 / 40),
    "sophia on another part": (P(Sophia, lr=1e-3, interval=4), "grad_ascent", 1 + 8 / 20, 1 + 8 / 20),
    "sophia by hutchinson": (
        P(Sophia, lr=1e-3, interval=2, estimator="hutchinson", curvature_on="both"), "grad_diff", 1.6, 2.2,
    ),
    "sophia_soul": (P(Sophia, lr=1e-3, estimator="gradient"), "grad_diff", 1, 1),
    "sam": (P(SAM, lr=1e-3, base=AdamW), "grad_diff", 2, 2),
    "sam of sophia": (P(SAM, lr=1e-3, base=Sophia), "grad_diff", 2.1, 2.1),
    "mezo": (P(MeZO, lr=1e-4, num_samples=2), "grad_diff", 4, 0),
    "hybrid": (P(Hybrid, lr=1e-3, first_order=AdamW, zeroth_order=HALF, first_steps=2), "grad_diff", 1.2, 0.8),
    "influence": (P(Influence, lr=1e-3, damping=0.1, num_samples=6), "grad_ascent", 1.5, 1.5),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_the_passes_that_are_stated_are_those_that_a_training_makes(
    name: str, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that the model reads, and rows whose gradient arrives where the model begins, without those for logs."""
    make, loss, forward, backward = PASSES[name]
    rows = {"forward": 0, "backward": 0}

    def read(_: Any, __: Any, embedded: torch.Tensor) -> None:
        def arrived(gradient: torch.Tensor) -> None:
            rows["backward"] += len(gradient)

        rows["forward"] += len(embedded)
        if embedded.requires_grad:
            embedded.register_hook(arrived)

    lm.model.get_input_embeddings().register_forward_hook(read)
    monkeypatch.setattr(Unlearner, "_measures_retain_nll", False)
    objective = OBJECTIVES[loss]
    outcome = run(lm, tmp_path, objective, make, ("forget", "retain"), max_steps=5, micro_batch_size=2)
    unit = 12 if name == "influence" else 4 * len(objective.parts)
    made = {kind: count / (outcome.num_steps * unit) for kind, count in rows.items()}
    assert outcome.passes == pytest.approx(made, abs=1e-12)
    assert outcome.passes == pytest.approx({"forward": forward, "backward": backward}, abs=1e-12)


def test_a_training_without_a_step_states_no_passes() -> None:
    assert passes_per_step(Capabilities(), 0, 8, 2) == {}


def test_the_documents_state_the_passes_of_every_optimizer() -> None:
    text = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text()
    stated = dict(re.findall(r"^\| `(\w+)`(?: \|.*?){3} \| (\S+, \S+) \|", text, flags=re.M))
    (of_altpo,) = re.findall(r"smaller share of it: ([\d.]+)\.$", text, flags=re.M)
    num_forget = len(tofu().parts["forget"].rows)
    assert f"{num_forget} rows to forget" in text
    found = {}
    with hydra.initialize_config_dir(str(compose.conf_dir()), version_base="1.3"):
        for name in (file.stem for file in (compose.conf_dir() / "optimizer").glob("*.yaml")):
            make = hydra.utils.instantiate(hydra.compose(f"optimizer/{name}", ["+seed=0"]).optimizer, _convert_="all")
            requested = capabilities(make([{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "role": "hidden"}]))
            passes = passes_per_step(requested, *((1, num_forget, 1) if name == "influence" else (100, 8, 2)))
            found[name] = f"{round(passes['forward'], 2):g}, {round(passes['backward'], 2):g}"
            if name == "sophia":
                assert of_altpo == f"{passes_per_step(requested, 100, 8, 3)['forward']:.2f}"
    assert stated == found
