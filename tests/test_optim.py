"""Optimizers against slow, obvious references."""

import functools
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from soul_exp.optim import STATISTICS, AdamW, Elementwise, Lion, Signum, Sophia

BF16 = torch.bfloat16
RULES: dict[str, Callable[..., Elementwise]] = {
    "sophia": functools.partial(Sophia, lr=1e-2, rho=0.5),
    "hutchinson": functools.partial(Sophia, lr=1e-2, rho=0.5, estimator="hutchinson"),
    "sophia_soul": functools.partial(
        Sophia, lr=1e-2, betas=(0.81, 0.95), rho=0.04, eps=1e-15, estimator="gradient", num_labels=5120
    ),
    "signum": functools.partial(Signum, lr=1e-2),
    "lion": functools.partial(Lion, lr=1e-2),
    "adamw": functools.partial(AdamW, lr=1e-2),
}
ROUNDINGS = ("nearest", "master", "kahan", "stochastic")


def gradients(steps: int, size: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, dtype=torch.float64, generator=generator) for _ in range(steps)]


def step(optimizer: torch.optim.Optimizer, weight: torch.Tensor, gradient: torch.Tensor) -> None:
    weight.grad = gradient.clone()
    optimizer.step()


def test_sophia_follows_its_definition_coordinate_by_coordinate() -> None:
    lr, (b1, b2), rho, decay, eps = 0.1, (0.9, 0.8), 0.5, 0.01, 1e-12
    weight = torch.ones(7, dtype=torch.float64, requires_grad=True)
    optimizer = Sophia([weight], lr=lr, betas=(b1, b2), rho=rho, weight_decay=decay, eps=eps, interval=2)
    w, m, h = [1.0] * 7, [0.0] * 7, [0.0] * 7
    for number, gradient in enumerate(gradients(6)):
        if number % 2 == 0:  # a curvature pass
            curvature = gradient.flip(0)
            with optimizer.refreshing():
                step(optimizer, weight, curvature)
            h = [b2 * x + (1 - b2) * float(c) ** 2 for x, c in zip(h, curvature, strict=True)]
        optimizer.counting = number == 5
        step(optimizer, weight, gradient)
        m = [b1 * x + (1 - b1) * float(g) for x, g in zip(m, gradient, strict=True)]
        w = [
            x * (1 - lr * decay) - lr * max(-1.0, min(1.0, y / max(rho * z, eps)))
            for x, y, z in zip(w, m, h, strict=True)
        ]
    assert weight.tolist() == pytest.approx(w, rel=1e-12)
    won, untouched, total = optimizer.take_statistics()[:3].tolist()
    assert (won, untouched, total) == (sum(abs(y) < rho * z for y, z in zip(m, h, strict=True)), 0, 7)
    assert 0 < won < 7  # otherwise the clip was never or always at work, and this tests less than it claims


def test_a_curvature_pass_moves_the_curvature_only() -> None:
    weight = torch.ones(7, requires_grad=True)
    optimizer = Sophia([weight], lr=0.1)
    with optimizer.refreshing():
        step(optimizer, weight, torch.full((7,), 2.0))
    state = optimizer.state[weight]
    assert weight.tolist() == [1.0] * 7
    assert (state["exp_avg"] == 0).all() and int(state["step"]) == 0
    assert state["hessian"].tolist() == pytest.approx([0.05 * 4] * 7)


def test_sophia_without_curvature_is_sign_descent() -> None:
    weight = torch.zeros(3, requires_grad=True)
    step(Sophia([weight], lr=0.25), weight, torch.tensor([3.0, -0.001, 0.0]))
    assert weight.tolist() == [-0.25, 0.25, 0.0]


def test_hutchinson_takes_the_handed_over_estimate_as_it_is_and_a_negative_curvature_is_a_sign_step() -> None:
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = Sophia([weight], lr=0.25, betas=(0.9, 0.95), estimator="hutchinson")
    with optimizer.refreshing():
        step(optimizer, weight, torch.tensor([2.0, -2.0], dtype=torch.float64))
    assert optimizer.state[weight]["hessian"].tolist() == pytest.approx([0.1, -0.1])
    step(optimizer, weight, torch.tensor([0.4, 0.4], dtype=torch.float64))  # m = 0.04
    assert weight.tolist() == pytest.approx([-0.25 * 0.04 / 0.1, -0.25])


def release(dtype: torch.dtype, lr: float, inputs: list[torch.Tensor]) -> torch.Tensor:
    """What the SOUL release computes: 0.9 applied to the momentum twice a step, rho B h + 1e-15 with B = 5120."""
    w, m, h = torch.ones(7, dtype=dtype), torch.zeros(7, dtype=dtype), torch.zeros(7, dtype=dtype)
    for g in inputs:
        h = 0.95 * h + 0.05 * g * g
        m = 0.9 * m + 0.1 * g
        m = 0.9 * m + 0.1 * g
        w = w - lr * m.sign() * (m.abs() / (0.04 * 5120 * h + 1e-15)).clamp(max=1)
    return w


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-6),
        # the release rounds each operation to bf16, we each store: the step differs by some 2^-8 of itself (20 x 0.01 x
        # 2^-6), and either rounding of w is off by up to 2^-9 a step, which accumulates like a random walk (20^0.5)
        (BF16, 20 * 0.01 * 2**-6 + 2 * 20**0.5 * 2**-9),
    ],
)
def test_sophia_soul_equals_the_two_updates_of_the_release(dtype: torch.dtype, tolerance: float) -> None:
    inputs = [(0.01 * gradient).to(dtype) for gradient in gradients(20)]  # some steps clipped, some not
    weight = torch.ones(7, dtype=dtype, requires_grad=True)
    optimizer = RULES["sophia_soul"]([weight])
    for g in inputs:
        step(optimizer, weight, g)
    expected = release(dtype, 1e-2, inputs)
    assert (expected - 1).abs().max() > 0.05
    torch.testing.assert_close(weight.detach(), expected, rtol=0 if dtype == BF16 else tolerance, atol=tolerance)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adamw_equals_torchs(dtype: torch.dtype, decay: float) -> None:
    ours, theirs = (torch.ones(7, dtype=dtype, requires_grad=True) for _ in range(2))
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": decay}
    pair = [(AdamW([ours], **settings), ours), (torch.optim.AdamW([theirs], **settings), theirs)]
    for gradient in gradients(30):
        for optimizer, weight in pair:
            step(optimizer, weight, gradient.to(dtype))
    torch.testing.assert_close(ours, theirs, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0)
    assert (ours - 1).abs().max() > 0.1


def test_adamw_in_pure_bf16_equals_torchs_fused_one_to_a_rounding_a_step() -> None:
    """Both compute in fp32 and round each store once; a tie may fall to either side."""
    ours, theirs = (torch.ones(64, dtype=BF16, requires_grad=True) for _ in range(2))
    pair = [(AdamW([ours], lr=1e-2), ours), (torch.optim.AdamW([theirs], lr=1e-2, fused=True), theirs)]
    for gradient in gradients(10, 64):
        for optimizer, weight in pair:
            step(optimizer, weight, gradient.to(BF16))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-8)
    assert (ours == theirs).float().mean() > 0.9


def test_lion_follows_its_definition_coordinate_by_coordinate() -> None:
    lr, (b1, b2), decay = 0.1, (0.5, 0.8), 0.01
    weight = torch.ones(7, dtype=torch.float64, requires_grad=True)
    optimizer = Lion([weight], lr=lr, betas=(b1, b2), weight_decay=decay)
    w, m = [1.0] * 7, [0.0] * 7
    for gradient in gradients(6):
        step(optimizer, weight, gradient)
        u = [math.copysign(1.0, b1 * x + (1 - b1) * float(g)) for x, g in zip(m, gradient, strict=True)]
        w = [x * (1 - lr * decay) - lr * y for x, y in zip(w, u, strict=True)]
        m = [b2 * x + (1 - b2) * float(g) for x, g in zip(m, gradient, strict=True)]
    assert weight.tolist() == pytest.approx(w, rel=1e-12)


# --- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_pure_bf16_loses_the_small_updates_that_the_other_roundings_keep(rule: str) -> None:
    """100 steps of 1e-5 against weights from 0.02 to 0.5, whose neighbours in bf16 lie 1.2e-4 to 2e-3 away."""
    start = (0.02 + 0.48 * torch.rand(20_000, generator=torch.Generator().manual_seed(0))).to(BF16)
    moved = {}
    for rounding in ROUNDINGS:
        weight = start.clone().requires_grad_()
        settings = {"estimator": "gnb", "num_labels": 1} if rule == "sophia_soul" else {}  # h = 0: steps of exactly lr
        optimizer = RULES[rule]([weight], rounding=rounding, **settings)
        for group in optimizer.param_groups:
            group |= {"lr": 1e-5, "weight_decay": 0.0}
        for _ in range(100):
            step(optimizer, weight, torch.ones_like(weight))
        state = optimizer.state[weight]
        end = state["master"] if rounding == "master" else weight.float() + state.get("compensation", 0)
        moved[rounding] = (start.float() - end).detach().double()
    assert (moved["nearest"] == 0).all()
    assert moved["master"].mean().item() == pytest.approx(1e-3, rel=0.02)
    assert moved["kahan"].mean().item() == pytest.approx(1e-3, rel=0.1)  # the compensation is itself rounded to bf16
    assert moved["kahan"].min() > 0.7e-3 and moved["kahan"].max() < 1.4e-3
    assert moved["stochastic"].mean().item() == pytest.approx(1e-3, rel=0.05)


def test_kahan_summation_loses_steps_that_its_second_number_cannot_hold_and_the_others_do_not() -> None:
    """A weight of 1 and steps of 1e-6: the compensation stops at 2^-11, where its numbers lie 2^-19 = 1.9e-6 apart."""
    moved: dict[str, list[float]] = {}
    for rounding in ("kahan", "stochastic", "master"):
        weight = torch.ones(4096, dtype=BF16, requires_grad=True)
        optimizer = Signum([weight], lr=1e-6, beta=0.0, rounding=rounding)
        for number in range(1, 2001):
            step(optimizer, weight, torch.ones_like(weight))
            if number in (1000, 2000):
                state = optimizer.state[weight]
                end = state["master"] if rounding == "master" else weight.float() + state.get("compensation", 0)
                moved.setdefault(rounding, []).append((1 - end.double()).mean().item())
    assert moved["kahan"] == [2**-11, 2**-11]  # 49 % of 1,000 steps, 24 % of 2,000
    for rounding in ("stochastic", "master"):
        assert moved[rounding] == pytest.approx([1e-3, 2e-3], rel=0.03)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", RULES)
def test_a_saved_and_loaded_optimizer_continues_bit_for_bit(rule: str, rounding: str) -> None:
    def make(weight: torch.Tensor) -> Elementwise:
        optimizer = RULES[rule]([weight], rounding=rounding)
        optimizer.param_groups[0]["lr"] = 1e-3  # below what bf16 resolves at 1
        return optimizer

    def run(break_at: int | None) -> tuple[torch.Tensor, dict[str, torch.dtype]]:
        weight = torch.ones(7, dtype=BF16, requires_grad=True)
        optimizer = make(weight)
        for number, gradient in enumerate(gradients(8)):
            if number == break_at:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = make(weight)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            if isinstance(optimizer, Sophia) and number % 3 == 0 and optimizer.estimator != "gradient":
                with optimizer.refreshing():
                    step(optimizer, weight, gradient.flip(0).to(BF16))
            step(optimizer, weight, gradient.to(BF16))
        state = {k: v for k, v in optimizer.state[weight].items() if isinstance(v, torch.Tensor)}
        return torch.cat([v.double() for v in [weight.detach(), *state.values()]]), {
            k: v.dtype for k, v in state.items()
        }

    (full, dtypes), (resumed, resumed_dtypes) = run(None), run(4)
    assert torch.equal(full, resumed)
    wide = torch.float32 if rounding == "master" else BF16
    assert dtypes == resumed_dtypes and dtypes["exp_avg"] == wide


def test_a_state_of_another_precision_is_an_error() -> None:
    weight = torch.ones(3, dtype=BF16, requires_grad=True)
    saved = Lion([weight], rounding="master")
    step(saved, weight, torch.ones(3, dtype=BF16))
    with pytest.raises(
        ValueError, match=r"holds exp_avg in float32, master in float32 and this one keeps exp_avg in bfl"
    ):
        Lion([weight]).load_state_dict(saved.state_dict())


def test_states_have_the_requested_dtype_and_adamws_second_moment_is_precise_by_default() -> None:
    for rounding, wanted, first, second in (
        ("nearest", None, BF16, torch.float32),
        ("nearest", "bfloat16", BF16, BF16),
        ("nearest", "float32", torch.float32, torch.float32),
        ("master", None, torch.float32, torch.float32),
        ("master", "bfloat16", BF16, BF16),
    ):
        weight = torch.ones(3, dtype=BF16, requires_grad=True)
        optimizer = AdamW([weight], rounding=rounding, state_dtype=wanted)
        step(optimizer, weight, torch.ones(3, dtype=BF16))
        state = optimizer.state[weight]
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (first, second)
    weight = torch.ones(3, dtype=BF16, requires_grad=True)
    optimizer = Sophia([weight])
    step(optimizer, weight, torch.ones(3, dtype=BF16))
    assert optimizer.state[weight]["hessian"].dtype == BF16


def test_adamw_in_bf16_takes_the_steps_of_fp32_after_its_gradients_have_become_smaller() -> None:
    """Gradients fall to a tenth after 500 steps; 1,500 later v has to be a quarter, and in bf16 is not.

    A beta2 of 0.999 lowers v by 0.1 % a step, less than half of the 0.4 to 0.8 % between two numbers of bf16.
    """
    moments = {}
    for name, dtype, wanted in (("fp32", torch.float32, None), ("ours", BF16, None), ("bf16", BF16, "bfloat16")):
        weight = torch.zeros(64, dtype=dtype, requires_grad=True)
        optimizer = AdamW([weight], lr=1e-6, weight_decay=0.0, state_dtype=wanted)
        made = torch.Generator().manual_seed(0)
        for number in range(2000):
            scale = 1e-3 if number < 500 else 1e-4
            step(optimizer, weight, (scale * torch.randn(64, generator=made)).to(BF16).to(dtype))
        moments[name] = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    assert moments["ours"] == pytest.approx(moments["fp32"], rel=1e-5)
    assert moments["bf16"] > 3 * moments["fp32"]


def test_stochastic_noise_depends_on_the_seed_alone() -> None:
    def run(seed: int) -> torch.Tensor:
        weights = [torch.ones(50, dtype=BF16, requires_grad=True) for _ in range(2)]
        optimizer = Signum(weights, lr=1e-3, rounding="stochastic", seed=seed)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return torch.cat(weights).detach()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert not torch.equal(run(0)[:50], run(0)[50:])  # nor do two tensors share it


# --- statistics and errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16])
@pytest.mark.parametrize("rule", RULES)
def test_statistics_are_those_of_the_tensors(rule: str, dtype: torch.dtype) -> None:
    weights = [torch.full((5,), 0.5, dtype=dtype, requires_grad=True) for _ in range(2)]
    optimizer = RULES[rule](weights, betas=(0.5, 0.9)) if rule == "sophia" else RULES[rule](weights)
    optimizer.param_groups[0]["lr"] = 2e-3  # some bf16 weights move by a unit, some do not
    expected = torch.zeros(len(STATISTICS), dtype=torch.float64)
    for number, gradient in enumerate(gradients(6, 10)):
        gradient *= 0.01 if rule == "sophia_soul" else 1  # below its clipping, too, at some coordinates
        optimizer.counting = number != 2
        if isinstance(optimizer, Sophia) and number % 2 == 0:
            for weight, g in zip(weights, gradient.flip(0).split(5), strict=True):
                weight.grad = g.to(dtype)
            with optimizer.refreshing():
                optimizer.step()
        before = torch.cat(weights).detach().clone()
        gradient[[0, 7]] = 0
        for weight, g in zip(weights, gradient.split(5), strict=True):
            weight.grad = g.to(dtype)
        optimizer.step()
        after = torch.cat(weights).detach()
        m = torch.cat([optimizer.state[w]["exp_avg"] for w in weights])
        h = torch.zeros_like(m)
        if len(optimizer.states) == 2:
            h = torch.cat([optimizer.state[w][optimizer.states[1]] for w in weights])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        won = (m.abs() < optimizer.param_groups[0].get("scale", 0) * h.to(wide)).sum() if optimizer.clips else 0
        sums = [won, ((m == 0) & (h == 0)).sum(), 10, (before != after).sum()]
        squares = [x.double().square().sum() for x in (m, h, after.double() - before.double())]
        if optimizer.counting:
            expected += torch.tensor([*map(float, sums), *squares, 0], dtype=torch.float64)
    torch.testing.assert_close(optimizer.take_statistics(), expected, rtol=1e-5, atol=0)
    assert optimizer.take_statistics().tolist() == [0.0] * 8
    assert expected[2] == 50 and expected[3] > 0 and (0 < expected[0] < 50) == optimizer.clips


@pytest.mark.parametrize("rule", RULES)
def test_a_coordinate_with_a_gradient_that_is_not_finite_stays_as_it_is(rule: str) -> None:
    weight = torch.ones(5, requires_grad=True)
    optimizer = RULES[rule]([weight])
    step(optimizer, weight, torch.ones(5))
    before = [t.clone() for t in (weight.detach(), *(optimizer.state[weight][name] for name in optimizer.states))]
    bad = torch.tensor([1.0, math.nan, math.inf, -math.inf, 2.0])
    with pytest.raises(FloatingPointError, match="NaN or infinite in 3 of 5 coordinates at step 2"):
        step(optimizer, weight, bad)
    assert optimizer.take_statistics()[7] == 3
    after = [weight.detach(), *(optimizer.state[weight][name] for name in optimizer.states)]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[1:4], other[1:4]) and other.isfinite().all()
    assert (before[0][[0, 4]] != after[0][[0, 4]]).all()
    optimizer.raise_nonfinite = False
    step(optimizer, weight, bad)
    assert optimizer.take_statistics().tolist()[2:] == [0, 0, 0, 0, 0, 3]  # not counting, and counted all the same


def test_a_curvature_pass_that_is_not_finite_leaves_the_curvature() -> None:
    for estimator in ("gnb", "hutchinson"):
        weight = torch.ones(2, requires_grad=True)
        optimizer = Sophia([weight], estimator=estimator)
        with optimizer.refreshing():
            step(optimizer, weight, torch.tensor([1.0, 1.0]))
            with pytest.raises(FloatingPointError, match="1 of 2 coordinates"):
                step(optimizer, weight, torch.tensor([1.0, math.nan]))
        assert optimizer.state[weight]["hessian"].tolist() == pytest.approx([0.05 * 1.95, 0.05])


def test_sparse_gradients_are_errors_before_anything_changes() -> None:
    dense, sparse = torch.ones(2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    optimizer = AdamW([dense, sparse])
    dense.grad, sparse.grad = torch.ones(2), torch.ones(2, 2).to_sparse()
    with pytest.raises(RuntimeError, match=r"shape \(2, 2\) is sparse and AdamW takes dense ones only"):
        optimizer.step()
    assert dense.tolist() == [1.0, 1.0] and not optimizer.state


def test_groups_keep_their_decay_and_frozen_weights_stay_without_a_state() -> None:
    """As with LoRA: the base is frozen, the adapters decay, their biases do not."""
    base, adapter, bias = torch.ones(3), torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    unused = torch.ones(3, requires_grad=True)
    for make in RULES.values():
        optimizer = make([{"params": [adapter, base], "weight_decay": 0.5}, {"params": [bias, unused]}])
        optimizer.param_groups[1]["weight_decay"] = 0.0
        with torch.no_grad():
            adapter.fill_(1.0), bias.fill_(1.0)
        adapter.grad, bias.grad = torch.zeros(3), torch.zeros(3)
        optimizer.step()
        assert adapter.tolist() == pytest.approx([1 - 0.5 * 1e-2] * 3) and bias.tolist() == [1.0] * 3
        assert base.tolist() == unused.tolist() == [1.0] * 3
        assert set(optimizer.state) == {adapter, bias}


def test_splitting_a_tensor_into_shards_changes_nothing() -> None:
    full = torch.ones(6, requires_grad=True)
    shards = [torch.ones(2, requires_grad=True), torch.ones(4, requires_grad=True)]
    one, two = Sophia([full], lr=0.1, rho=0.3), Sophia(shards, lr=0.1, rho=0.3)
    for gradient in gradients(4, 6):
        g = gradient.float()
        for optimizer, tensors in ((one, [(full, g)]), (two, [(shards[0], g[:2]), (shards[1], g[2:])])):
            for tensor, part in tensors:
                tensor.grad = part.clone()
            with optimizer.refreshing():
                optimizer.step()
            optimizer.step()
    assert torch.equal(full, torch.cat(shards))


def test_a_state_dict_round_trip_continues_to_the_same_weights() -> None:
    def run(break_at: int | None) -> torch.Tensor:
        weight = torch.ones(7, dtype=torch.float64, requires_grad=True)
        optimizer = Sophia([weight], lr=0.1, estimator="gradient", interval=3)
        for number, gradient in enumerate(gradients(8)):
            if number == break_at:
                saved = optimizer.state_dict()
                optimizer = Sophia([weight], lr=0.1, estimator="gradient", interval=3)
                optimizer.load_state_dict(saved)
            step(optimizer, weight, gradient)
        return weight.detach()

    assert torch.equal(run(None), run(4))


def test_what_is_not_known_is_an_error() -> None:
    weight = torch.ones(1, requires_grad=True)
    for message, settings in {
        "choose one of gnb, hutchinson, gradient": {"estimator": "fisher"},
        "leave num_labels at 1": {"num_labels": 5120},
        "expected 1 or more": {"interval": 0},
        "choose one of retain, forget, both": {"curvature_on": "all"},
        "has no pass of its own, leave them out": {"estimator": "gradient", "curvature_on": "retain"},
        "is not a number of rows": {"curvature_rows": 0},
        "choose one of nearest, master, kahan, stochastic": {"rounding": "up"},
        "choose float32 or bfloat16": {"state_dtype": "fp8"},
        "these are torch.float32: cast the model to bfloat16": {"rounding": "master"},
    }.items():
        with pytest.raises(ValueError, match=message):
            Sophia([weight], **settings)  # type: ignore[arg-type]


def test_the_defaults_of_an_estimator_are_its_papers() -> None:
    weight = torch.ones(1, requires_grad=True)
    found = {name: Sophia([weight], estimator=name) for name in Sophia.estimators}
    assert {name: o.interval for name, o in found.items()} == {"gnb": 10, "hutchinson": 10, "gradient": 1}
    assert [o.curvature_on for o in found.values()] == ["retain", "retain", None]


def test_signum_moves_every_weight_by_exactly_lr() -> None:
    weight = torch.zeros(3, requires_grad=True)
    optimizer = Signum([weight], lr=0.5, beta=0.9)
    step(optimizer, weight, torch.tensor([1.0, -1e-9, 0.0]))
    assert weight.tolist() == [-0.5, 0.5, 0.0]
    step(optimizer, weight, torch.tensor([-1.0, 1e-9, 0.0]))  # momentum 0.09 - 0.1 < 0
    assert weight.tolist() == [0.0, 0.0, 0.0]
    assert math.isclose(float(optimizer.state[weight]["exp_avg"][0]), -0.01, rel_tol=1e-5)


def test_half_precision_weights_keep_fp32_states() -> None:
    """A squared gradient of 1e-4 is 1e-8, below what fp16 resolves."""
    weight = torch.ones(3, dtype=torch.float16, requires_grad=True)
    optimizer = AdamW([weight], lr=0.125)
    step(optimizer, weight, torch.full((3,), 1e-4, dtype=torch.float16))
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.float32
    assert weight.tolist() == pytest.approx([0.875 - 0.125 * 0.01] * 3, abs=2**-11)
