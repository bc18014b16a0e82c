"""Membership inference: whether probabilities reveal that a text was trained on. N texts, T_i tokens of text i."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from soul_exp.metrics.answers import Answers
from soul_exp.metrics.scale import Scale


def min_k(logp: Sequence[np.ndarray], k: float) -> np.ndarray:
    """Mean log-probability of each text's `k` least likely tokens, in nats, at most 0; higher means more like a member.

    `logp`: N arrays [T_i]. `k` is a fraction in (0, 1]; the lowest max(1, int(k * T_i)) tokens count. Returns [N]; a
    text with a nan scores nan. Raises ValueError if a text is empty. Source: Shi et al. 2024 (Min-K% Prob).
    """
    if not 0 < k <= 1:
        raise ValueError(f"min_k: found k = {k}, expected a fraction in (0, 1]")
    scores = np.empty(len(logp))
    for i, text in enumerate(logp):
        if not len(text):
            raise ValueError(f"min_k: found no token in text {i}, expected at least one")
        lowest = np.sort(np.asarray(text, dtype=np.float64))[: max(1, int(k * len(text)))]
        scores[i] = np.nan if np.isnan(text).any() else lowest.mean()  # np.sort puts nan last
    return scores


def roc_auc(members: np.ndarray, others: np.ndarray) -> float:
    """Probability that a random member scores higher than a random other, ties counting one half; in [0, 1].

    `members` [n], `others` [m]. 1: every member scores above every other; 0.5: the scores do not separate them. Of
    ranks (Mann-Whitney U): -inf is allowed, nan gives nan. Raises ValueError if one sample is empty.
    """
    members, others = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    n, m = members.size, others.size
    if not (n and m):
        raise ValueError(f"roc_auc: found {n} members and {m} others, expected at least one of each")
    ranks = rankdata(np.concatenate([members, others]))[:n]  # tied values share their average rank
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


@Scale("nearest", 0, 1)
def mia_auc(forget: Answers, holdout: Answers, *, k: float) -> float:
    """ROC AUC of min-k between forget texts and texts that were never trained on, in [0, 1]; 1: fully memorised.

    The value nearest to the retrained model's is best. That is 0.5 only if forget and holdout are exchangeable; a value
    below it means over-unlearned, which also reveals the forget set. Source: Shi et al. 2024.
    """
    return roc_auc(forget.per_example(_min_k, k=k), holdout.per_example(_min_k, k=k))


def _min_k(answers: Answers, k: float) -> np.ndarray:
    return min_k(answers.needed("logp"), k)
