"""Losses against closed forms that a reader can check by hand."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from soul_exp import losses
from soul_exp.binding import call
from soul_exp.losses import Objective, Scored
from soul_exp.losses.terms import COMPUTED

LN2 = math.log(2)


def scored(*nlls: list[float]) -> Scored:
    """Sequences whose labels have the given NLLs, over a vocabulary of two: label 0 has probability exp(-nll)."""
    width = max(map(len, nlls))
    logits, labels = torch.zeros(len(nlls), width, 2, dtype=torch.float64), torch.full((len(nlls), width), -100)
    for i, row in enumerate(nlls):
        for j, nll in enumerate(row):
            p = math.exp(-nll)
            logits[i, j] = torch.tensor([math.log(p), math.log1p(-p)], dtype=torch.float64)
            labels[i, j] = 0
    return Scored(logits, labels)


FORGET = scored([LN2, LN2], [3 * LN2])  # sums 2 ln 2 and 3 ln 2, means ln 2 and 3 ln 2
RETAIN = scored([LN2], [LN2, 2 * LN2, 3 * LN2])  # means ln 2 and 2 ln 2


def test_a_batch_mean_is_over_sequences_not_tokens() -> None:
    assert losses.nll(RETAIN).item() == pytest.approx(1.5 * LN2)  # over tokens it would be 1.75 ln 2


def test_padding_adds_nothing_to_a_sum() -> None:
    assert FORGET.nll.tolist() == pytest.approx([2 * LN2, 3 * LN2])
    assert FORGET.num_tokens.tolist() == [2, 1]


def test_grad_ascent_is_minus_the_mean_nll() -> None:
    assert losses.grad_ascent(FORGET).item() == pytest.approx(-2 * LN2)


def test_po_is_the_nll_of_the_refusal() -> None:
    assert losses.po(RETAIN).item() == pytest.approx(1.5 * LN2)


def test_po_release_leaves_the_end_token_out() -> None:
    # labels ln 2 | end 5; ln 2, 3 ln 2 | end 7: means ln 2 and 2 ln 2
    assert losses.po_release(scored([LN2, 5.0], [LN2, 3 * LN2, 7.0])).item() == pytest.approx(1.5 * LN2)


def test_npo_at_its_reference_is_two_ln2_over_beta() -> None:
    assert losses.npo(FORGET, {"forget": FORGET.nll}, beta=0.1).item() == pytest.approx(2 * LN2 / 0.1)


def test_npo_is_on_sequence_sums() -> None:
    # l - ref = (2 ln 2, 3 ln 2): sigmoid(ln 4) = 4/5, sigmoid(ln 8) = 8/9
    expected = -2 * 0.5 * (math.log(4 / 5) + math.log(8 / 9))
    assert losses.npo(FORGET, {"forget": torch.zeros(2)}, beta=1.0).item() == pytest.approx(expected)


def test_simnpo_is_on_token_means_with_the_margin_outside_beta() -> None:
    # beta 1: sigmoid(ln 2 - ln 2) = 1/2, sigmoid(3 ln 2 - ln 2) = 4/5
    expected = -2 * 0.5 * (math.log(1 / 2) + math.log(4 / 5))
    assert losses.simnpo(FORGET, beta=1.0, margin=LN2).item() == pytest.approx(expected)


def test_kl_is_zero_at_the_start_and_points_from_the_reference_to_the_model() -> None:
    start = torch.tensor([0.9, 0.1], dtype=torch.float64).log().expand(1, 1, 2)
    even = torch.zeros(1, 1, 2, dtype=torch.float64)
    now = Scored(even, torch.zeros(1, 1, dtype=torch.long))
    assert losses.kl(now, {"retain": even}).item() == pytest.approx(0.0, abs=1e-7)
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert losses.kl(now, {"retain": start}).item() == pytest.approx(expected, rel=1e-6)


def test_kl_ignores_padded_positions() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    start = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    before = losses.kl(Scored(logits, labels), {"retain": start})
    start[0, 2] += 100 * torch.arange(5)
    assert losses.kl(Scored(logits, labels), {"retain": start}).item() == pytest.approx(before.item())


def test_gamma_multiplies_the_retain_term() -> None:
    objective = Objective(losses.grad_ascent, "nll", gamma=0.25)
    forget, retain = objective.terms({"forget": FORGET, "retain": RETAIN})
    assert retain is not None
    assert objective.total(forget, retain).item() == pytest.approx(-2 * LN2 + 0.25 * 1.5 * LN2)


def test_an_objective_needs_what_its_terms_name_and_nothing_else() -> None:
    assert Objective(losses.grad_ascent, None).names == ("forget",)
    assert Objective(functools.partial(losses.npo, beta=0.1), "nll").names == ("forget", "reference_nll", "retain")
    assert Objective(losses.po, "kl").parts == ("refusal", "retain")
    rmu = Objective(functools.partial(losses.rmu, steering=1.0, seed=0), "hidden_mse")
    assert rmu.names == ("forget", "hidden", "retain", "reference_hidden") and rmu.parts == ("forget", "retain")
    assert rmu.reads_hidden and not Objective(losses.po, "kl").reads_hidden


def test_an_unknown_retain_term_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="choose one of nll, kl, hidden_mse or null"):
        Objective(losses.po, "l2")


@pytest.mark.parametrize("name", ["grad_ascent", "po", "nll", "ce_u", "random_label"])
def test_gradients_do_not_depend_on_how_a_batch_is_split(name: str) -> None:
    logits = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3], [4, -100, -100], [5, 0, -100], [2, -100, -100]])
    full, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    term = getattr(losses, name)
    term(Scored(full, labels)).backward()
    for rows in (slice(0, 2), slice(2, 4)):
        (term(Scored(parts[rows], labels[rows])) / 2).backward()
    torch.testing.assert_close(full.grad, parts.grad)


# --- every term against loops over sequences and tokens ------------------------------------------------------------

LENGTHS = (4, 1, 3)  # labels of three sequences, padded to four positions
PARTS = ("forget", "refusal", "alternate", "random_label", "retain")
Numbers = Any  # nested lists


def random_values(seed: int = 0) -> dict[str, Any]:
    """The values that a run offers its terms, random: V = 7, H = 5."""
    made = torch.Generator().manual_seed(seed)
    offered: dict[str, Any] = {name: {} for name in ("reference_logits", "reference_nll", "hidden", "reference_hidden")}
    for part in PARTS:
        labels = torch.randint(7, (3, 4), generator=made)
        for row, length in enumerate(LENGTHS):
            labels[row, length:] = -100
        logits = 2 * torch.randn(3, 4, 7, dtype=torch.float64, generator=made)
        start = 2 * torch.randn(3, 4, 7, dtype=torch.float64, generator=made)
        offered[part] = Scored(logits, labels)
        offered["reference_logits"][part] = start
        offered["reference_nll"][part] = torch.tensor(sums(start, labels), dtype=torch.float64)
        offered["hidden"][part] = torch.randn(3, 4, 5, dtype=torch.float64, generator=made)
        offered["reference_hidden"][part] = torch.randn(3, 4, 5, dtype=torch.float64, generator=made)
    return offered


def softmax(logits: Numbers) -> list[float]:
    """The probabilities of one list of logits, in Python's own arithmetic."""
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def sums(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """The summed NLL of each sequence."""
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    return [sum(-math.log(softmax(z)[y]) for z, y in zip(*row, strict=True) if y != -100) for row in rows]


def mean_of(part: Scored, token: Callable[[int, int, int], float]) -> float:
    """The mean over sequences of the mean over their labels of `token(sequence, position, label)`."""
    means = []
    for i, row in enumerate(part.labels.tolist()):
        found = [token(i, t, y) for t, y in enumerate(row) if y != -100]
        means.append(sum(found) / len(found))
    return sum(means) / len(means)


def slow_wga(w: Mapping[str, Any], alpha: float, beta2: float = 0.0) -> float:
    def token(i: int, t: int, y: int) -> float:
        p = softmax(w["forget"].logits[i, t].tolist())[y]
        return p**alpha * (1 - p) ** beta2 * math.log(p)

    return mean_of(w["forget"], token)


def slow_ce_u(w: Mapping[str, Any]) -> float:
    def token(i: int, t: int, y: int) -> float:
        p = softmax(w["forget"].logits[i, t].tolist())
        return -sum(p[v] / (1 - p[y]) * math.log(p[v]) for v in range(7) if v != y)

    return mean_of(w["forget"], token)


def slow_undial(w: Mapping[str, Any], beta: float) -> float:
    def token(i: int, t: int, y: int) -> float:
        start = w["reference_logits"]["forget"][i, t].tolist()
        q = softmax([z - beta * (v == y) for v, z in enumerate(start)])
        p = softmax(w["forget"].logits[i, t].tolist())
        return -sum(q[v] * math.log(p[v]) for v in range(7))

    return mean_of(w["forget"], token)


def slow_kl(w: Mapping[str, Any], part: str) -> float:
    def token(i: int, t: int, y: int) -> float:
        q = softmax(w["reference_logits"][part][i, t].tolist())
        p = softmax(w[part].logits[i, t].tolist())
        return sum(q[v] * math.log(q[v] / p[v]) for v in range(7))

    return mean_of(w[part], token)


def slow_sigmoids(differences: list[float], beta: float, factor: float) -> float:
    return sum(factor * math.log(1 + math.exp(-beta * d)) for d in differences) / len(differences)


def nll_increase(w: Mapping[str, Any], part: str) -> list[float]:
    """The summed NLL of each sequence minus that at the start."""
    before = sums(w["reference_logits"][part], w[part].labels)
    return [now - then for now, then in zip(sums(w[part].logits, w[part].labels), before, strict=True)]


def slow_dpo(w: Mapping[str, Any], preferred: str, beta: float, factor: float) -> float:
    pairs = zip(nll_increase(w, "forget"), nll_increase(w, preferred), strict=True)
    return slow_sigmoids([answer - other for answer, other in pairs], beta, factor)


def slow_nll(w: Mapping[str, Any], part: str) -> float:
    return mean_of(w[part], lambda i, t, y: -math.log(softmax(w[part].logits[i, t].tolist())[y]))


def slow_simnpo(w: Mapping[str, Any], beta: float, margin: float) -> float:
    means = [total / n for total, n in zip(sums(w["forget"].logits, w["forget"].labels), LENGTHS, strict=True)]
    return slow_sigmoids([mean - margin / beta for mean in means], beta, 2 / beta)


def slow_squares(w: Mapping[str, Any], part: str, target: Callable[[int, int], list[float]]) -> float:
    def token(i: int, t: int, y: int) -> float:
        pairs = zip(w["hidden"][part][i, t].tolist(), target(i, t), strict=True)
        return sum((h - goal) ** 2 for h, goal in pairs) / 5

    return mean_of(w[part], token)


def slow_rmu(w: Mapping[str, Any], steering: float, seed: int) -> float:
    u = torch.rand(5, generator=torch.Generator().manual_seed(seed)).tolist()
    length = math.sqrt(sum(x * x for x in u))
    return slow_squares(w, "forget", lambda i, t: [steering * x / length for x in u])


P = functools.partial
TERMS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[Mapping[str, Any]], float]]] = {
    "grad_ascent": (losses.grad_ascent, lambda w: -slow_nll(w, "forget")),
    "wga": (P(losses.wga, alpha=1.5), lambda w: slow_wga(w, 1.5)),
    "satimp": (P(losses.satimp, beta1=2.0, beta2=0.5), lambda w: slow_wga(w, 2.0, 0.5)),
    "ce_u": (losses.ce_u, slow_ce_u),
    "po": (losses.po, lambda w: slow_nll(w, "refusal")),
    "random_label": (losses.random_label, lambda w: slow_nll(w, "random_label")),
    "npo": (P(losses.npo, beta=0.3), lambda w: slow_sigmoids(nll_increase(w, "forget"), 0.3, 2 / 0.3)),
    "npo_release": (
        P(losses.npo_release, beta=0.3),
        lambda w: slow_sigmoids([d / n for d, n in zip(nll_increase(w, "forget"), LENGTHS, strict=True)], 0.3, 2 / 0.3),
    ),
    "simnpo": (P(losses.simnpo, beta=2.0, margin=0.7), lambda w: slow_simnpo(w, 2.0, 0.7)),
    "dpo": (P(losses.dpo, beta=0.3, plain=False), lambda w: slow_dpo(w, "refusal", 0.3, 2 / 0.3)),
    "dpo, plain": (P(losses.dpo, beta=0.3, plain=True), lambda w: slow_dpo(w, "refusal", 0.3, 1.0)),
    "altpo": (P(losses.altpo, beta=0.3), lambda w: slow_dpo(w, "alternate", 0.3, 2 / 0.3)),
    "undial": (P(losses.undial, beta=3.0), lambda w: slow_undial(w, 3.0)),
    "kl_forget": (losses.kl_forget, lambda w: -slow_kl(w, "forget")),
    "rmu": (P(losses.rmu, steering=6.5, seed=3), lambda w: slow_rmu(w, 6.5, 3)),
    "nll": (losses.nll, lambda w: slow_nll(w, "retain")),
    "kl": (losses.kl, lambda w: slow_kl(w, "retain")),
    "hidden_mse": (
        losses.hidden_mse,
        lambda w: slow_squares(w, "retain", lambda i, t: w["reference_hidden"]["retain"][i, t].tolist()),
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_equals_its_definition_in_loops_over_sequences_and_tokens(name: str) -> None:
    term, slow = TERMS[name]
    for seed in range(3):
        offered = random_values(seed)
        assert call(term, offered).item() == pytest.approx(slow(offered), rel=1e-6)  # rmu's u is drawn in fp32


@pytest.mark.parametrize("name", TERMS)
def test_no_term_depends_on_values_at_padded_positions(name: str) -> None:
    offered, other = random_values(), random_values()
    for part in PARTS:
        for row, length in enumerate(LENGTHS):
            for values in (other[part].logits, *(other[key][part] for key in COMPUTED if key != "reference_nll")):
                values[row, length:] = 50.0 * torch.arange(values.shape[-1])
    assert call(TERMS[name][0], offered).item() == call(TERMS[name][0], other).item()


@pytest.mark.parametrize("name", TERMS)
def test_a_term_of_a_batch_is_the_mean_of_its_terms_of_single_sequences(name: str) -> None:
    offered = random_values()
    alone = []
    for row in range(3):
        kept = slice(row, row + 1)
        one = {part: Scored(offered[part].logits[kept], offered[part].labels[kept]) for part in PARTS}
        made = {key: {part: values[kept] for part, values in offered[key].items()} for key in COMPUTED}
        alone.append(call(TERMS[name][0], {**one, **made}).item())
    assert call(TERMS[name][0], offered).item() == pytest.approx(sum(alone) / 3, rel=1e-12)


# --- numbers and directions checked by hand ------------------------------------------------------------------------


def at_start(part: str, *nlls: list[float]) -> tuple[Scored, dict[str, torch.Tensor]]:
    """`scored`, with logits that require a gradient, and the same logits as those of the start model."""
    made = scored(*nlls)
    return Scored(made.logits.requires_grad_(), made.labels), {part: made.logits.detach().clone()}


def test_dpo_is_two_ln2_over_beta_at_the_start_and_ln2_without_the_factor() -> None:
    nlls = {"forget": FORGET.nll, "refusal": RETAIN.nll}
    assert losses.dpo(FORGET, RETAIN, nlls, beta=0.1, plain=False).item() == pytest.approx(2 * LN2 / 0.1)
    assert losses.dpo(FORGET, RETAIN, nlls, beta=0.1, plain=True).item() == pytest.approx(LN2)


def test_altpo_is_two_ln2_over_beta_at_the_start_and_dpo_with_the_alternate_answer() -> None:
    nlls = {"forget": FORGET.nll, "alternate": RETAIN.nll}
    assert losses.altpo(FORGET, RETAIN, nlls, beta=0.1).item() == pytest.approx(2 * LN2 / 0.1)
    # answers 2 ln 2 and 3 ln 2, alternates ln 2 and 6 ln 2, at the start 0: sigmoid(ln 2) = 2/3, sigmoid(-3 ln 2) = 1/9
    nothing = {name: torch.zeros(2) for name in nlls}
    expected = -2 * 0.5 * (math.log(2 / 3) + math.log(1 / 9))
    assert losses.altpo(FORGET, RETAIN, nothing, beta=1.0).item() == pytest.approx(expected)


def test_dpo_compares_sequence_sums() -> None:
    # answers 2 ln 2 and 3 ln 2, refusals ln 2 and 6 ln 2, at the start 0: sigmoid(ln 2) = 2/3, sigmoid(-3 ln 2) = 1/9
    nothing = {"forget": torch.zeros(2), "refusal": torch.zeros(2)}
    expected = -2 * 0.5 * (math.log(2 / 3) + math.log(1 / 9))
    assert losses.dpo(FORGET, RETAIN, nothing, beta=1.0, plain=False).item() == pytest.approx(expected)


def test_wga_weights_a_token_by_its_probability() -> None:
    # (1/2 ln 2 + 1/8 3 ln 2) / 2
    assert losses.wga(FORGET, alpha=1.0).item() == pytest.approx(-0.4375 * LN2)


def test_satimp_weights_a_token_by_its_probability_and_its_complement() -> None:
    # (1/4 ln 2 + 7/64 3 ln 2) / 2
    assert losses.satimp(FORGET, beta1=1.0, beta2=1.0).item() == pytest.approx(-37 / 128 * LN2)


@pytest.mark.parametrize("term", [P(losses.wga, alpha=0.0), P(losses.satimp, beta1=0.0, beta2=0.0)])
def test_with_exponents_of_zero_it_is_gradient_ascent(term: Callable[..., torch.Tensor]) -> None:
    one, other = random_values()["forget"], random_values()["forget"]
    for part, loss in ((one, term), (other, losses.grad_ascent)):
        part.logits.requires_grad_()
        loss(part).backward()
    assert torch.equal(one.logits.grad, other.logits.grad)
    assert term(one).item() == pytest.approx(losses.grad_ascent(other).item(), rel=1e-12)


def test_no_gradient_flows_through_a_weight() -> None:
    """p = 1/2, alpha 1: p (1 - p) = 1/4 on the label's logit; if the weight had one, (1 - ln 2)/4."""
    part, _ = at_start("forget", [LN2])
    losses.wga(part, alpha=1.0).backward()
    assert part.logits.grad is not None
    assert part.logits.grad[0, 0].tolist() == pytest.approx([0.25, -0.25])


def test_satimp_gives_a_certain_token_no_gradient_at_any_exponent() -> None:
    logits = torch.tensor([[[200.0, 0.0]]], requires_grad=True)  # p = 1 in fp32
    losses.satimp(Scored(logits, torch.zeros(1, 1, dtype=torch.long)), beta1=1.0, beta2=0.5).backward()
    assert logits.grad is not None and (logits.grad == 0).all()


def test_ce_u_of_two_tokens_is_minus_the_log_probability_of_the_other() -> None:
    assert losses.ce_u(FORGET).item() == pytest.approx((LN2 + math.log(8 / 7)) / 2)


def test_the_gradient_of_ce_u_on_the_labels_logit_is_its_probability() -> None:
    """The gradient is p - q: p on the label (1/2, so 1/4 of a mean over two sequences), and their sum is 0."""
    part, _ = at_start("forget", [LN2], [20 * LN2])
    losses.ce_u(part).backward()
    assert part.logits.grad is not None
    assert part.logits.grad[0, 0].tolist() == pytest.approx([0.25, -0.25])
    assert 0 < float(part.logits.grad[1, 0, 0]) < 1e-6


def test_undial_has_its_minimum_at_odds_that_are_lower_by_exp_of_beta() -> None:
    # start 1/2, beta ln 3: the label is to have 1/4; now it has 1/8
    start = {"forget": scored([LN2]).logits}
    expected = -(math.log(1 / 8) / 4 + 3 * math.log(7 / 8) / 4)
    assert losses.undial(scored([3 * LN2]), start, beta=math.log(3)).item() == pytest.approx(expected)
    there = scored([2 * LN2])
    there.logits.requires_grad_()
    losses.undial(there, start, beta=math.log(3)).backward()
    assert there.logits.grad is not None and there.logits.grad.abs().max() < 1e-12


def test_undial_has_no_gradient_at_the_start_without_beta_and_lowers_the_labels_logit_with_it() -> None:
    for beta, expected in ((0.0, 0.0), (math.log(3), 0.25)):
        part, start = at_start("forget", [LN2])
        losses.undial(part, start, beta=beta).backward()
        assert part.logits.grad is not None
        assert part.logits.grad[0, 0].tolist() == pytest.approx([expected, -expected], abs=1e-12)


def test_kl_forget_is_0_at_the_start_with_no_gradient_and_falls_with_distance() -> None:
    part, start = at_start("forget", [LN2])
    loss = losses.kl_forget(part, start)
    loss.backward()
    assert part.logits.grad is not None
    assert loss.item() == pytest.approx(0.0, abs=1e-12) and part.logits.grad.abs().max() < 1e-12
    # start 1/2, now 1/8: 1/2 ln 4 + 1/2 ln 4/7
    expected = -(math.log(4) + math.log(4 / 7)) / 2
    assert losses.kl_forget(scored([3 * LN2]), start).item() == pytest.approx(expected)


def test_random_label_is_the_nll_of_the_other_answer() -> None:
    assert losses.random_label(RETAIN).item() == pytest.approx(1.5 * LN2)


def test_rmu_of_zero_output_is_the_squared_steering_coefficient_over_the_width() -> None:
    nothing = {"forget": torch.zeros(2, 2, 4)}
    assert losses.rmu(FORGET, nothing, steering=6.0, seed=0).item() == pytest.approx(9.0)
    there = torch.rand(4, generator=torch.Generator().manual_seed(0))
    arrived = {"forget": (6 * there / there.norm()).expand(2, 2, 4)}
    assert losses.rmu(FORGET, arrived, steering=6.0, seed=0).item() == pytest.approx(0.0, abs=1e-10)
    assert losses.rmu(FORGET, arrived, steering=6.0, seed=1).item() > 0.1


def test_hidden_mse_is_0_at_the_start_and_a_mean_over_coordinates() -> None:
    states = {"retain": torch.randn(2, 3, 4)}
    assert losses.hidden_mse(RETAIN, states, states).item() == 0.0
    assert losses.hidden_mse(RETAIN, states, {"retain": states["retain"] + 2}).item() == pytest.approx(4.0)
