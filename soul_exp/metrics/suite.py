"""The scores of a utility suite in one number each; `suite` maps a task of lm-evaluation-harness to its metrics."""

from __future__ import annotations

from soul_exp.metrics.answers import Scores


def mean_accuracy(suite: Scores) -> float:
    """Mean of `acc` over the multiple-choice tasks, in [0, 1]; higher is better.

    Every task weighs the same, however many items it has, and counts by `acc`, never by `acc_norm`. Chance is 0.36 in
    the embedded suite. Raises ValueError if no task has it.
    """
    found = [measured["acc"] for measured in suite.values() if "acc" in measured]
    if not found:
        raise ValueError(f"found the tasks {list(suite)}, expected one with acc")
    return sum(found) / len(found)


def perplexity(suite: Scores) -> float:
    """exp of the NLL per word of running text, at least 1; lower means more familiar.

    Words are what blanks separate: it can be compared across tokenizers. A text of more than 700 nats a word counts as
    one of 700, so that exp stays finite: 1e304 reads "at least". Raises ValueError unless one task has it.
    """
    found = [measured["word_perplexity"] for measured in suite.values() if "word_perplexity" in measured]
    if len(found) != 1:
        raise ValueError(f"found word_perplexity in {len(found)} of the tasks {list(suite)}, expected it in one")
    return found[0]
