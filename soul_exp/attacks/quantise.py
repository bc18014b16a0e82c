"""Quantisation: do fewer bits per weight undo an unlearning that moved the weights little?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from scipy.stats import norm
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from soul_exp.attacks.attack import FORGET, Attack, Found, Target
from soul_exp.models.language_model import LanguageModel
from soul_exp.ranges import COUNT, Choice

NONE = "none"  # the scheme that leaves every weight as it is
BITS = {"int8": 8, "int4": 4}
NF4 = "nf4"
SCHEMES = (NONE, *BITS, NF4)
CODES = "codes"  # a point: how many weights have the code of the original's
OFFSET = 0.9677083  # of NF4: the largest of its quantiles, the mean of 1 - 1/32 and 1 - 1/30


@dataclass(frozen=True, kw_only=True)
class Quantise(Attack):
    """Every linear layer but the output head computes with weights of few bits, without calibration.

    Round to nearest in `group` weights along the input, of which the last group may have fewer, or NF4 in blocks of as
    many, without double quantisation. Sources: arXiv 2410.16454; of NF4 Dettmers et al. 2023, arXiv 2305.14314.
    """

    scheme: Sequence[Annotated[str, Choice(SCHEMES)]]
    group: Annotated[int, COUNT] = 64

    grid = "scheme"
    reads_original = True

    def __post_init__(self) -> None:
        self.check("scheme", first=NONE)

    def reads(self) -> Sequence[str]:
        return (f"probe.{FORGET}",)

    def memory(self, of_weight: int) -> int:
        return 2 * of_weight  # the original beside the model

    def points(self, target: Target, branch: str) -> Found:
        lm = target.load()
        if branch == NONE:
            return {FORGET: target.knowledge(lm, target.label)}
        same, size = same_codes(lm, target.original(), branch, self.group)
        for weight in linear_weights(lm):
            weight.copy_(dequantised(*quantised(weight, branch, self.group), branch, self.group))
        return {FORGET: target.knowledge(lm, target.label), CODES: {"all": {"same": same, "size": size}}}


def linear_weights(lm: LanguageModel) -> Iterator[Tensor]:
    """The weights [out, in] of every linear layer but the output head, as views that can be written.

    An adapter's own matrices beside their base are none of them.
    """
    head = lm.model.get_output_embeddings()
    for name, module in lm.model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head and ".lora_" not in name:
            weight = module.weight.detach()
            yield weight.T if isinstance(module, Conv1D) else weight


def same_codes(lm: LanguageModel, original: LanguageModel, scheme: str, group: int) -> tuple[float, float]:
    """How many weights have the code of the original's, both on the original's scales, and how many there are."""
    same = size = 0
    for own, before in zip(linear_weights(lm), linear_weights(original), strict=True):
        codes, scales = quantised(before, scheme, group)
        same += int((quantised(own, scheme, group, scales)[0] == codes).sum())
        size += own.numel()
    return float(same), float(size)


def quantised(weight: Tensor, scheme: str, group: int, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [out, in] of `weight`, and scales [out, groups] in fp32: those given, or the least that hold it."""
    width = weight.shape[1]
    grouped = nn.functional.pad(weight.float(), (0, -width % group)).unflatten(1, (-1, group))
    bound = 2 ** (BITS[scheme] - 1) if scheme in BITS else 2  # of NF4 the largest level is 1
    if scales is None:
        scales = grouped.abs().amax(-1) / (bound - 1)
    steps = torch.where(scales[..., None] == 0, 0.0, grouped / scales[..., None]).flatten(1)[:, :width].contiguous()
    if scheme in BITS:
        return steps.round().clamp(-bound, bound - 1), scales  # round is half to even
    levels = nf4_levels().to(weight.device)
    return torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2), scales


def dequantised(codes: Tensor, scales: Tensor, scheme: str, group: int) -> Tensor:
    """The weights [out, in], in fp32, that codes [out, in] and scales [out, groups] stand for."""
    values = codes if scheme in BITS else nf4_levels().to(codes.device)[codes]
    return values * scales.repeat_interleave(group, 1)[:, : codes.shape[1]]


def nf4_levels() -> Tensor:
    """The 16 levels of NF4 in increasing order, from -1 to 1: quantiles of the normal distribution, with an exact 0."""
    above = norm.ppf(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    below = norm.ppf(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    levels = torch.tensor(sorted([*(-below), 0.0, *above]))
    return (levels / levels.max()).float()
