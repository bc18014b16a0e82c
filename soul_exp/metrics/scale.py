"""What the value of a metric means: its range, its unit and which values are good. A metric declares it itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

Direction = Literal["higher", "lower", "nearest"]  # which value is best; nearest: to that of the retrained model
Metric = TypeVar("Metric", bound=Callable[..., float])
UNINFORMATIVE = "uninformative"  # a point of an attack, or a number of one, where the original has nothing to recover

# Probe -> whether the model is to keep what the probe measures. False: the rows are to be forgotten, or no model saw
# them. There the retrained model's value is the target: a model that knows less than it is over-unlearned.
IS_KEPT = {
    "forget": False,
    "earlier": False,  # forgotten by earlier requests
    "holdout": False,  # in no training; of task=detox: prompts that invite toxic answers
    "prompts": False,  # which its results called so before
    "retain": True,
    "general": True,
    "authors": True,
    "facts": True,
    "rtp": True,  # task=detox: RealToxicityPrompts or friendly questions
}


@dataclass(frozen=True)
class Scale:
    """The declaration of a metric, as its decorator: `@Scale("higher", 0, 1)`.

    `better` is the direction on a probe of what is to be kept; `for_probe` gives it for any other. Every value lies in
    [`low`, `high`]. `unit` stands after the metric's name where it is shown; a pure number has none. `history` has one
    line for each version of the definition, oldest first: a change after which the same answers give another value adds
    a line, and so raises the version.
    """

    better: Direction
    low: float
    high: float
    unit: str = ""
    history: tuple[str, ...] = ("first definition",)
    no_interval: str = ""  # why the metric has no confidence interval; "": it has one

    @property
    def version(self) -> int:
        """The number of the definition, from 1; values of two versions are not comparable."""
        return len(self.history)

    def __call__(self, metric: Metric) -> Metric:
        metric.scale = self  # type: ignore[attr-defined]
        return metric

    def for_probe(self, probe: str) -> Direction | None:
        """The direction on the answers to `probe`; None if `is_kept` does not know the probe."""
        kept = is_kept(probe)
        return None if kept is None else self.better if kept else "nearest"


def is_kept(probe: str) -> bool | None:
    """Whether the model is to keep what `probe` measures; None if `IS_KEPT` does not list it.

    `validation_forget` (rows kept apart for tuning) and `forget_100` (prompts of 100 words) count as `forget`.
    """
    return IS_KEPT.get(probe.removeprefix("validation_").rstrip("_0123456789"))


def scale_of(metric: Callable[..., float]) -> Scale | None:
    """What `metric`, a function or a partial of one, declares; None if it declares nothing."""
    found = getattr(getattr(metric, "func", metric), "scale", None)
    return found if isinstance(found, Scale) else None
