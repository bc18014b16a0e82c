"""Metrics of a utility suite; `suite` maps a task of lm-evaluation-harness to its measures."""

import math

from soul_exp.metrics.answers import Scores
from soul_exp.metrics.scale import Scale

# The measures of a task that are read and shown; the harness reports others beside them.
MEASURES = {"acc": Scale("higher", 0, 1), "word_perplexity": Scale("lower", 1, math.inf, "per word")}


@Scale("higher", 0, 1)
def mean_accuracy(suite: Scores) -> float:
    """Mean of `acc` over the multiple-choice tasks, in [0, 1]; higher is better.

    Every task has the same weight, whatever its number of items; `acc_norm` is not used. A model that guesses reaches
    0.36 in the embedded suite. Raises ValueError if no task has `acc`.
    """
    found = [measured["acc"] for measured in suite.values() if "acc" in measured]
    if not found:
        raise ValueError(f"found the tasks {list(suite)}, expected one with acc")
    return sum(found) / len(found)


@Scale("lower", 1, math.inf, unit="per word")
def perplexity(suite: Scores) -> float:
    """exp of the NLL per word of running text, in [1, 1.01e304]; lower is better.

    Spaces separate words, so that values are comparable across tokenizers. A text of more than 700 nats per word counts
    as one of 700, so that exp stays finite. Raises ValueError unless exactly one task has `word_perplexity`.
    """
    found = [measured["word_perplexity"] for measured in suite.values() if "word_perplexity" in measured]
    if len(found) != 1:
        raise ValueError(f"found word_perplexity in {len(found)} of the tasks {list(suite)}, expected it in one")
    return found[0]
