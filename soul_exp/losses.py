"""What an unlearning run minimises: `forget term + gamma * retain term`.

B sequences, T answer positions, V vocabulary. A term is a plain function of the parts of the batch that it names (each
a `Scored`), of `reference_nll` (frozen start model: part name -> summed answer NLL [B]) and of `reference_logits` (part
name -> [B, T, V]); naming one is what makes it available. Keyword-only parameters are constants that the YAML states.
Every batch mean is a mean over sequences of per-sequence values, so no number depends on how a batch is split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from soul_exp.binding import call, names

IGNORED = -100  # the label of a padded position, torch's own convention


@dataclass(frozen=True)
class Scored:
    """One part of the batch under the current model: `logits` [B, T, V] and `labels` [B, T] over answer positions only.

    Labels are the answer's tokens and its end token; padded positions hold -100.
    """

    logits: Tensor
    labels: Tensor

    @cached_property
    def mask(self) -> Tensor:
        """[B, T], true where there is a label."""
        return self.labels != IGNORED

    @cached_property
    def logp(self) -> Tensor:
        """[B, T] log-probability of each label in nats, 0 where padded; computed in fp32 at least."""
        logits = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
        # flat, because along any but the last dimension torch's softmax takes several times as long
        flat = F.cross_entropy(logits.flatten(0, 1), self.labels.flatten(), ignore_index=IGNORED, reduction="none")
        return -flat.view_as(self.labels)

    @cached_property
    def num_tokens(self) -> Tensor:
        """[B] number of labels of each sequence."""
        return self.mask.sum(1)

    @cached_property
    def nll(self) -> Tensor:
        """[B] summed negative log-likelihood of each sequence's labels."""
        return -self.logp.sum(1)

    @cached_property
    def mean_nll(self) -> Tensor:
        """[B] negative log-likelihood per label of each sequence."""
        return self.nll / self.num_tokens


# --- forget terms -------------------------------------------------------------------------------------------------


def grad_ascent(forget: Scored) -> Tensor:
    """Minus the mean NLL per answer token: falls as the answers become unlikely, unbounded below.

    `-mean(l_i / n_i)`. With a retain term this is gradient difference. Sources: Jang et al. 2022; Maini et al. 2024.
    """
    return -forget.mean_nll.mean()


def po(refusal: Scored) -> Tensor:
    """The NLL per token of a refusal drawn for the same question (preference optimisation, "I don't know").

    `mean(l_i / n_i)` over the refusals. Sources: Maini et al. 2024 (IDK); Jia et al. 2024 (PO).
    """
    return refusal.mean_nll.mean()


def npo(forget: Scored, reference_nll: Mapping[str, Tensor], *, beta: float) -> Tensor:
    """Negative preference optimisation on sequence sums: 2 ln 2 / beta at the start, to 0 as the answers are forgotten.

    `-(2/beta) mean log sigmoid(beta (l_i - l_i(ref)))`. Source: Zhang et al. 2024, eq. 3.
    """
    return -(2 / beta) * F.logsigmoid(beta * (forget.nll - reference_nll["forget"])).mean()


def simnpo(forget: Scored, *, beta: float, margin: float) -> Tensor:
    """NPO without a reference model, on the NLL per token, with `margin` outside `beta`.

    `-(2/beta) mean log sigmoid(beta l_i / n_i - margin)`. Source: Fan et al. 2024.
    """
    return -(2 / beta) * F.logsigmoid(beta * forget.mean_nll - margin).mean()


# --- retain terms -------------------------------------------------------------------------------------------------


def nll(retain: Scored) -> Tensor:
    """The mean NLL per answer token of the retain part: `mean(l_j / n_j)`."""
    return retain.mean_nll.mean()


def kl(retain: Scored, reference_logits: Mapping[str, Tensor]) -> Tensor:
    """Exact `KL(p_ref || p_theta)` in nats: mean over sequences of the mean over answer tokens; 0 at the start."""
    start = F.log_softmax(reference_logits["retain"].float(), dim=-1)
    now = F.log_softmax(retain.logits.float(), dim=-1)
    divergence = (start.exp() * (start - now)).sum(-1)  # [B, T]
    return ((divergence * retain.mask).sum(1) / retain.num_tokens).mean()


RETAIN_TERMS: dict[str, Callable[..., Tensor]] = {"nll": nll, "kl": kl}


# --- their sum ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """`forget_term + gamma * retain_term`; `retain_term` is a name from RETAIN_TERMS, a function, or None for none."""

    forget_term: Callable[..., Tensor]
    retain_term: str | Callable[..., Tensor] | None = "nll"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.retain_term, str) and self.retain_term not in RETAIN_TERMS:
            raise ValueError(
                f"loss.retain_term={self.retain_term} is unknown: choose one of {', '.join(RETAIN_TERMS)} or null"
            )

    @property
    def retain_function(self) -> Callable[..., Tensor] | None:
        return RETAIN_TERMS[self.retain_term] if isinstance(self.retain_term, str) else self.retain_term

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that the terms ask for, each once, in order."""
        terms = [self.forget_term] + ([self.retain_function] if self.retain_function else [])
        return tuple(dict.fromkeys(name for term in terms for name in names(term)))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the batch that the terms ask for."""
        return tuple(name for name in self.names if name not in ("reference_nll", "reference_logits"))

    def terms(self, available: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The forget term and the retain term (None without one), each a scalar, before gamma."""
        retain = self.retain_function
        return call(self.forget_term, available), call(retain, available) if retain else None

    def total(self, forget: Tensor, retain: Tensor | None) -> Tensor:
        return forget if retain is None else forget + self.gamma * retain
