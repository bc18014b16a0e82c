"""What an optimizer has the methods for is what the trainer gives it, and nothing else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from test_trainer import OBJECTIVES, run
from torch.optim import Optimizer

from soul_exp import optim
from soul_exp.models.language_model import LanguageModel
from soul_exp.optim import SAM, AdamW, Hybrid, Influence, Lion, MeZO, Muon, Signum, Sophia
from soul_exp.training import capabilities as protocols
from soul_exp.training.capabilities import Capabilities, capabilities, is_elementwise, takes_one_step

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


def test_an_optimizer_of_a_user_needs_the_methods_alone() -> None:
    class Doubling(torch.optim.SGD):
        zeroth = True

        def estimate(self, loss: Callable[[], Any]) -> float:
            return 2 * float(loss())

    assert set(found(Doubling([torch.zeros(1)], lr=1.0))) == {"probe"}
