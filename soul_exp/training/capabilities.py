"""What an optimizer may request beyond the gradient of its loss: one Protocol each, and what an optimizer has.

The methods of an optimizer decide what it requests; it registers and inherits nothing, so that a file of optim/ can be
copied elsewhere. Plain torch optimizers request nothing. curvature.py and passes.py compute what is requested.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer

# of torch.optim: a flat piece of a tensor is updated as it is within the tensor
TORCH_ELEMENTWISE = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "SGD")


@runtime_checkable
class CurvaturePass(Protocol):
    """Requests an estimate of the diagonal curvature before step 0 and then every `interval` steps, as Sophia does.

    The gradients of the pass are handed over by `step()` within `refreshing()`.
    """

    estimator: str  # "gnb" or "hutchinson": curvature.py computes it; any other: the optimizer does, without a pass
    interval: int
    curvature_on: str | None  # whose NLL: "retain", "forget" or "both"; None where no pass is requested
    curvature_rows: int | None  # rows of each part; None: all of the step

    def refreshing(self) -> AbstractContextManager[None]: ...


@runtime_checkable
class Ascent(Protocol):
    """Requests the gradient of the whole step, ascends along it, then takes the gradient there, as SAM does."""

    base: Optimizer  # takes the step; it gets what it requests

    def ascend(self) -> None: ...


@runtime_checkable
class Probe(Protocol):
    """Requests losses in place of a gradient, at weights that it moves by itself, as MeZO does."""

    zeroth: bool  # whether the next step needs losses

    def num_losses(self, step: int) -> int: ...  # that step number `step`, from 0, asks for; 0: it needs a gradient

    def estimate(self, loss: Callable[[], Tensor | float]) -> float: ...


@runtime_checkable
class RowGradients(Protocol):
    """Requests the gradients of single rows, left in `.grad` before each `add_sample()`; takes one step, as Influence.

    That step holds all rows of the leading part, unclipped and without dropout.
    """

    num_samples: int  # calls of add_sample()
    hessian: str  # whose rows: "retain", or "all" of forget and retain
    estimator: str  # "gnb": of labels sampled from the model; any other: of the rows' own
    ratio: float | None  # rows of forget / rows of retain; None: set before the step

    def add_sample(self) -> None: ...


@runtime_checkable
class StepSums(Protocol):
    """Sums up what its steps do in the same pass over memory, as every `Elementwise` does (statistics.py)."""

    clips: bool  # whether its rule clips, so that "won" is defined
    counting: bool
    raise_nonfinite: bool

    def take_statistics(self) -> Tensor: ...


@dataclass(frozen=True)
class Capabilities:
    """The optimizer itself as each of the Protocols that it has; None for the others."""

    curvature: CurvaturePass | None = None
    ascent: Ascent | None = None
    probe: Probe | None = None
    row_gradients: RowGradients | None = None
    sums: StepSums | None = None


def capabilities(optimizer: Any) -> Capabilities:
    """What `optimizer` requests; of one that ascends, curvature and sums are those of its base.

    Raises TypeError for an optimizer that has the method of a Protocol and not all else of it.
    """
    ascent: Ascent | None = _as(Ascent, "ascend", optimizer)
    inner = optimizer if ascent is None else ascent.base
    return Capabilities(
        curvature=_as(CurvaturePass, "refreshing", inner),
        ascent=ascent,
        probe=_as(Probe, "estimate", optimizer),
        row_gradients=_as(RowGradients, "add_sample", optimizer),
        sums=_as(StepSums, "take_statistics", inner),
    )


def _as(protocol: type, method: str, optimizer: Any) -> Any:
    """`optimizer` if it has `method`, by which `protocol` is recognised; else None."""
    if not hasattr(optimizer, method):
        return None
    names = [*protocol.__annotations__, *(name for name in vars(protocol) if not name.startswith("_"))]
    missing = [name for name in names if not hasattr(optimizer, name)]
    if missing:
        found = f"{type(optimizer).__name__} has {method}() but no {', '.join(missing)}"
        raise TypeError(f"{found}: expected every attribute of {protocol.__name__} (soul_exp/training/capabilities.py)")
    return optimizer


def takes_one_step(make_optimizer: Callable[..., Optimizer]) -> bool:
    """Whether `make_optimizer`, a class or a partial of one, makes optimizers that take row gradients and one step."""
    return hasattr(getattr(make_optimizer, "func", make_optimizer), "add_sample")


def is_elementwise(optimizer: Any) -> bool:
    """Whether `optimizer` updates a flat piece of a tensor as within the tensor, which ZeRO's partitions need."""
    return bool(getattr(optimizer, "elementwise", type(optimizer).__name__ in TORCH_ELEMENTWISE))
