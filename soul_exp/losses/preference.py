"""Preference optimisation: likelihoods compared with those of the frozen start model (ref), through a sigmoid.

B sequences, T answer positions, V vocabulary; sequence i has n_i labels with summed NLL l_i, in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from soul_exp.losses.scored import Scored
from soul_exp.ranges import POSITIVE


def npo(forget: Scored, reference_nll: Mapping[str, Tensor], *, beta: Annotated[float, POSITIVE]) -> Tensor:
    """Negative preference optimisation on sequence sums: 2 ln 2 / beta at the start, 0 once the answers are forgotten.

    `-(2/beta) mean log sigmoid(beta (l_i - l_i(ref)))`. Source: Zhang et al. 2024, eq. 3.
    """
    return -(2 / beta) * F.logsigmoid(beta * (forget.nll - reference_nll["forget"])).mean()


def simnpo(forget: Scored, *, beta: Annotated[float, POSITIVE], margin: float) -> Tensor:
    """NPO without a reference model, on the NLL per token, with `margin` outside `beta`.

    `-(2/beta) mean log sigmoid(beta l_i / n_i - margin)`. Source: Fan et al. 2024.
    """
    return -(2 / beta) * F.logsigmoid(beta * forget.mean_nll - margin).mean()


def dpo(
    forget: Scored,
    refusal: Scored,
    reference_nll: Mapping[str, Tensor],
    *,
    beta: Annotated[float, POSITIVE],
    plain: bool,
) -> Tensor:
    """Direct preference optimisation: a refusal is preferred to the answer; 2 ln 2 / beta at the start, bounded by 0.

    `-(2/beta) mean log sigmoid(beta ((l_i - l_i(ref)) - (r_i - r_i(ref))))` on sequence sums, r_i the NLL of the
    refusal that was drawn for the same question. Sources: the code of Zhang et al. 2024 and Fan et al. 2024; `plain`
    omits the factor 2/beta, as Rafailov et al. 2023, eq. 7, and TOFU: ln 2 at the start.
    """
    answer, instead = forget.nll - reference_nll["forget"], refusal.nll - reference_nll["refusal"]
    return -(1.0 if plain else 2 / beta) * F.logsigmoid(beta * (answer - instead)).mean()
