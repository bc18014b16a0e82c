"""Muon: orthogonalised momentum for hidden matrices, AdamW for everything else."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

ROLES = ("hidden", "embedding", "other")  # the values of a group's key `role`


class Muon(Optimizer):
    """Moves 2-D hidden weights by `torch.optim.Muon` at `lr`, all others by `torch.optim.AdamW` at `adam_ratio lr`.

    The key `role` of a group is "hidden" (the default), "embedding" or "other". Tensors that are not 2-D go to AdamW in
    every group. Muon's steps are scaled by 0.2 sqrt(larger side), which gives them AdamW's usual root mean square, so
    that one rate and one weight decay serve both (Liu et al. 2025, arXiv 2502.16982, section 2.2): hence `adam_ratio` =
    1. Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), whose momentum of 0.95 is the default.
    """

    elementwise = False

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        adam_ratio: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not (lr > 0 and adam_ratio > 0 and eps > 0 and weight_decay >= 0):
            found = f"lr={lr}, adam_ratio={adam_ratio}, eps={eps}, weight_decay={weight_decay}"
            raise ValueError(f"{found}: expected positive numbers (weight_decay: or 0)")
        if not all(0 <= beta < 1 for beta in (momentum, *betas)):
            raise ValueError(f"momentum={momentum}, betas={betas}: expected numbers from 0 to below 1")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.param_groups = [part for group in self.param_groups for part in _split(group)]
        for group in self.param_groups:
            if group["role"] != "hidden":
                group["lr"] *= adam_ratio
        hidden, others = self._sides()
        self._muon = self._adam = None
        if hidden:
            self._muon = torch.optim.Muon(hidden, lr, weight_decay, momentum, nesterov, adjust_lr_fn="match_rms_adamw")
        if others:
            self._adam = torch.optim.AdamW(others, lr * adam_ratio, (betas[0], betas[1]), eps, weight_decay)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.enable_grad():
            value = closure() if closure is not None else None
        for part in filter(None, (self._muon, self._adam)):
            part.step()
        return value

    def __setstate__(self, state: dict[str, Any]) -> None:  # where load_state_dict puts what it read
        super().__setstate__(state)
        self._share()

    def _sides(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        hidden = [group for group in self.param_groups if group["role"] == "hidden"]
        return hidden, [group for group in self.param_groups if group["role"] != "hidden"]

    def _share(self) -> None:
        """Let both parts use the groups of this optimizer, which a schedule changes, and its state."""
        for part, groups in zip((self._muon, self._adam), self._sides(), strict=True):
            if part is not None:
                part.__setstate__({"state": self.state, "param_groups": groups})


def _split(group: dict[str, Any]) -> list[dict[str, Any]]:
    """`group` as a group of hidden matrices and a group of the rest, whichever of them is not empty."""
    role = group.get("role", "hidden")
    if role not in ROLES:
        raise ValueError(f"a group's role is {role!r}: expected one of {', '.join(ROLES)}")
    if role != "hidden":
        return [group]
    matrices = [p for p in group["params"] if p.ndim == 2]
    rest = [p for p in group["params"] if p.ndim != 2]
    found = [{**group, "params": matrices, "role": "hidden"}, {**group, "params": rest, "role": "other"}]
    return [part for part in found if part["params"]]
