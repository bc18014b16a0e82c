"""Preference optimisation: how much less likely the answers have become than they were, through a sigmoid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from soul_exp.losses.scored import Scored
from soul_exp.ranges import POSITIVE


def npo(forget: Scored, reference_nll: Mapping[str, Tensor], *, beta: Annotated[float, POSITIVE]) -> Tensor:
    """Negative preference optimisation on sequence sums: 2 ln 2 / beta at the start, to 0 as the answers are forgotten.

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
    """Direct preference optimisation of a refusal over the answer: 2 ln 2 / beta at the start, falls to 0.

    `-(2/beta) mean log sigmoid(beta ((l_i - l_i(ref)) - (r_i - r_i(ref))))` on sequence sums, r_i the NLL of the
    refusal that was drawn for the same question. Sources: the code of Zhang et al. 2024 and Fan et al. 2024; `plain`
    leaves the factor 2/beta out, as Rafailov et al. 2023, eq. 7, and TOFU: ln 2 at the start.
    """
    answer, instead = forget.nll - reference_nll["forget"], refusal.nll - reference_nll["refusal"]
    return -(1.0 if plain else 2 / beta) * F.logsigmoid(beta * (answer - instead)).mean()
