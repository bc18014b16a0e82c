"""Metrics of a utility suite; `suite` maps a task of lm-evaluation-harness to its measures."""

import math
from collections.abc import Mapping

import numpy as np

from soul_exp.metrics.answers import Scores
from soul_exp.metrics.scale import Scale

# The measures of a task that are read and shown; the harness reports others beside them.
MEASURES = {"acc": Scale("higher", 0, 1), "word_perplexity": Scale("lower", 1, math.inf, "per word")}


class ScoredTask(dict[str, float]):
    """Measure -> value of one task, as lm-eval computes it from what it makes of each of the N items.

    `of_items` has an array for each measure. [N]: the value is the mean. [N, 2], log-likelihood in nats and number of
    words or bytes of a text: it is exp of the NLL per word or byte, of bits_per_byte that NLL in bits. Beside these
    are `n` and, of acc, the standard error acc_stderr = sqrt(p (1 - p) / n).
    """

    unit = None  # each item is an independent unit

    def __init__(self, of_items: Mapping[str, np.ndarray]) -> None:
        super().__init__({measure: _value(measure, values.tolist()) for measure, values in of_items.items()})
        self.of_items, self.num = of_items, min(map(len, of_items.values()))
        if "acc" in self:
            self["acc_stderr"] = math.sqrt(self["acc"] * (1 - self["acc"]) / self.num)
        self["n"] = float(self.num)

    def take(self, rows: np.ndarray) -> dict[str, float]:
        """Measure -> value of the items `rows`, of which some may be repeated."""
        return dict(ScoredTask({measure: values[rows] for measure, values in self.of_items.items()}))


def _value(measure: str, values: list[float] | list[list[float]]) -> float:
    """Sums go from item to item, as lm-eval's do: the same numbers to the last bit."""
    if not isinstance(values[0], list):
        return float(sum(values) / len(values))
    texts = np.array(values).T.tolist()
    nll = -sum(texts[0]) / sum(texts[1])
    return float(nll / math.log(2) if measure == "bits_per_byte" else math.exp(nll))


@Scale("higher", 0, 1)
def mean_accuracy(suite: Scores) -> float:
    """Mean of `acc` over the multiple-choice tasks, in [0, 1]; higher is better.

    Every task has the same weight, whatever its number of items; `acc_norm` is not used. A model that guesses reaches
    0.36 in the embedded suite. Raises ValueError if no task has `acc`.
    """
    found = [suite[task]["acc"] for task in suite if "acc" in suite[task]]
    if not found:
        raise ValueError(f"found the tasks {list(suite)}, expected one with acc")
    return sum(found) / len(found)


@Scale("lower", 1, math.inf, unit="per word")
def perplexity(suite: Scores) -> float:
    """exp of the NLL per word of running text, in [1, 1.01e304]; lower is better.

    Spaces separate words, so that values are comparable across tokenizers. A text of more than 700 nats per word counts
    as one of 700, so that exp stays finite. Raises ValueError unless exactly one task has `word_perplexity`.
    """
    found = [suite[task]["word_perplexity"] for task in suite if "word_perplexity" in suite[task]]
    if len(found) != 1:
        raise ValueError(f"found word_perplexity in {len(found)} of the tasks {list(suite)}, expected it in one")
    return found[0]
