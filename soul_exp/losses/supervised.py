"""Losses that make other answers, or the retained ones, more likely: NLL per token.

B sequences, T answer positions, V vocabulary; sequence i has n_i labels with summed NLL l_i, in nats.
"""

from __future__ import annotations

from torch import Tensor

from soul_exp.losses.scored import Scored


def po(refusal: Scored) -> Tensor:
    """The mean NLL per token of a refusal drawn for the same question (preference optimisation, "I don't know").

    `mean(l_i / n_i)` over the refusals. Sources: Maini et al. 2024 (IDK); Jia et al. 2024 (PO).
    """
    return refusal.mean_nll.mean()


def random_label(random_label: Scored) -> Tensor:
    """The mean NLL per token of another item's answer to the question whose answer is forgotten.

    `mean(l_i / n_i)` over those answers; each visit draws one of several. Sources: Golatkar et al. 2020 (random
    labels); Jia et al. 2024 (SOUL's "RL"), whose release takes the tokens at the same positions in the batch's retain
    rows, cut or padded, and the mean over the batch's tokens, without a retain term.
    """
    return random_label.mean_nll.mean()


def nll(retain: Scored) -> Tensor:
    """The mean NLL per answer token of the retain part: `mean(l_j / n_j)`."""
    return retain.mean_nll.mean()
