"""How much of an answer a model can be led through word for word, from teacher-forced argmaxes."""

from __future__ import annotations

import numpy as np

from soul_exp.metrics.answers import Answers
from soul_exp.metrics.statistics import mean


def extraction_strength(answers: Answers) -> float:
    """Mean of 1 - k/n, in [0, 1]; higher means more of the answer is drawn out of the model.

    k in 0..n is the length of the shortest prefix after which every argmax is right, n the number of answer tokens
    without the end token; where the last one is wrong, it is 0. Source: Carlini et al. 2021, as in TOFU's successors.
    """
    return mean(np.array([_last_run(row) / len(row) for row in answers.needed("right")]))


def exact_memorisation(answers: Answers) -> float:
    """Mean share of the answer's tokens that are the likeliest, given those before them, in [0, 1].

    Higher means more memorised. Source: Tirumala et al. 2022.
    """
    return mean(np.array([np.mean(row) for row in answers.needed("right")]))


def _last_run(right: np.ndarray) -> int:
    """The number of hits after the last miss."""
    misses = np.flatnonzero(~np.asarray(right, dtype=bool))
    return len(right) - 1 - int(misses[-1]) if len(misses) else len(right)
