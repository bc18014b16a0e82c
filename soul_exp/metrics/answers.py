"""The answers of one model to one probe. N examples, n_i answer tokens of example i (no end token), K wrong answers."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

Scores = Mapping[str, Mapping[str, float]]  # of a utility suite: task -> measure -> value
SUITE = "suite"  # the key of the scores among the answers to probes
# of Answers
TEXTS = ("question", "answer", "unit", "entities", "generation", "rephrased_generation", "embedding", "samples")
REPHRASED = ("rephrased_nll", "rephrased_generation", "similarity", "embedding", "bare_nll", "bare_wrong_nll")
# of its fields those with as many numbers in each example
MATRICES = ("wrong_nll", "bare_wrong_nll", "similarity", "exchanged_logp")


class NotRecordedError(ValueError):
    """A metric reads a field that the probe did not record."""

    def __init__(self, field: str) -> None:
        why = "expected the task's probe to record it for this metric"
        if field == "recall_ll":
            why = "as the model lacks positions for the rows that ReCaLL puts before a text, or others made the records"
        elif field in REPHRASED:
            why = "as there are no paraphrased questions, or an earlier version or another program made the records"
        super().__init__(f"found answers without {field}, {why}")
        self.field = field


class UndefinedError(ValueError):
    """A metric has no value for these answers; the text says why."""


@dataclass(frozen=True)
class Answers:
    """The answers of one model to one probe; every field has one entry per example, in the probe's order.

    `nll` [N] is the mean negative log-likelihood of the answer tokens and the end token, in nats per token, at least 0;
    lower means better known. A field that the probe does not record is None. Raises ValueError for unequal lengths.
    Fields with n_i numbers per example are of the answer tokens, each given the prompt and the tokens before it.
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
    # [N], as `nll`, of the generated text and the end token under the original model: how fluent the text is
    generation_nll: np.ndarray | None = None
    refused: np.ndarray | None = None  # [N], 1 where the generated text is a refusal, else 0
    unit: Sequence[str] | None = None  # the independent unit of each example, such as its author; None: the example
    # N times [n_i], mean (nats) and variance (nats^2) of log p(v) over the vocabulary, v drawn from p
    mean_logp: Sequence[np.ndarray] | None = None
    var_logp: Sequence[np.ndarray] | None = None
    gradnorm: np.ndarray | None = None  # [N], L2 norm over all weights of the gradient of minus the mean of `logp`
    gradnorm_mean: np.ndarray | None = None  # [N], mean over weight tensors of the L2 norm of that gradient
    recall_ll: np.ndarray | None = None  # [N], mean of `logp` where never-trained rows precede the prompt (ReCaLL)
    rephrased_nll: np.ndarray | None = None  # [N], as `nll`, given the paraphrased question
    rephrased_generation: Sequence[str] | None = None  # the text generated for the paraphrased question
    # [N, 1 + K], cosine of that text's sentence embedding to those of the paraphrased and of the K perturbed answers
    similarity: np.ndarray | None = None
    embedding: Sequence[str] | None = None  # N times the name and version of that embedding
    # NLL in nats per token without the end token, [N] and [N, K], of the paraphrased and the perturbed answers to the
    # paraphrased question; where the probe has no paraphrases, of the answer and the wrong ones to the question
    bare_nll: np.ndarray | None = None
    bare_wrong_nll: np.ndarray | None = None
    # of the original model: mean log-probability in nats of the answer's entity tokens, [N], and that with the output
    # of each of its L blocks in turn exchanged for another model's, [N, L]; nan for an answer without such tokens
    entity_logp: np.ndarray | None = None
    exchanged_logp: np.ndarray | None = None
    samples: Sequence[Sequence[str]] | None = None  # N times different sampled texts, not all of which are kept
    # N times [n], which of `samples` each of the n samples is, from 1; 0: a text that is not kept and no answer
    draws: Sequence[np.ndarray] | None = None

    def __post_init__(self) -> None:
        for field in (each.name for each in fields(self)):
            values = getattr(self, field)
            if values is not None and len(values) != len(self):
                raise ValueError(f"Answers: found {len(values)} entries of {field}, expected {len(self)}, one per nll")
        for field in MATRICES:
            values = getattr(self, field)
            if values is not None and len(self) and (np.ndim(values) != 2 or not np.size(values)):
                shape = np.shape(values)
                raise ValueError(f"Answers: found {field} of shape {shape}, expected [N, K] with K of at least 1")

    def __len__(self) -> int:
        return len(self.nll)

    def not_finite(self) -> tuple[int, str] | None:
        """The first example that has a number which is not finite, and the field of that number; None if all are."""
        for field in (each.name for each in fields(self)):
            values = getattr(self, field)
            if values is None or field in TEXTS:
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

    def per_example(self, function: Callable[..., np.ndarray], **constants: Hashable) -> np.ndarray:
        """`function(self, **constants)`, an array [N, ...] whose row i depends on example i alone; computed once."""
        key = (function, *sorted(constants.items()))
        if key not in self._computed:
            self._computed[key] = function(self, **constants)
        return self._computed[key]

    @functools.cached_property
    def _computed(self) -> dict[Hashable, np.ndarray]:
        return {}

    def take(self, rows: np.ndarray) -> "Answers":
        """The answers to the examples `rows` [M], of which some may be repeated; a field is indexed when it is read.

        What `per_example` computes is computed for all N examples, once for all that is taken.
        """
        return _Taken(self, rows)


class _Taken(Answers):
    """Some examples of other answers; each field is a property, defined below."""

    def __init__(self, of: Answers, rows: np.ndarray) -> None:
        vars(self).update(of=of, rows=rows)

    def __len__(self) -> int:
        return len(vars(self)["rows"])

    def per_example(self, function: Callable[..., np.ndarray], **constants: Hashable) -> np.ndarray:
        of, rows = vars(self)["of"], vars(self)["rows"]
        return np.asarray(of.per_example(function, **constants)[rows])


def _taken_field(name: str) -> property:
    def values(taken: _Taken) -> Any:
        all_values, rows = getattr(vars(taken)["of"], name), vars(taken)["rows"]
        if all_values is None or isinstance(all_values, np.ndarray):
            return None if all_values is None else all_values[rows]
        return [all_values[row] for row in rows]

    return property(values)


for _field in fields(Answers):
    setattr(_Taken, _field.name, _taken_field(_field.name))


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
