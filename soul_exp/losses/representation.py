"""Losses on the output of a layer at answer positions, [B, T, H] by part.

B sequences, T answer positions, H hidden size; sequence i has n_i labels.
h_it is the output of layer `loss.layer` there; ref: in the frozen start model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from soul_exp.losses.scored import Scored, precise
from soul_exp.ranges import POSITIVE, SEED


def rmu(
    forget: Scored, hidden: Mapping[str, Tensor], *, steering: Annotated[float, POSITIVE], seed: Annotated[int, SEED]
) -> Tensor:
    """The mean squared distance of the layer's output on forget answers from `steering` times a random unit vector.

    `mean_i (1/n_i) sum_t ||h_it - c u||^2 / H`, c = `steering`, u uniform on [0, 1)^H drawn from `seed`, then scaled
    to length 1, the same in the whole run. With `retain_term: hidden_mse` gamma is the paper's alpha. Source: Li et al.
    2024 (WMDP). Differences: the paper does not divide by H in either term (its release does); it reads all tokens of
    a text, not answer positions; it trains MLP weights of three layers up to this one, this program all weights, of
    which those above the layer get a gradient only from an `nll` or `kl` retain term.
    """
    states = precise(hidden["forget"])
    u = torch.rand(states.shape[-1], generator=torch.Generator().manual_seed(seed))
    return forget.mean((states - (steering * u / u.norm()).to(states)).square().mean(-1))


def hidden_mse(retain: Scored, hidden: Mapping[str, Tensor], reference_hidden: Mapping[str, Tensor]) -> Tensor:
    """The mean squared distance of the layer's output on retain answers from the start model's; 0 at the start.

    `mean_j (1/n_j) sum_t ||h_jt - h_jt(ref)||^2 / H`: RMU's retain term. Source: Li et al. 2024 (WMDP), over all tokens
    of a text.
    """
    return retain.mean((precise(hidden["retain"]) - precise(reference_hidden["retain"])).square().mean(-1))
