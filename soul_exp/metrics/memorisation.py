"""How much of an answer a model reproduces token by token, from teacher-forced argmaxes.

N examples, n_i answer tokens of example i (without the end token).
"""

from __future__ import annotations

import numpy as np

from soul_exp.metrics.answers import Answers
from soul_exp.metrics.scale import Scale
from soul_exp.metrics.statistics import mean


@Scale("higher", 0, 1)
def extraction_strength(answers: Answers) -> float:
    """Mean over examples of 1 - k/n_i, in [0, 1]; higher means better known.

    k in 0..n_i is the length of the shortest prefix of the answer after which every argmax is right. An example whose
    last argmax is wrong counts 0. Source: Carlini et al. 2021, as in the code that follows TOFU.
    """
    return mean(np.array([_last_run(row) / len(row) for row in answers.needed("right")]))


@Scale("higher", 0, 1)
def exact_memorisation(answers: Answers) -> float:
    """Mean over examples of the share of right argmaxes among the answer tokens, in [0, 1]; higher means better known.

    Source: Tirumala et al. 2022.
    """
    return mean(np.array([np.mean(row) for row in answers.needed("right")]))


def _last_run(right: np.ndarray) -> int:
    """The number of right argmaxes after the last wrong one, in 0..n_i."""
    misses = np.flatnonzero(~np.asarray(right, dtype=bool))
    return len(right) - 1 - int(misses[-1]) if len(misses) else len(right)
