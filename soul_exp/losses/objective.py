"""The two terms of a run, and their sum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from soul_exp.binding import call, names
from soul_exp.losses.terms import hidden_mse, kl, nll
from soul_exp.ranges import INDEX, NOT_NEGATIVE

RETAIN_TERMS: dict[str, Callable[..., Tensor]] = {"nll": nll, "kl": kl, "hidden_mse": hidden_mse}
COMPUTED = ("reference_nll", "reference_logits", "hidden", "reference_hidden")  # by the run, for each part


@dataclass(frozen=True)
class Objective:
    """`forget_term + gamma * retain_term`; `retain_term` is a name from RETAIN_TERMS, a function, or None for none.

    `hidden` and `reference_hidden` are the output of `layer`, counted from 0; None: `layer_of` chooses.
    """

    forget_term: Callable[..., Tensor]
    retain_term: str | Callable[..., Tensor] | None = "nll"
    gamma: Annotated[float, NOT_NEGATIVE] = 1.0
    layer: Annotated[int | None, INDEX] = None

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
        """The names of all values that the terms need, each once, in order."""
        terms = [self.forget_term] + ([self.retain_function] if self.retain_function else [])
        return tuple(dict.fromkeys(name for term in terms for name in names(term)))

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the batch that the terms need."""
        return tuple(name for name in self.names if name not in COMPUTED)

    @property
    def reads_hidden(self) -> bool:
        """Whether a term needs the output of a layer of the model being trained."""
        return "hidden" in self.names

    def terms(self, available: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The forget term and the retain term (None without one), each a scalar, before gamma."""
        retain = self.retain_function
        return call(self.forget_term, available), call(retain, available) if retain else None

    def total(self, forget: Tensor, retain: Tensor | None) -> Tensor:
        return forget if retain is None else forget + self.gamma * retain
