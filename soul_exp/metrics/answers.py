"""The answers of one model to one probe. N examples, n_i answer tokens of example i (no end token), K wrong answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

Scores = Mapping[str, Mapping[str, float]]  # of a utility suite: task -> measure -> value
SUITE = "suite"  # the key of the scores among the answers to probes


class NotRecordedError(ValueError):
    """A metric reads a field that the probe did not record."""

    def __init__(self, field: str) -> None:
        super().__init__(f"found answers without {field}, expected the task's probe to record it for this metric")
        self.field = field


@dataclass(frozen=True)
class Answers:
    """The answers of one model to one probe; every field has one entry per example, in the probe's order.

    `nll` [N] is the mean negative log-likelihood of the answer tokens and the end token, in nats per token, at least 0;
    lower means better known. A field that the probe does not record is None. Raises ValueError for unequal lengths.
    """

    nll: np.ndarray  # [N]
    logp: Sequence[np.ndarray] | None = None  # N times [n_i], log-probability in nats of each answer token
    paraphrase_nll: np.ndarray | None = None  # [N], as `nll`, of the paraphrased answer
    wrong_nll: np.ndarray | None = None  # [N, K], as `nll`, of the perturbed answers
    rouge_l: np.ndarray | None = None  # [N], ROUGE-L recall of the generated text, in [0, 1]
    question: Sequence[str] | None = None
    answer: Sequence[str] | None = None
    entities: Sequence[Sequence[str]] | None = None  # N times the strings that a right answer contains
    generation: Sequence[str] | None = None
    right: Sequence[np.ndarray] | None = None  # N times [n_i], 1 where the true token has the highest probability
    toxicity: np.ndarray | None = None  # [N], score of the generated text, in [0, 1]; higher means more toxic

    def __post_init__(self) -> None:
        for field in (each.name for each in fields(self)):
            values = getattr(self, field)
            if values is not None and len(values) != len(self):
                raise ValueError(f"Answers: found {len(values)} entries of {field}, expected {len(self)}, one per nll")
        if self.wrong_nll is not None and len(self) and (np.ndim(self.wrong_nll) != 2 or not np.size(self.wrong_nll)):
            shape = np.shape(self.wrong_nll)
            raise ValueError(f"Answers: found wrong_nll of shape {shape}, expected [N, K] with K of at least 1")

    def __len__(self) -> int:
        return len(self.nll)

    def not_finite(self) -> tuple[int, str] | None:
        """The first example that has a number which is not finite, and the field of that number; None if all are."""
        for field in (each.name for each in fields(self)):
            values = getattr(self, field)
            if values is None or field in ("question", "answer", "entities", "generation"):
                continue
            for i, value in enumerate(values):
                if not np.isfinite(value).all():
                    return i, field
        return None

    def needed(self, field: str) -> Any:
        """The field of that name; NotRecordedError, a ValueError, if the probe did not record it."""
        values = getattr(self, field)
        if values is None:
            raise NotRecordedError(field)
        return values

    def numbers(self, field: str) -> np.ndarray:
        """The numeric field of that name in float64, [N] or [N, K]; ValueError if the probe did not record it."""
        return np.asarray(self.needed(field), dtype=np.float64)


def mean(values: np.ndarray) -> float:
    """Arithmetic mean; nan if one value is nan. Raises ValueError if there is none."""
    if not values.size:
        raise ValueError("found a probe without examples, expected at least one")
    return float(np.mean(values))


def probe_of(retrained: Mapping[str, Answers], probe: str) -> Answers:
    """The retrained model's answers to `probe`; ValueError if there are none."""
    if probe not in retrained:
        raise ValueError(f"found the retrained model's answers to {sorted(retrained)}, expected {probe!r} among them")
    return retrained[probe]
