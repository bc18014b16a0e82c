"""Pruning: does removing the smallest weights remove what hides the forgotten?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from soul_exp.attacks.attack import FORGET, Attack, Found, Target
from soul_exp.attacks.quantise import linear_weights
from soul_exp.ranges import SHARE


@dataclass(frozen=True, kw_only=True)
class Prune(Attack):
    """The weights of the smallest magnitude in every linear layer but the output head become 0, `share` of each."""

    share: Sequence[Annotated[float, SHARE]]  # increasing, from 0 on, the model as it is

    def __post_init__(self) -> None:
        self.check("share", first=0)

    def branches(self) -> dict[str, Any]:
        return {"magnitude": self.share}

    def named_points(self) -> Sequence[str]:
        return [str(share) for share in self.share]

    def reads(self) -> Sequence[str]:
        return (f"probe.{FORGET}",)

    def points(self, target: Target, branch: str) -> Found:
        lm, found = target.load(), {}
        for share in self.share:
            for weight in linear_weights(lm):  # what is 0 already is the smallest
                flat = weight.flatten()
                flat[flat.abs().argsort(stable=True)[: int(share * flat.numel())]] = 0
                weight.copy_(flat.view_as(weight))
            found[str(share)] = target.knowledge(lm, target.label)
        return found
