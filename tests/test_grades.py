"""The optimizers that are not elementwise: zeroth order, alternation, sharpness, orthogonalisation, influence."""

import copy
import functools
import io
import math
from collections.abc import Callable
from typing import Any

import hydra.utils
import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from torch import Tensor

from soul_exp import compose
from soul_exp.optim import SAM, AdamW, Hybrid, Influence, MeZO, Muon, Sophia, woodfisher_bytes

SGD = functools.partial(torch.optim.SGD, momentum=0.0)
CURVATURES = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)  # of the quadratic below
SHAPES = {"hidden": [(6, 4), (4, 8)], "embedding": [(10, 4)], "other": [(4,), (8,)]}


def quadratic(weight: Tensor) -> Tensor:
    """`sum_i c_i w_i^2 / 2`, whose gradient is c w."""
    return (CURVATURES.to(weight.dtype) * weight**2).sum() / 2


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def model(dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Three groups of parameters as the trainer makes them, the same at every call."""
    groups: list[dict[str, Any]] = [{"role": role} for role in SHAPES]
    for group, shapes in zip(groups, SHAPES.values(), strict=True):
        group["params"] = [torch.nn.Parameter(random(shape, i, dtype)) for i, shape in enumerate(shapes)]
    groups[2]["weight_decay"] = 0.0
    return groups


def tensors(groups: list[dict[str, Any]]) -> list[torch.nn.Parameter]:
    return [p for group in groups for p in group["params"]]


def loss_of(groups: list[dict[str, Any]], number: int) -> Tensor:
    """Another linear-quartic function at every step."""
    params = tensors(groups)
    terms = [(p * random(tuple(p.shape), 100 * number + i, p.dtype) + p**4).mean() for i, p in enumerate(params)]
    return torch.stack(terms).sum()


def advance(optimizer: Any, groups: list[dict[str, Any]], number: int) -> None:
    """Step `number` as the trainer takes it, whatever the optimizer wants beforehand."""
    if getattr(optimizer, "zeroth", False):
        optimizer.estimate(lambda: loss_of(groups, number))
    else:
        loss_of(groups, number).backward()
        if hasattr(optimizer, "ascend"):
            optimizer.ascend()
            loss_of(groups, number).backward()
    optimizer.step()
    optimizer.zero_grad()


MAKERS: dict[str, Callable[..., Any]] = {
    "mezo": functools.partial(MeZO, lr=1e-2, num_samples=2, weight_decay=0.1),
    "hybrid": functools.partial(
        Hybrid, lr=1e-2, first_order=AdamW, zeroth_order=functools.partial(MeZO, lr=1e-3), first_steps=2
    ),
    "sam": functools.partial(SAM, lr=1e-2, base=AdamW),
    "sam of torch's": functools.partial(SAM, lr=1e-2, base=functools.partial(torch.optim.AdamW, weight_decay=0.1)),
    "sam of muon": functools.partial(SAM, lr=1e-2, base=Muon),
    "muon": functools.partial(Muon, lr=1e-2, weight_decay=0.1, adam_ratio=0.5),
    "soap": functools.partial(hydra.utils.get_object("pytorch_optimizer.SOAP"), lr=1e-2, precondition_frequency=2),
}


# --- all of them ------------------------------------------------------------------------------------------------------


def trained(make: Callable[..., Any], break_at: int | None, steps: int = 7) -> Tensor:
    """The weights after `steps` steps of a decaying rate; at `break_at` everything is saved and built anew."""

    def built(groups: list[dict[str, Any]]) -> tuple[Any, Any]:
        optimizer = make(groups)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1 - number / steps)

    groups = model()
    optimizer, scheduler = built(groups)
    for number in range(steps):
        if number == break_at:
            file = io.BytesIO()
            torch.save([[p.detach() for p in tensors(groups)], optimizer.state_dict(), scheduler.state_dict()], file)
            file.seek(0)
            weights, state, schedule = torch.load(file, weights_only=True)
            groups = model()
            optimizer, scheduler = built(groups)
            with torch.no_grad():
                for p, weight in zip(tensors(groups), weights, strict=True):
                    p.copy_(weight)
            optimizer.load_state_dict(state)
            scheduler.load_state_dict(schedule)
        advance(optimizer, groups, number)
        scheduler.step()
    return torch.cat([p.detach().flatten() for p in tensors(groups)])


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("break_at", [1, 2, 5])
def test_a_run_that_is_saved_and_resumed_ends_at_the_same_bits(name: str, break_at: int) -> None:
    assert torch.equal(trained(MAKERS[name], None), trained(MAKERS[name], break_at))


@pytest.mark.parametrize("name", MAKERS)
def test_a_scheduler_that_sets_the_rate_to_zero_stops_every_weight(name: str) -> None:
    groups = model()
    optimizer = MAKERS[name](groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: float(number < 4))
    for number in range(4):
        advance(optimizer, groups, number)
        scheduler.step()
    before = [p.detach().clone() for p in tensors(groups)]
    assert not torch.equal(before[0], tensors(model())[0])
    optimizer.load_state_dict(optimizer.state_dict())  # which replaces the groups that the scheduler knows
    for number in range(4, 8):
        advance(optimizer, groups, number)
        scheduler.step()
    # an ascent is undone exactly, and a probe but for its rounding
    atol = 1e-6 if name in ("mezo", "hybrid") else 0.0
    for p, weight in zip(tensors(groups), before, strict=True):
        torch.testing.assert_close(p.detach(), weight, rtol=0, atol=atol)


@pytest.mark.parametrize("name", MAKERS)
def test_accelerate_wraps_it_and_nothing_changes(name: str) -> None:
    ends = []
    for wrap in (False, True):
        groups = model()
        optimizer = MAKERS[name](groups)
        wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer) if wrap else optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1 / (1 + number))
        for number in range(3):
            advance(optimizer if not wrap else Unwrapped(optimizer, wrapped), groups, number)
            scheduler.step()
        ends.append(torch.cat([p.detach().flatten() for p in tensors(groups)]))
    assert torch.equal(*ends)


class Unwrapped:
    """What the trainer sees: `step` and `zero_grad` go through accelerate, all else to the optimizer."""

    def __init__(self, inner: Any, outer: Any) -> None:
        self.inner, self.step, self.zero_grad = inner, outer.step, outer.zero_grad

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("name", ["mezo", "hybrid", "sam", "muon", "soap", "influence"])
def test_an_entry_of_conf_builds_its_optimizer_on_the_groups_of_the_trainer(name: str) -> None:
    entry = OmegaConf.merge({"seed": 0}, {"optimizer": OmegaConf.load(compose.conf_dir() / f"optimizer/{name}.yaml")})
    OmegaConf.resolve(entry)
    make = hydra.utils.instantiate(entry.optimizer, _convert_="all")
    groups = model()
    optimizer = make(groups)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {entry.optimizer.lr}
    assert getattr(optimizer, "elementwise", False) is False
    if name != "influence":
        for number in range(2):
            advance(optimizer, groups, number)
        assert not torch.equal(tensors(groups)[0], tensors(model())[0])


# --- zeroth order -----------------------------------------------------------------------------------------------------


def test_the_mean_of_many_zeroth_order_estimates_is_the_gradient() -> None:
    """Within 4 standard errors of 20,000 directions; a coordinate's variance is `||g||^2 + g_i^2`, exact here."""
    samples = 20_000
    start = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    weight = start.clone().requires_grad_()
    optimizer = MeZO([weight], lr=1.0, num_samples=samples)
    optimizer.estimate(lambda: quadratic(weight))
    optimizer.step()
    found, gradient = start - weight.detach(), CURVATURES * start
    error = ((gradient.square().sum() + gradient**2) / samples).sqrt()
    assert ((found - gradient).abs() < 4 * error).all()
    assert (error < 0.03).all()  # so that this is a test


def test_zeroth_order_steps_descend_a_quadratic() -> None:
    weight = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer = MeZO([weight], lr=0.02)
    losses = []
    for _ in range(300):
        losses.append(optimizer.estimate(lambda: quadratic(weight)))
        optimizer.step()
    assert losses[0] == pytest.approx(2.0, abs=1e-4)  # the mean over both sides adds epsilon^2 z'Hz / 2
    assert losses[-1] < 1e-3 * losses[0]


def test_a_zeroth_order_step_follows_its_definition() -> None:
    """On a linear loss `a w` the slope along z is `a z`, so one step shows z, and the second one that z is new."""
    lr, decay, slope = 0.25, 0.5, torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = MeZO([weight], lr=lr, weight_decay=decay, epsilon=1e-3)
    directions = []
    for _ in range(2):
        before, seen = weight.detach().clone(), []
        optimizer.estimate(lambda seen=seen: (seen.append(weight.detach().clone()), slope @ weight)[1])
        z = (seen[0] - seen[1]) / 2e-3
        torch.testing.assert_close((seen[0] + seen[1]) / 2, before)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), before * (1 - lr * decay) - lr * (slope @ z) * z, rtol=1e-9, atol=0)
        directions.append(z)
    assert (directions[0] - directions[1]).abs().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_an_estimate_leaves_the_weights_where_they_were(dtype: torch.dtype) -> None:
    """16-bit weights to the bit; others within 4 roundings of the largest number in between."""
    groups = model(dtype)
    before = [p.detach().clone() for p in tensors(groups)]
    optimizer = MeZO(groups, lr=1e-3, num_samples=3)
    for number in range(20):
        optimizer.estimate(lambda number=number: loss_of(groups, number))
    for p, weight in zip(tensors(groups), before, strict=True):
        atol = 0.0 if dtype.itemsize == 2 else 60 * 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(p.detach(), weight, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_that_is_not_finite_is_raised_with_the_weights_restored(dtype: torch.dtype) -> None:
    weight = torch.ones(3, dtype=dtype, requires_grad=True)
    optimizer = MeZO([weight], lr=1e-3)
    with pytest.raises(FloatingPointError, match=r"the loss is nan and inf .*: expected finite numbers"):
        optimizer.estimate(iter([math.nan, math.inf]).__next__)
    torch.testing.assert_close(weight.detach(), torch.ones(3, dtype=dtype))
    with pytest.raises(ZeroDivisionError):
        optimizer.estimate(lambda: 1 / 0)
    torch.testing.assert_close(weight.detach(), torch.ones(3, dtype=dtype))
    with pytest.raises(RuntimeError, match=r"call estimate\(loss\) before each step"):
        optimizer.step()


def test_each_zeroth_order_step_wants_an_estimate_of_its_own() -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = MeZO([weight], lr=1e-3)
    optimizer.estimate(lambda: quadratic(weight))
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"call estimate\(loss\) before each step"):
        optimizer.step()


# --- first and zeroth order in turn -----------------------------------------------------------------------------------


def test_hybrid_takes_first_and_zeroth_order_steps_in_the_declared_turn() -> None:
    weight = torch.ones(3, requires_grad=True)
    mezo = functools.partial(MeZO, lr=1e-3)
    optimizer = Hybrid([weight], lr=0.1, first_order=SGD, zeroth_order=mezo, first_steps=2, zeroth_steps=3)
    turns = []
    for _ in range(10):
        turns.append(optimizer.zeroth)
        before = weight.detach().clone()
        if optimizer.zeroth:
            optimizer.estimate(lambda: quadratic(weight))
            weight.grad = torch.full((3,), 7.0)  # a gradient that is left over is not taken
        else:
            weight.grad = torch.ones(3)
        optimizer.step()
        if not turns[-1]:
            torch.testing.assert_close(weight.detach(), before - 0.1)
    assert turns == [False, False, True, True, True] * 2


def test_the_schedule_of_hybrid_scales_both_rates() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = Hybrid([weight], lr=0.1, first_order=SGD, zeroth_order=functools.partial(MeZO, lr=1e-3))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 0.5**number)
    weight.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    scheduler.step()
    optimizer.estimate(lambda: quadratic(weight))
    optimizer.step()
    assert optimizer.zeroth_order.param_groups[0]["lr"] == pytest.approx(0.5e-3, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05, rel=1e-12)


def test_hybrid_rejects_optimizers_that_it_cannot_run() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    mezo = functools.partial(MeZO, lr=1e-3)
    with pytest.raises(ValueError, match="expected 1 or more of each"):
        Hybrid([weight], lr=0.1, first_order=SGD, zeroth_order=mezo, zeroth_steps=0)
    with pytest.raises(ValueError, match=r"zeroth_order is SGD: expected one with estimate\(\)"):
        Hybrid([weight], lr=0.1, first_order=SGD, zeroth_order=functools.partial(SGD, lr=1.0))
    with pytest.raises(ValueError, match="first_order is Sophia: expected an elementwise optimizer"):
        Hybrid([weight], lr=0.1, first_order=Sophia, zeroth_order=mezo)
    with pytest.raises(ValueError, match="first_order is Muon: expected an elementwise optimizer"):
        Hybrid([weight], lr=0.1, first_order=Muon, zeroth_order=mezo)
    inner = functools.partial(Hybrid, first_order=SGD, zeroth_order=mezo)
    with pytest.raises(ValueError, match="base is Hybrid: expected one that needs a gradient only"):
        SAM([weight], lr=0.1, base=inner)
    with pytest.raises(ValueError, match="base is SAM: expected one that needs a gradient only"):
        SAM([weight], lr=0.1, base=functools.partial(SAM, base=SGD))
    with pytest.raises(ValueError, match="first_order states an lr of its own"):
        Hybrid([weight], lr=0.1, first_order=functools.partial(SGD, lr=1.0), zeroth_order=mezo)
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(ValueError, match="do not see zeroth-order steps"):
        Hybrid([half], lr=0.1, first_order=functools.partial(AdamW, rounding="master"), zeroth_order=mezo)
    optimizer = Hybrid([weight], lr=0.1, first_order=SGD, zeroth_order=mezo)
    with pytest.raises(RuntimeError, match="before a first-order step"):
        optimizer.estimate(lambda: 0.0)


# --- sharpness --------------------------------------------------------------------------------------------------------


def test_sam_on_a_quadratic_equals_its_closed_form() -> None:
    """g = c w; the gradient at w + r g / |g| is c (w + r g / |g|), and SGD steps from w."""
    lr, radius = 0.1, 0.3
    weights = [torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)]
    params = [w.clone().requires_grad_() for w in weights]
    optimizer = SAM([{"params": [p]} for p in params], lr=lr, base=SGD, radius=radius)
    w = torch.cat(weights)
    for _ in range(5):
        quadratic(torch.cat(params)).backward()
        optimizer.ascend()
        assert all(p.grad is None for p in params)
        ascent = torch.cat([p.detach() for p in params]) - w
        assert ascent.norm().item() == pytest.approx(radius, rel=1e-12)  # one norm over all groups
        quadratic(torch.cat(params)).backward()
        optimizer.step()
        optimizer.zero_grad()
        g = CURVATURES * w
        w = w - lr * CURVATURES * (w + radius * g / g.norm())
        torch.testing.assert_close(torch.cat([p.detach() for p in params]), w, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sam_comes_back_to_the_very_weights(dtype: torch.dtype) -> None:
    groups = model(dtype)
    before = [p.detach().clone() for p in tensors(groups)]
    optimizer = SAM(groups, lr=1e-3, base=SGD, radius=0.5)
    loss_of(groups, 0).backward()
    optimizer.ascend()
    assert not any(torch.equal(p, weight) for p, weight in zip(tensors(groups), before, strict=True))
    for p in tensors(groups):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, weight) for p, weight in zip(tensors(groups), before, strict=True))


def test_sam_stays_at_a_zero_gradient_and_raises_at_one_that_is_not_finite() -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = SAM([weight], lr=0.5, base=SGD)
    weight.grad = torch.zeros(3)
    optimizer.ascend()
    assert weight.tolist() == [1.0] * 3
    weight.grad = torch.ones(3)
    optimizer.step()
    assert weight.tolist() == [0.5] * 3
    weight.grad = torch.tensor([1.0, math.inf, 0.0])
    with pytest.raises(FloatingPointError, match="norm of the gradient is inf"):
        optimizer.ascend()
    assert weight.tolist() == [0.5] * 3


def test_sam_saved_after_its_ascent_comes_back_to_the_same_weights() -> None:
    ends = []
    for resumed in (False, True):
        groups = model()
        optimizer = SAM(groups, lr=1e-2, base=AdamW)
        loss_of(groups, 0).backward()
        optimizer.ascend()
        if resumed:
            weights, state = [p.detach().clone() for p in tensors(groups)], copy.deepcopy(optimizer.state_dict())
            groups = model()
            for p, weight in zip(tensors(groups), weights, strict=True):
                p.data.copy_(weight)
            optimizer = SAM(groups, lr=1e-2, base=AdamW)
            optimizer.load_state_dict(state)
        loss_of(groups, 0).backward()
        optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in tensors(groups)]))
    assert torch.equal(*ends)


def test_sam_rejects_steps_out_of_order_and_bases_without_a_gradient() -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = SAM([weight], lr=0.1, base=SGD)
    with pytest.raises(RuntimeError, match=r"call ascend\(\) before each step"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"ascend\(\) found no gradient"):
        optimizer.ascend()
    weight.grad = torch.ones(3)
    optimizer.ascend()
    with pytest.raises(RuntimeError, match=r"ascend\(\) was called twice"):
        optimizer.ascend()
    with pytest.raises(ValueError, match="base is MeZO"):
        SAM([weight], lr=0.1, base=MeZO)
    with pytest.raises(ValueError, match="base states an lr of its own"):
        SAM([weight], lr=0.1, base=functools.partial(SGD, lr=1.0))
    with pytest.raises(ValueError, match="expected positive numbers"):
        SAM([weight], lr=0.1, base=SGD, radius=0.0)


# --- orthogonalised momentum ------------------------------------------------------------------------------------------


def test_muon_equals_torchs_two_optimizers_on_their_own_weights() -> None:
    lr, ratio, decay = 1e-2, 0.5, 0.1
    ours, theirs = model(), model()
    optimizer = Muon(ours, lr=lr, weight_decay=decay, adam_ratio=ratio)
    muon = torch.optim.Muon(theirs[0]["params"], lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    rest = [{"params": theirs[1]["params"]}, {"params": theirs[2]["params"], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(rest, lr=lr * ratio, weight_decay=decay)
    for number in range(4):
        advance(optimizer, ours, number)
        loss_of(theirs, number).backward()
        for one in (muon, adam):
            one.step()
            one.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(tensors(ours), tensors(theirs), strict=True))


def test_muon_orthogonalises_a_hidden_matrix_and_no_other() -> None:
    """A first step of lr 1 with equal singular values: each side's are 0.2 sqrt(8) within Newton and Schulz's 30 %."""
    hidden, embedding = (torch.zeros(8, 8, requires_grad=True) for _ in range(2))
    groups = [{"params": [hidden], "role": "hidden"}, {"params": [embedding], "role": "embedding"}]
    optimizer = Muon(groups, lr=1.0)
    hidden.grad = random((8, 8), 0, torch.float32)
    embedding.grad = hidden.grad.clone()
    optimizer.step()
    singular = torch.linalg.svdvals(hidden.detach()) / (0.2 * math.sqrt(8))
    assert ((singular > 0.6) & (singular < 1.3)).all()
    torch.testing.assert_close(embedding.detach(), -embedding.grad.sign(), rtol=1e-5, atol=1e-5)  # Adam's first step


def test_muon_takes_two_dimensional_tensors_for_hidden_where_no_role_is_given() -> None:
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(3, 2), (3,), (2, 2, 2)]]
    optimizer = Muon(params, lr=0.1)
    assert [(group["role"], len(group["params"])) for group in optimizer.param_groups] == [("hidden", 1), ("other", 2)]
    with pytest.raises(ValueError, match="role is 'head': expected one of hidden, embedding, other"):
        Muon([{"params": params, "role": "head"}], lr=0.1)
    with pytest.raises(ValueError, match="expected numbers from 0 to below 1"):
        Muon(params, lr=0.1, momentum=1.0)
    for only in (params[:1], params[1:]):  # a model of one kind
        groups = [{"params": only}]
        for p in only:
            p.grad = torch.ones_like(p)
        Muon(groups, lr=0.1).step()
        assert all(p.abs().sum() > 0 for p in only)


# --- influence --------------------------------------------------------------------------------------------------------

NUM_SAMPLES, SIZES = 5, ((3, 2), (4,), (2, 2))  # 14 weights in three tensors


def influence_step(rows: Tensor, gradient: Tensor, **settings: Any) -> Tensor:
    """[14] the change of the weights that one step makes, in two groups; rows [N, 14] are the samples' gradients."""
    params = [torch.nn.Parameter(torch.zeros(size, dtype=rows.dtype)) for size in SIZES]
    groups = [{"params": params[:1], "weight_decay": 0.3}, {"params": params[1:]}]
    optimizer = Influence(groups, num_samples=len(rows), **settings)

    def set_gradient(flat: Tensor) -> None:
        for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = part.reshape(p.shape).clone()

    for row in rows:
        set_gradient(row)
        optimizer.add_sample()
        assert all(p.grad is None for p in params)
    set_gradient(gradient)
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


def test_woodfisher_equals_the_inverse_of_the_matrix_written_out() -> None:
    rows, gradient, damping = random((NUM_SAMPLES, 14), 0), random((14,), 1), 0.01
    matrix = rows.T @ rows / NUM_SAMPLES + damping * torch.eye(14, dtype=torch.float64)
    found = influence_step(rows, gradient, lr=0.5, damping=damping, inverse="woodfisher", ratio=0.25)
    torch.testing.assert_close(found, -0.5 * 0.25 * torch.linalg.inv(matrix) @ gradient, rtol=1e-10, atol=1e-10)
    single = influence_step(rows.float(), gradient.float(), lr=0.5, damping=damping, inverse="woodfisher", ratio=0.25)
    torch.testing.assert_close(single, found.float(), rtol=1e-5, atol=1e-5)


def test_woodfisher_equals_its_recursion_in_any_order_of_the_samples() -> None:
    """`A_0 = I / lambda; A_{n+1} = A_n - A_n g g' A_n / (N + g' A_n g)`."""
    rows, gradient, damping = random((NUM_SAMPLES, 14), 0), random((14,), 1), 0.01
    inverse = torch.eye(14, dtype=torch.float64) / damping
    for g in rows:
        inverse = inverse - torch.outer(inverse @ g, g @ inverse) / (NUM_SAMPLES + g @ inverse @ g)
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        found = influence_step(rows[order], gradient, lr=1.0, damping=damping, inverse="woodfisher")
        torch.testing.assert_close(found, -inverse @ gradient, rtol=1e-10, atol=1e-10)


def test_blocks_of_columns_do_not_change_woodfisher(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, gradient = random((NUM_SAMPLES, 14), 0), random((14,), 1)
    full = influence_step(rows, gradient, lr=1.0, damping=0.1, inverse="woodfisher")
    monkeypatch.setattr("soul_exp.optim.influence.BLOCK", 4)
    split = influence_step(rows, gradient, lr=1.0, damping=0.1, inverse="woodfisher")
    torch.testing.assert_close(split, full, rtol=1e-12, atol=1e-12)


def test_the_diagonal_inverse_divides_by_the_mean_square_and_the_damping() -> None:
    rows, gradient = random((NUM_SAMPLES, 14), 0), random((14,), 1)
    expected = -0.5 * 2.0 * gradient / (rows.square().mean(0) + 0.01)
    found = influence_step(rows, gradient, lr=0.5, damping=0.01, ratio=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_weights_without_a_gradient_stay_and_have_no_part_in_the_curvature() -> None:
    rows, gradient, damping = random((3, 4), 0), random((2,), 1), 0.1
    first, second = (torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer = Influence([first, second], lr=1.0, damping=damping, num_samples=3, inverse="woodfisher")
    for row in rows:
        first.grad, second.grad = row[:2].clone(), row[2:].clone()
        optimizer.add_sample()
    first.grad = gradient.clone()
    optimizer.step()
    matrix = rows[:, :2].T @ rows[:, :2] / 3 + damping * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(first.detach(), -torch.linalg.solve(matrix, gradient), rtol=1e-10, atol=1e-10)
    assert second.tolist() == [0.0, 0.0]


def test_influence_is_one_step_with_exactly_its_samples() -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = Influence([weight], lr=0.1, damping=1.0, num_samples=2)
    weight.grad = torch.ones(3)
    optimizer.add_sample()
    weight.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="found 1 of num_samples=2 samples"):
        optimizer.step()
    optimizer.add_sample()
    with pytest.raises(RuntimeError, match="more than num_samples=2 times"):
        optimizer.add_sample()
    with pytest.raises(RuntimeError, match="found no gradient"):
        optimizer.step()
    weight.grad = torch.ones(3)
    optimizer.step()
    assert weight.tolist() == pytest.approx([1 - 0.1 * 1 / (1 + 1)] * 3)
    resumed = Influence([weight], lr=0.1, damping=1.0, num_samples=2)
    resumed.load_state_dict(optimizer.state_dict())
    for one in (optimizer, resumed):
        with pytest.raises(RuntimeError, match="one step, and it was taken"):
            one.step()


def test_woodfisher_tells_what_it_would_store_before_it_does() -> None:
    """1024 samples of 2^20 weights in float32 are 4 GiB; a meta tensor has no storage to take any from."""
    assert woodfisher_bytes(2**20, 1024) == 4 * 2**30
    weight = torch.nn.Parameter(torch.empty(2**20, device="meta"))
    settings: dict[str, Any] = {"lr": 1.0, "damping": 1.0, "num_samples": 1024}
    Influence([weight], **settings, inverse="woodfisher", memory_gib=4.0)
    Influence([weight], **settings, inverse="diagonal", memory_gib=0.1)
    with pytest.raises(
        ValueError, match=r"needs 4 GiB for 1024 samples of 1048576 weights, more than memory_gib=3.9: "
    ):
        Influence([weight], **settings, inverse="woodfisher", memory_gib=3.9)


def test_influence_rejects_unknown_options() -> None:
    weight = torch.ones(1, requires_grad=True)
    for settings, message in [
        ({"inverse": "kfac"}, "choose one of diagonal, woodfisher"),
        ({"estimator": "gradient"}, "choose one of fisher, gnb"),
        ({"hessian": "forget"}, "choose one of retain, all"),
        ({"damping": 0.0}, "expected positive numbers"),
        ({"num_samples": 0}, "expected 1 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            Influence([weight], **{"lr": 1.0, "damping": 1.0, "num_samples": 1, **settings})
    optimizer = Influence([weight], lr=1.0, damping=1.0, num_samples=1)
    weight.grad = torch.tensor([math.nan])
    with pytest.raises(FloatingPointError, match="a gradient is not finite"):
        optimizer.add_sample()


def test_mezo_rejects_invalid_numbers() -> None:
    weight = torch.ones(1, requires_grad=True)
    for settings in ({"lr": 0.0}, {"epsilon": 0.0}, {"weight_decay": -1.0}, {"num_samples": 0}):
        with pytest.raises(ValueError, match=r"expected positive numbers|expected 1 or more"):
            MeZO([weight], **{"lr": 1.0, **settings})
