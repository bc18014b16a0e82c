"""The forget terms, the retain terms and their sum; docs/losses.md states how they differ from their sources.

B sequences, T answer positions, V vocabulary, H hidden size; sequence i has n_i labels with summed NLL l_i, in nats.
p_it is the probability of label t of sequence i, h_it the output of layer `loss.layer` there; ref: in the frozen start
model. sg(x) is x as a constant, without a gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from soul_exp.binding import call, names
from soul_exp.losses.scored import Scored, precise
from soul_exp.ranges import INDEX, NOT_NEGATIVE, POSITIVE, SEED

__all__ = [
    "RETAIN_TERMS", "Objective", "altpo", "ce_u", "dpo", "grad_ascent", "hidden_mse", "kl", "kl_forget", "nll", "npo",
    "npo_release", "po", "po_release", "random_label", "rmu", "satimp", "simnpo", "undial", "wga",
]  # fmt: skip

# ---- Make the answers less likely.


def grad_ascent(forget: Scored) -> Tensor:
    """Minus the mean NLL per answer token: falls as the answers become unlikely, unbounded below.

    `-mean(l_i / n_i)`. With a retain term this is gradient difference. Sources: Jang et al. 2022; Maini et al. 2024.
    """
    return -forget.mean_nll.mean()


def wga(forget: Scored, *, alpha: Annotated[float, NOT_NEGATIVE]) -> Tensor:
    """Gradient ascent with token weights p^alpha, so that forgotten tokens count less; `alpha` 0 is `grad_ascent`.

    `mean_i (1/n_i) sum_t sg(p_it^alpha) log p_it`. Source: Wang et al. 2025 (G-effect), weighted gradient ascent.
    """
    weight = (alpha * forget.logp.detach()).exp()
    return forget.mean(weight * forget.logp)


def satimp(forget: Scored, *, beta1: Annotated[float, NOT_NEGATIVE], beta2: Annotated[float, NOT_NEGATIVE]) -> Tensor:
    """Gradient ascent with token weights p^beta1 (1-p)^beta2; both 0 is `grad_ascent`, `beta2` 0 alone is `wga`.

    `mean_i (1/n_i) sum_t sg(p_it^beta1 (1 - p_it)^beta2) log p_it`: p^beta1 lowers the weight of tokens that are
    forgotten enough (saturation), (1-p)^beta2 that of easy tokens (importance). A label with p = 1
    therefore gets no gradient. Source: Yang et al. 2025 (SatImp). Open-unlearning takes the mean over tokens.
    """
    logp = forget.logp.detach()
    weight = (beta1 * logp).exp() * (-torch.expm1(logp)).clamp(min=0) ** beta2
    return forget.mean(weight * forget.logp)


def ce_u(forget: Scored) -> Tensor:
    """Cross entropy to the model's own distribution without the label: its gradient on the label's logit is p_it.

    `-mean_i (1/n_i) sum_t sum_v q_itv log p_itv`, q = sg(softmax of the logits with the label's at -inf): H(q) minus
    log(1 - p_it), so it falls as the label becomes unlikely and is bounded below by 0. The gradient is that of the mean
    KL(q || p), at most 1 per logit and 0 once the label's probability is 0. Source: Yang 2025 (CE-U).
    """
    logits = precise(forget.logits)
    target = logits.detach().scatter(-1, forget.tokens[..., None], float("-inf")).softmax(-1)
    terms = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none")
    return forget.mean(terms.view(target.shape[:-1]))


# ---- Compare distributions with those of the start model.


def undial(forget: Scored, reference_logits: Mapping[str, Tensor], *, beta: Annotated[float, POSITIVE]) -> Tensor:
    """Cross entropy to the start model's distribution with the label's logit lowered by `beta` (0: unchanged).

    `-mean_i (1/n_i) sum_t sum_v q_itv log p_itv`, q = softmax(z(ref) - beta 1[v = label]), z logits. At its minimum the
    odds of the label are those at the start times exp(-beta). Source: Dong et al. 2024 (UnDIAL), without a retain term.
    """
    start_logits = precise(reference_logits["forget"])
    shift = start_logits.new_full((*start_logits.shape[:-1], 1), -beta)
    lowered = start_logits.scatter_add(-1, forget.tokens[..., None], shift)
    return forget.mean(-(lowered.softmax(-1) * F.log_softmax(precise(forget.logits), dim=-1)).sum(-1))


def kl_forget(forget: Scored, reference_logits: Mapping[str, Tensor]) -> Tensor:
    """Minus the exact `KL(p_ref || p_theta)` of the forget answers, in nats: 0 at the start, unbounded below.

    `-mean_i (1/n_i) sum_t KL_it`: ascent away from the start model. Its gradient there is 0 too, so the retain term
    takes the first step. Source: Jia et al. 2024, for the idea; SOUL's own KL is another loss.
    """
    return -_divergence(forget, reference_logits["forget"])


def kl(retain: Scored, reference_logits: Mapping[str, Tensor]) -> Tensor:
    """Exact `KL(p_ref || p_theta)` in nats: mean over sequences of the mean over answer tokens; 0 at the start."""
    return _divergence(retain, reference_logits["retain"])


def _divergence(part: Scored, reference: Tensor) -> Tensor:
    """The mean KL from `reference` logits [B, T, V] to those of `part`."""
    start = F.log_softmax(precise(reference), dim=-1)
    now = F.log_softmax(precise(part.logits), dim=-1)
    return part.mean((start.exp() * (start - now)).sum(-1))


# ---- Compare likelihoods with those of the start model, through a sigmoid.


def npo(forget: Scored, reference_nll: Mapping[str, Tensor], *, beta: Annotated[float, POSITIVE]) -> Tensor:
    """Negative preference optimisation on sequence sums: 2 ln 2 / beta at the start, 0 once the answers are forgotten.

    `-(2/beta) mean log sigmoid(beta (l_i - l_i(ref)))`. Source: Zhang et al. 2024, eq. 3.
    """
    return -(2 / beta) * F.logsigmoid(beta * (forget.nll - reference_nll["forget"])).mean()


def npo_release(forget: Scored, reference_nll: Mapping[str, Tensor], *, beta: Annotated[float, POSITIVE]) -> Tensor:
    """`npo` on token means, as the SOUL release computes it: 2 ln 2 / beta at the start.

    `-(2/beta) mean log sigmoid(beta (l_i - l_i(ref)) / n_i)`: the loss of the release's batches, which hold one
    sequence. Its gradient at the start is 1/n_i of that of `npo`. Source: the code of Jia et al. 2024.
    """
    increase = (forget.nll - reference_nll["forget"]) / forget.num_tokens
    return -(2 / beta) * F.logsigmoid(beta * increase).mean()


def simnpo(forget: Scored, *, beta: Annotated[float, POSITIVE], margin: float) -> Tensor:
    """NPO without a reference model, on the NLL per token, with `margin` outside `beta`.

    `-(2/beta) mean log sigmoid(beta l_i / n_i - margin)`. Source: Fan et al. 2024.
    """
    return -(2 / beta) * F.logsigmoid(beta * forget.mean_nll - margin).mean()


def dpo(
    forget: Scored, refusal: Scored, reference_nll: Mapping[str, Tensor],
    *, beta: Annotated[float, POSITIVE], plain: bool,
) -> Tensor:  # fmt: skip
    """Direct preference optimisation: a refusal is preferred to the answer; 2 ln 2 / beta at the start, bounded by 0.

    `-(2/beta) mean log sigmoid(beta ((l_i - l_i(ref)) - (r_i - r_i(ref))))` on sequence sums, r_i the NLL of the
    refusal that was drawn for the same question. Sources: the code of Zhang et al. 2024 and Fan et al. 2024; `plain`
    omits the factor 2/beta, as Rafailov et al. 2023, eq. 7, and TOFU: ln 2 at the start.
    """
    preferred = _preference(forget, refusal, reference_nll["forget"], reference_nll["refusal"], beta)
    return -(1.0 if plain else 2 / beta) * preferred


def altpo(
    forget: Scored, alternate: Scored, reference_nll: Mapping[str, Tensor], *, beta: Annotated[float, POSITIVE]
) -> Tensor:
    """Alternate preference optimisation: another plausible answer is preferred; 2 ln 2 / beta at the start, at least 0.

    `-(2/beta) mean log sigmoid(beta ((l_i - l_i(ref)) - (a_i - a_i(ref))))` on sequence sums, a_i the NLL of the
    alternate answer that was drawn for the same question. Source: Mekala et al. 2025 (AltPO).
    """
    return -(2 / beta) * _preference(forget, alternate, reference_nll["forget"], reference_nll["alternate"], beta)


def _preference(answer: Scored, other: Scored, answer_nll: Tensor, other_nll: Tensor, beta: float) -> Tensor:
    """The mean log-probability, in nats, that `other` is preferred to `answer`; both have an NLL [B] at the start."""
    return F.logsigmoid(beta * ((answer.nll - answer_nll) - (other.nll - other_nll))).mean()


# ---- Make other answers, or the retained ones, more likely.


def po(refusal: Scored) -> Tensor:
    """The mean NLL per token of a refusal drawn for the same question (preference optimisation, "I don't know").

    `mean(l_i / n_i)` over the refusals. Sources: Maini et al. 2024 (IDK); Jia et al. 2024 (PO).
    """
    return refusal.mean_nll.mean()


def po_release(fixed_refusal: Scored) -> Tensor:
    """`po` as the SOUL release computes it: one refusal fixed for each row, no end token, the original answer's mask.

    `mean((l_i - l_i(end)) / (n_i - 1))`, of rows whose attention mask is that of the original answer: tokens of the
    refusal beyond the length of the original answer are learned, but no position attends to them. The task's part
    `fixed_refusal` has such rows. Source: the code of Jia et al. 2024.
    """
    last = fixed_refusal.num_tokens - 1
    taught = torch.arange(fixed_refusal.labels.shape[1], device=last.device) < last[:, None]
    return -(fixed_refusal.logp.masked_fill(~taught, 0.0).sum(1) / last).mean()


def random_label(random_label: Scored) -> Tensor:
    """The mean NLL per token of another item's answer to the question whose answer is forgotten.

    `mean(l_i / n_i)` over those answers; each visit draws one of several. Sources: Golatkar et al. 2020; Jia et al.
    2024.
    """
    return random_label.mean_nll.mean()


def nll(retain: Scored) -> Tensor:
    """The mean NLL per answer token of the retain part: `mean(l_j / n_j)`."""
    return retain.mean_nll.mean()


# ---- Move the output of a layer, or hold it.


def rmu(
    forget: Scored, hidden: Mapping[str, Tensor], *, steering: Annotated[float, POSITIVE], seed: Annotated[int, SEED]
) -> Tensor:
    """The mean squared distance of the layer's output on forget answers from `steering` times a random unit vector.

    `mean_i (1/n_i) sum_t ||h_it - c u||^2 / H`, c = `steering`, u uniform on [0, 1)^H drawn from `seed`, then scaled to
    length 1, the same in the whole run. With `retain_term: hidden_mse` gamma is the paper's alpha. All weights are
    trained; those above the layer get a gradient only from an `nll` or `kl` retain term. Source: Li et al. 2024 (WMDP).
    """
    states = precise(hidden["forget"])
    u = torch.rand(states.shape[-1], generator=torch.Generator().manual_seed(seed))
    return forget.mean((states - (steering * u / u.norm()).to(states)).square().mean(-1))


def hidden_mse(retain: Scored, hidden: Mapping[str, Tensor], reference_hidden: Mapping[str, Tensor]) -> Tensor:
    """The mean squared distance of the layer's output on retain answers from the start model's; 0 at the start.

    `mean_j (1/n_j) sum_t ||h_jt - h_jt(ref)||^2 / H`: RMU's retain term. Source: Li et al. 2024 (WMDP).
    """
    return retain.mean((precise(hidden["retain"]) - precise(reference_hidden["retain"])).square().mean(-1))


RETAIN_TERMS: dict[str, Callable[..., Tensor]] = {"nll": nll, "kl": kl, "hidden_mse": hidden_mse}
COMPUTED = ("reference_nll", "reference_logits", "hidden", "reference_hidden")  # by the run, for each part


@dataclass(frozen=True)
class Objective:
    """`forget_term + gamma * retain_term`; `retain_term` is a name from RETAIN_TERMS, a function, or None for none.

    `hidden` and `reference_hidden` are the output of `layer`, counted from 0; None: `layer_of` chooses.
    """

    forget_term: Callable[..., Tensor]
    retain_term: str | Callable[..., Tensor] | None = "nll"
    gamma: Annotated[float, NOT_NEGATIVE] = 1.0
    layer: Annotated[int | None, INDEX] = None

    def __post_init__(self) -> None:
        if isinstance(self.retain_term, str) and self.retain_term not in RETAIN_TERMS:
            found = f"loss.retain_term={self.retain_term} is unknown"
            raise ValueError(f"{found}: choose one of {', '.join(RETAIN_TERMS)} or null")

    @property
    def retain_function(self) -> Callable[..., Tensor] | None:
        return RETAIN_TERMS[self.retain_term] if isinstance(self.retain_term, str) else self.retain_term

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all values that the terms need, each once, in order."""
        terms = [self.forget_term] + ([self.retain_function] if self.retain_function else [])
        return tuple(dict.fromkeys(name for term in terms for name in names(term)))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the batch that the terms need."""
        return tuple(name for name in self.names if name not in COMPUTED)

    @property
    def reads_hidden(self) -> bool:
        """Whether a term needs the output of a layer of the model being trained."""
        return "hidden" in self.names

    def terms(self, available: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The forget term and the retain term (None without one), each a scalar, before gamma."""
        retain = self.retain_function
        return call(self.forget_term, available), call(retain, available) if retain else None

    def total(self, forget: Tensor, retain: Tensor | None) -> Tensor:
        return forget if retain is None else forget + self.gamma * retain
