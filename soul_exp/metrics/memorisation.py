"""How much of an answer teacher-forced argmaxes reproduce. N examples, n_i answer tokens of example i (no end)."""

import numpy as np

from soul_exp.metrics.answers import Answers, mean
from soul_exp.metrics.scale import Scale


@Scale("higher", 0, 1)
def extraction_strength(answers: Answers) -> float:
    """Mean over examples of 1 - k/n_i, in [0, 1]; higher means better known.

    k in 0..n_i is the length of the shortest prefix of the answer after which every argmax is right. An example whose
    last argmax is wrong counts 0. Source: Carlini et al. 2021, as in the code that follows TOFU.
    """
    return mean(answers.per_example(extraction_strengths))


def extraction_strengths(answers: Answers) -> np.ndarray:
    """1 - k/n_i of each example, [N]."""
    last_runs = [np.logical_and.accumulate(np.asarray(row, dtype=bool)[::-1]) for row in answers.needed("right")]
    return np.array([np.mean(run) for run in last_runs])


@Scale("higher", 0, 1)
def open_unlearning_extraction_strength(answers: Answers) -> float:
    """`extraction_strength` in OpenUnlearning's dialect, in [0, 1]: a total miss counts 1/n_i, as k ends at n_i - 1.

    Source: the code of Dorna et al. 2025.
    """
    return mean(np.maximum(answers.per_example(extraction_strengths), 1 / answers.per_example(_lengths)))


@Scale("higher", 0, 1)
def exact_memorisation(answers: Answers) -> float:
    """Mean share of right argmaxes per answer, in [0, 1]; higher means better known. Source: Tirumala et al. 2022."""
    return mean(answers.per_example(exact_memorisations))


def exact_memorisations(answers: Answers) -> np.ndarray:
    """The share of right argmaxes of each example, [N]."""
    return np.array([np.mean(row) for row in answers.needed("right")])


def _lengths(answers: Answers) -> np.ndarray:
    return np.array([len(row) for row in answers.needed("right")])
