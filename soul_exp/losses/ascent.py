"""Losses that make the answers less likely: ascent on their NLL, plain, weighted by token, and bounded.

B sequences, T answer positions, V vocabulary; sequence i has n_i labels with summed NLL l_i, in nats.
p_it is the probability of label t of sequence i; sg(x) is x as a constant, without a gradient.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from soul_exp.losses.scored import Scored, precise
from soul_exp.ranges import NOT_NEGATIVE


def grad_ascent(forget: Scored) -> Tensor:
    """Minus the mean NLL per answer token: falls as the answers become unlikely, unbounded below.

    `-mean(l_i / n_i)`. With a retain term this is gradient difference. Sources: Jang et al. 2022; Maini et al. 2024.
    """
    return -forget.mean_nll.mean()


def wga(forget: Scored, *, alpha: Annotated[float, NOT_NEGATIVE]) -> Tensor:
    """Gradient ascent with token weights p^alpha, so that forgotten tokens count less; `alpha` 0 is `grad_ascent`.

    `mean_i (1/n_i) sum_t sg(p_it^alpha) log p_it`. Source: Wang et al. 2025 (G-effect), weighted gradient ascent.
    Open-unlearning takes the mean over the batch's tokens.
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
    KL(q || p), at most 1 per logit and 0 once the label's probability is 0. Source: Yang 2025 (CE-U),
    with the mean over the batch's tokens; open-unlearning also omits the first token of each answer.
    """
    logits = precise(forget.logits)
    target = logits.detach().scatter(-1, forget.tokens[..., None], float("-inf")).softmax(-1)
    return forget.mean(_cross_entropy(logits, target))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """[B, T] `-sum_v target log softmax(logits)`."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none").view(target.shape[:-1])
