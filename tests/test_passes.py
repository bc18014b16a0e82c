"""The passes before a step: their estimates against exact matrices, and what they must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from soul_exp.data import Encoded, pad
from soul_exp.losses import Scored
from soul_exp.models.layers import AnswerReader
from soul_exp.optim import Sophia
from soul_exp.training import curvature, passes
from soul_exp.training.passes import Batch, Step

# (prompt and answer, number of prompt tokens): answers of 1 to 5 tokens
FORGET = [Encoded([1, 5, 6, 7, 2], 2), Encoded([1, 3, 3, 2], 3), Encoded([4, 9, 8, 7, 6, 2], 1)]
RETAIN = [Encoded([3, 4, 5, 6, 7, 2], 2), Encoded([8, 1, 2], 2), Encoded([9, 9, 4, 2], 1)]
PARTS = {"forget": FORGET, "retain": RETAIN}


@pytest.fixture(scope="module")
def model() -> Any:
    """664 weights in float64, with dropout, which a pass has to switch off."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.5, tie_word_embeddings=False, attention_dropout=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).double().train()


@pytest.fixture(scope="module")
def reader(model: Any) -> AnswerReader:
    return AnswerReader(model)


def batch_of(names: tuple[str, ...], rows: slice = slice(None)) -> Batch:
    chosen = [encoded for name in names for encoded in PARTS[name][rows]]
    numbers = [PARTS[name].index(encoded) for name in names for encoded in PARTS[name][rows]]  # copies share theirs
    return {**pad(chosen, 0), "rows": torch.tensor(numbers)}


def step_of(model: Any, reader: AnswerReader, number: int = 0, micro: int = 3) -> Step:
    """A step on all rows in micro-batches of `micro` rows of each part, each given as the slice of its rows."""
    micro_batches: list[Any] = [slice(start, start + micro) for start in range(0, 3, micro)]

    def loss(forward: Any, rows: Any) -> Tensor:
        return nll(forward, reader, ("forget",), rows)

    return Step(
        number=number, micro_batches=micro_batches, num_rows=micro, model=model, module=model, engine=None,
        reader=reader,
        cut_to=lambda rows, names: batch_of(tuple(names), rows), loss=loss,
        terms=lambda forward, rows: (-loss(forward, rows), nll(forward, reader, ("retain",), rows)),
        seed=0, rank=0, num_ranks=1,
    )  # fmt: skip


def nll(model: Any, reader: AnswerReader, names: tuple[str, ...], rows: slice = slice(None)) -> Tensor:
    """The sum over parts of the mean over their rows of the NLL per token."""
    total = torch.zeros((), dtype=torch.float64)
    for name in names:
        batch = batch_of((name,), rows)
        total = total + Scored(reader(model, batch), batch["labels"]).mean_nll.mean()
    return total


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def hessian_diagonal(model: Any, reader: AnswerReader, names: tuple[str, ...]) -> Tensor:
    """Exact: one backward pass through the gradient for each of the weights."""
    params = list(model.parameters())
    with curvature.twice_differentiable_attention(model):
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(nll(model, reader, names), params, create_graph=True)]
        )
    columns = []
    for i in range(len(gradient)):
        rows = torch.autograd.grad(gradient[i], params, retain_graph=True, materialize_grads=True)
        columns.append(flat(rows)[i])
    return torch.stack(columns)


def gauss_newton_diagonal(model: Any, reader: AnswerReader, names: tuple[str, ...]) -> Tensor:
    """Exact: `diag sum_t w_t J_t' (diag p_t - p_t p_t') J_t`, w_t = 1 / (S n_i), with the Jacobian row by row."""
    params, diagonal = list(model.parameters()), 0.0
    for name in names:
        batch = batch_of((name,))
        logits, mask = reader(model, batch), batch["labels"] != -100
        for i in range(len(mask)):
            for t in range(int(mask[i].sum())):
                p = logits[i, t].softmax(0).detach()
                jacobian = torch.stack(
                    [
                        flat(torch.autograd.grad(z, params, retain_graph=True, materialize_grads=True))
                        for z in logits[i, t]
                    ]
                )
                weight = 1 / (len(mask) * int(mask[i].sum()))
                diagonal = diagonal + weight * ((p[:, None] * jacobian**2).sum(0) - (p @ jacobian) ** 2)
    assert isinstance(diagonal, Tensor)
    return diagonal


def estimates(model: Any, reader: AnswerReader, estimator: str, on: str, samples: int) -> tuple[Tensor, Tensor]:
    """Mean of `samples` estimates, and the standard error of each coordinate, before any moving average."""
    mean, square = torch.zeros(2, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    # beta2 = 0: h is the last estimate itself
    sophia = Sophia(model.parameters(), betas=(0.9, 0.0), estimator=estimator, curvature_on=on)
    for number in range(samples):
        curvature.refresh_curvature(step_of(model, reader, number), sophia)
        h = flat(sophia.state[p]["hessian"] for p in model.parameters())
        mean, square = mean + h / samples, square + h**2 / samples
    return mean, ((square - mean**2).clamp(min=0) / samples).sqrt()


@pytest.mark.parametrize(
    ("estimator", "exact", "on", "samples", "tolerance"),
    [
        ("gnb", gauss_newton_diagonal, "retain", 2000, 0.05),
        ("gnb", gauss_newton_diagonal, "both", 2000, 0.05),
        ("hutchinson", hessian_diagonal, "retain", 3000, 0.15),
        pytest.param("hutchinson", hessian_diagonal, "both", 1500, 0.25, marks=pytest.mark.slow),
    ],
)
def test_the_mean_estimate_converges_to_the_exact_diagonal(
    estimator: str,
    exact: Callable[..., Tensor],
    on: str,
    samples: int,
    tolerance: float,
    model: Any,
    reader: AnswerReader,
) -> None:
    """Sequences of unequal length, float64: all within `tolerance` of the norm, each coordinate within 6 s.e."""
    diagonal = exact(model.eval(), reader, curvature.CURVATURE_PARTS[on])
    mean, error = estimates(model.train(), reader, estimator, on, samples)
    assert float((mean - diagonal).norm() / diagonal.norm()) < tolerance
    assert ((mean - diagonal).abs() <= 6 * error + 1e-9).all()


def test_gnb_is_exact_where_a_step_holds_copies_of_a_row(
    model: Any, reader: AnswerReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three copies of one row: labels drawn once for all of them would make the estimate 3 times the diagonal."""
    monkeypatch.setitem(PARTS, "retain", [RETAIN[0]] * 3)
    diagonal = gauss_newton_diagonal(model.eval(), reader, ("retain",))
    mean, error = estimates(model.train(), reader, "gnb", "retain", 1000)
    assert float((mean - diagonal).norm() / diagonal.norm()) < 0.08
    assert ((mean - diagonal).abs() <= 6 * error + 1e-9).all()


def test_hutchinson_of_copies_of_a_row_is_that_of_the_row(
    model: Any, reader: AnswerReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARTS, "retain", [RETAIN[0]] * 3)
    step = step_of(model.eval(), reader, Sophia(model.parameters(), estimator="hutchinson"))
    one = curvature.hutchinson(step, [batch_of(("retain",), slice(0, 1))], ("retain",), 1)
    three = curvature.hutchinson(step, [batch_of(("retain",))], ("retain",), 3)
    assert float((flat(three) - flat(one)).norm() / flat(one).norm()) < 1e-5  # the model's norms compute in fp32


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
@pytest.mark.parametrize("on", ["forget", "both"])
def test_an_estimate_does_not_depend_on_the_split_into_micro_batches(
    estimator: str, on: str, model: Any, reader: AnswerReader
) -> None:
    def one(micro: int) -> Tensor:
        sophia = Sophia(model.parameters(), betas=(0.9, 0.0), estimator=estimator, curvature_on=on)
        curvature.refresh_curvature(step_of(model, reader, micro=micro), sophia)
        return flat(sophia.state[p]["hessian"] for p in model.parameters())

    torch.testing.assert_close(one(1), one(3), rtol=1e-9, atol=1e-12)


def test_places_and_parts_are_sampled_independently(model: Any, reader: AnswerReader) -> None:
    """Copies of a row, and one place in two parts, draw different labels: else cross terms would not vanish."""
    logits = torch.zeros(6, 5, 1000)
    batch = {"places": torch.tensor([0, 1, 2, 0, 1, 2]), "labels": torch.zeros(6, 5, dtype=torch.long)}
    labels = curvature.sampled_labels(logits, batch, ["forget", "retain"], (0, 0))
    assert all((labels[i] != labels[j]).all() for i in range(6) for j in range(i))
    again = curvature.sampled_labels(logits[3:], {k: v[3:] for k, v in batch.items()}, ["retain"], (0, 0))
    assert torch.equal(again, labels[3:])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_curvature_sub_batch_is_drawn_and_depends_on_neither_split_nor_rank(
    rows: int, model: Any, reader: AnswerReader
) -> None:
    """`curvature_rows` rows a part, each step others; their mean is over those rows only."""

    def read(number: int, micro: int, num_ranks: int) -> list[int]:
        found: list[int] = []
        for rank in range(num_ranks):
            step = step_of(model, reader, number, micro)
            step = replace(step, micro_batches=step.micro_batches[rank::num_ranks], rank=rank, num_ranks=num_ranks)
            batches, num_rows = curvature._batches(step, ["forget", "retain"], rows)
            assert num_rows == rows
            for batch in batches:
                some = (batch["labels"] >= 0).any(1)
                found += batch["rows"][some].tolist()
                assert torch.equal(batch["places"][some], batch["rows"][some])  # row i stands at place i of the step
        return sorted(found)

    for number in range(6):
        chosen = read(number, 3, 1)
        assert len(chosen) == 2 * rows and len(set(chosen)) == rows  # the same positions of both parts
        assert read(number, 1, 1) == read(number, 1, 3) == chosen
    assert len({tuple(read(number, 3, 1)) for number in range(6)}) > 1


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_a_curvature_pass_moves_nothing_but_the_curvature(estimator: str, model: Any, reader: AnswerReader) -> None:
    """Weights, momentum, step count, gradients, random state and training mode stay; attention is as it was."""
    before = copy.deepcopy(model.train().state_dict())
    sophia = Sophia(model.parameters(), lr=1e-3, estimator=estimator)
    random = torch.get_rng_state()
    curvature.refresh_curvature(step_of(model, reader), sophia)
    assert torch.equal(random, torch.get_rng_state()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    for p in model.parameters():
        state = sophia.state[p]
        assert p.grad is None and (state["exp_avg"] == 0).all() and int(state["step"]) == 0
        assert (state["hessian"] != 0).any()


def test_the_gradients_of_both_terms_and_their_cosine_are_those_of_autograd(model: Any, reader: AnswerReader) -> None:
    model.eval()
    params = list(model.parameters())
    forget = -flat(torch.autograd.grad(nll(model, reader, ("forget",)), params))
    retain = flat(torch.autograd.grad(nll(model, reader, ("retain",)), params))
    found = passes.gradient_conflict(step_of(model.train(), reader, micro=1))
    assert found["forget_gradient_norm"] == pytest.approx(float(forget.norm()), rel=1e-5)
    assert found["retain_gradient_norm"] == pytest.approx(float(retain.norm()), rel=1e-5)
    assert found["gradient_cosine"] == pytest.approx(float(forget @ retain / forget.norm() / retain.norm()), rel=1e-5)


def test_a_term_without_a_gradient_has_no_cosine(model: Any, reader: AnswerReader) -> None:
    step = step_of(model, reader)
    saturated = replace(step, terms=lambda forward, rows: (0 * step.loss(forward, rows), step.loss(forward, rows)))
    found = passes.gradient_conflict(saturated)
    assert found["forget_gradient_norm"] == 0 and found["retain_gradient_norm"] > 0 and "gradient_cosine" not in found
