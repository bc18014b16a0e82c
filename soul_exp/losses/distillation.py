"""Losses that compare distributions over the vocabulary with those of the frozen start model (ref).

B sequences, T answer positions, V vocabulary; sequence i has n_i labels with summed NLL l_i, in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from soul_exp.losses.scored import Scored, precise
from soul_exp.ranges import POSITIVE


def undial(forget: Scored, reference_logits: Mapping[str, Tensor], *, beta: Annotated[float, POSITIVE]) -> Tensor:
    """Cross entropy to the start model's distribution with the label's logit lowered by `beta` (0: unchanged).

    `-mean_i (1/n_i) sum_t sum_v q_itv log p_itv`, q = softmax(z(ref) - beta 1[v = label]), z logits. At its minimum
    the odds of the label are those at the start times exp(-beta); the other tokens keep their ratios. Source: Dong et
    al. 2024 (UnDIAL), without a retain term. The paper takes the mean over tokens, open-unlearning over padding too.
    """
    start_logits = precise(reference_logits["forget"])
    shift = start_logits.new_full((*start_logits.shape[:-1], 1), -beta)
    lowered = start_logits.scatter_add(-1, forget.tokens[..., None], shift)
    return forget.mean(-(lowered.softmax(-1) * F.log_softmax(precise(forget.logits), dim=-1)).sum(-1))


def kl_forget(forget: Scored, reference_logits: Mapping[str, Tensor]) -> Tensor:
    """Minus the exact `KL(p_ref || p_theta)` of the forget answers, in nats: 0 at the start, unbounded below.

    `-mean_i (1/n_i) sum_t KL_it`: ascent away from the start model. Its gradient there is 0 too, so the retain term
    takes the first step. SOUL's own KL is another loss: `-gamma H_forget + H_retain`, with gamma at the forget term
    and the cross entropy H(p_theta, p_ref) over all positions, prompts and padding included, whose gradient at the
    start is that of the entropy. Source: Jia et al. 2024, for the idea.
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
