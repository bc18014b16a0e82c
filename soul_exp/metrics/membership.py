"""Membership inference: can it be told from the model's probabilities that a text was trained on?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from soul_exp.metrics.answers import Answers


def min_k(logp: Sequence[np.ndarray], k: float) -> np.ndarray:
    """Mean log-probability of each text's `k` least likely tokens, in nats; higher means more familiar.

    `logp`: N texts, each [T_i]. `k` is a fraction in (0, 1]; the lowest max(1, int(k * T_i)) tokens are kept. Returns
    [N]; a text with a nan scores nan. Raises ValueError if a text is empty. Source: Shi et al. 2024 (Min-K% Prob).
    """
    if not 0 < k <= 1:
        raise ValueError(f"min_k: found k = {k}, expected a fraction in (0, 1]")
    scores = np.empty(len(logp))
    for i, text in enumerate(logp):
        if not len(text):
            raise ValueError(f"min_k: found no token in text {i}, expected at least one")
        lowest = np.sort(np.asarray(text, dtype=np.float64))[: max(1, int(k * len(text)))]
        scores[i] = np.nan if np.isnan(text).any() else lowest.mean()  # sorted, a nan comes last and would be lost
    return scores


def roc_auc(members: np.ndarray, others: np.ndarray) -> float:
    """Probability that a random member scores higher than a random other, ties counting one half; in [0, 1].

    1: every member above every other; 0.5: not told apart. Taken from ranks (Mann-Whitney), so that a score of -inf is
    allowed; nan gives nan. Raises ValueError if one side is empty.
    """
    members, others = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    n, m = members.size, others.size
    if not (n and m):
        raise ValueError(f"roc_auc: found {n} members and {m} others, expected at least one of each")
    ranks = rankdata(np.concatenate([members, others]))[:n]  # tied values share their average rank
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def mia_auc(forget: Answers, holdout: Answers, *, k: float) -> float:
    """ROC AUC of min-k between forget texts and texts never trained on, in [0, 1]: 1 means fully memorised.

    "No trace" is the retrained model's value, 0.5 only if forget and holdout are exchangeable; a value below it means
    over-unlearned, itself a trace.
    """
    return roc_auc(min_k(forget.needed("logp"), k), min_k(holdout.needed("logp"), k))
