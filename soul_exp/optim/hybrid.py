"""Hybrid: first- and zeroth-order steps in turn."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Hybrid(Optimizer):
    """`first_steps` steps of `first_order`, `zeroth_steps` of `zeroth_order`, and again, on the same weights.

    Both are callables that build an optimizer on given params: the first with `lr=lr`, the second with its own rate. A
    schedule acts on this optimizer's groups, which are the first one's; the second one's rate changes in proportion.
    Source: the alternation is Lang et al. 2025 (arXiv 2510.00761); its two counts are ours.
    """

    elementwise = False

    def __init__(
        self,
        params: Any,
        lr: float,
        first_order: Callable[..., Optimizer],
        zeroth_order: Callable[..., Optimizer],
        first_steps: int = 1,
        zeroth_steps: int = 1,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr={lr}: expected a number above 0")
        if first_steps < 1 or zeroth_steps < 1:
            raise ValueError(f"first_steps={first_steps}, zeroth_steps={zeroth_steps}: expected 1 or more of each")
        if "lr" in getattr(first_order, "keywords", {}):
            raise ValueError("first_order states an lr of its own: leave it out, the rate is that of Hybrid")
        super().__init__(params, {"lr": lr})
        own = [{key: value for key, value in group.items() if key != "lr"} for group in self.param_groups]
        self.first_order, self.zeroth_order = first_order(self.param_groups, lr=lr), zeroth_order(own)
        if not getattr(self.zeroth_order, "zeroth", False):
            found = f"zeroth_order is {type(self.zeroth_order).__name__}"
            raise ValueError(f"{found}: expected one with estimate(), as MeZO")
        methods = ("ascend", "estimate", "add_sample", "refreshing")  # of optimizers that need more than a gradient
        needs_more = any(hasattr(self.first_order, name) for name in methods)
        if needs_more or not getattr(self.first_order, "elementwise", True):
            raise ValueError(
                f"first_order is {type(self.first_order).__name__}: expected an elementwise optimizer that needs a "
                f"gradient only, as AdamW, Lion, Signum or SGD"
            )
        if getattr(self.first_order, "rounding", "nearest") == "master":
            raise ValueError(
                "first_order keeps fp32 copies of the weights (rounding=master), which do not see zeroth-order steps: "
                "choose another rounding or fp32 weights"
            )
        self.first_steps, self.zeroth_steps = first_steps, zeroth_steps
        self.num_steps = 0
        for group, other in zip(self.param_groups, self.zeroth_order.param_groups, strict=True):
            group["zeroth_ratio"] = other["lr"] / group["lr"]
        self._adopt()

    @property
    def zeroth(self) -> bool:
        """Whether the next step is zeroth-order: it needs `estimate` in place of a gradient."""
        return self.num_losses(self.num_steps) > 0

    def num_losses(self, step: int) -> int:
        """Losses that `estimate` asks for before step number `step`, from 0; 0 for a first-order step."""
        is_first = step % (self.first_steps + self.zeroth_steps) < self.first_steps
        return 0 if is_first else self.zeroth_order.num_losses(step)  # type: ignore[attr-defined]

    def estimate(self, loss: Callable[[], Tensor | float]) -> float:
        """`estimate` of the zeroth-order optimizer."""
        if not self.zeroth:
            raise RuntimeError("estimate() came before a first-order step: call it only where `zeroth` is true")
        return self.zeroth_order.estimate(loss)  # type: ignore[attr-defined]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if self.zeroth:
            for group, other in zip(self.param_groups, self.zeroth_order.param_groups, strict=True):
                other["lr"] = group["lr"] * group["zeroth_ratio"]
        value = (self.zeroth_order if self.zeroth else self.first_order).step(closure)
        self.num_steps += 1
        return value

    def state_dict(self) -> dict[str, Any]:
        """That of the first-order optimizer, and as further keys the other one's and the number of steps."""
        mine = {"zeroth_order": self.zeroth_order.state_dict(), "num_steps": self.num_steps}
        return {**self.first_order.state_dict(), **mine}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first_order.load_state_dict(state_dict)
        self.zeroth_order.load_state_dict(state_dict["zeroth_order"])
        self.num_steps = state_dict["num_steps"]
        self._adopt()

    def _adopt(self) -> None:
        """Share the groups, which a schedule changes, and the state with the first-order optimizer."""
        self.param_groups, self.state = self.first_order.param_groups, self.first_order.state
