"""Membership inference: whether probabilities reveal that a text was trained on.

N texts, n_i answer tokens of text i (no end token). A score is a function of the answers to one probe, [N]; higher
means more like a member. Members (the forget set) and never-trained texts (the holdout) are two arguments. 0.5 is the
AUC of a model without a trace only if they are exchangeable: in general it is the retrained model's.
"""

import math
import zlib as compression
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from soul_exp.metrics.answers import Answers, UndefinedError, probe_of
from soul_exp.metrics.scale import Scale

Score = Callable[[Answers], np.ndarray]

SAME_TEXTS = "it compares two models on the same texts, which cannot be drawn apart"
LEAST_VARIANCE = 1e-6  # nats^2
LEAST_LL = -0.01  # nats per token: a log-likelihood above it counts as it, since ReCaLL divides by one

# ---- Scores of the answers to one probe.


def loss(answers: Answers) -> np.ndarray:
    """Mean log-probability of the answer tokens, in nats, at most 0: minus the loss. [N]. Source: Yeom et al. 2018."""
    return _means(answers.needed("logp"))


def zlib(answers: Answers) -> np.ndarray:
    """`loss` over the number of bytes of the zlib-compressed answer, at most 0. [N]. Source: Carlini et al. 2021."""
    sizes = [len(compression.compress(text.encode(errors="replace"))) for text in answers.needed("answer")]
    return loss(answers) / np.array(sizes, dtype=np.float64)


def reference(answers: Answers, retrained: Answers) -> np.ndarray:
    """`loss` minus that of the retrained model, which never saw the members, on the same texts, in nats. [N].

    0 for the retrained model itself: all tie, and the AUC is 0.5. Source: Carlini et al. 2021, with a reference model.
    """
    if len(answers) != len(retrained):
        raise UndefinedError(f"{len(answers)} answers and {len(retrained)} of the retrained model are not of one probe")
    return loss(answers) - loss(retrained)


def min_k(answers: Answers, *, k: float) -> np.ndarray:
    """Mean log-probability of each text's `k` least likely tokens, in nats, at most 0. [N].

    `k` is a fraction in (0, 1]; the lowest max(1, int(k n_i)) tokens count; a text with a nan scores nan. Raises
    ValueError if a text is empty. Source: Shi et al. 2024 (Min-K% Prob).
    """
    return _mean_of_lowest(answers.needed("logp"), k)


def min_k_plus_plus(answers: Answers, *, k: float) -> np.ndarray:
    """As `min_k`, of (log p - mean) / deviation, which are those of log p(v) over the vocabulary, v ~ p. [N].

    The variance is at least 1e-6. Each token is standardised first; then the lowest are taken. Source: Zhang et al.
    2025 (Min-K%++).
    """
    tokens = zip(*(answers.needed(field) for field in ("logp", "mean_logp", "var_logp")), strict=True)
    standard = [
        (np.asarray(logp, dtype=np.float64) - mean) / np.sqrt(np.maximum(variance, LEAST_VARIANCE))
        for logp, mean, variance in tokens
    ]
    return _mean_of_lowest(standard, k)


def gradnorm(answers: Answers) -> np.ndarray:
    """Minus the L2 norm over all weights of the gradient of the NLL per answer token, in evaluation mode. [N].

    Source: Wang et al. 2024 (gradient-based detection of pre-training data).
    """
    return -answers.numbers("gradnorm")


def recall(answers: Answers) -> np.ndarray:
    """LL(x | P) / LL(x): how much never-trained rows P before the prompt change the log-likelihood per token. [N].

    Both are at most -0.01, so it is positive. Source: Xie et al. 2024 (ReCaLL), with P of the task.
    """
    conditional = answers.numbers("recall_ll")
    return np.minimum(conditional, LEAST_LL) / np.minimum(loss(answers), LEAST_LL)


def _means(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of each row, [N]; ValueError if one is empty."""
    lengths = _lengths(rows)
    if not len(rows):
        return np.zeros(0)
    return np.add.reduceat(np.concatenate(rows, dtype=np.float64), _starts(lengths)) / lengths


def _mean_of_lowest(rows: Sequence[np.ndarray], k: float) -> np.ndarray:
    """The mean of the lowest max(1, int(k n_i)) numbers of each row, nan if one of the row is nan. [N]."""
    if not 0 < k <= 1:
        raise ValueError(f"membership: found k = {k}, expected a fraction in (0, 1]")
    if not len(rows):
        return np.zeros(0)
    lengths = _lengths(rows)
    values = np.concatenate(rows, dtype=np.float64)
    texts = np.repeat(np.arange(len(rows)), lengths)
    values = values[np.lexsort((values, texts))]  # ascending within each text; nan comes last
    starts, counts = _starts(lengths), np.maximum(1, (k * lengths).astype(int))
    is_low = np.arange(len(values)) - np.repeat(starts, lengths) < np.repeat(counts, lengths)
    with np.errstate(invalid="ignore"):  # inf - inf
        found = np.add.reduceat(np.where(is_low, values, 0.0), starts) / counts
    return np.where(np.isnan(values[starts + lengths - 1]), np.nan, found)


def _lengths(rows: Sequence[np.ndarray]) -> np.ndarray:
    lengths = np.array([len(row) for row in rows], dtype=int)
    if (lengths == 0).any():
        raise ValueError(f"membership: found no token in text {int(lengths.argmin())}, expected at least one")
    return lengths


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


# ---- How well a score separates members from others.


def roc_auc(members: np.ndarray, others: np.ndarray) -> float:
    """Probability that a random member scores higher than a random other, ties counting one half; in [0, 1].

    `members` [n], `others` [m]. 1: every member scores above every other; 0.5: the scores do not separate them. Of
    ranks (Mann-Whitney U): -inf is allowed, nan gives nan. Raises ValueError if one sample is empty.
    """
    members, others = _two(members, others)
    n, m = members.size, others.size
    ranks = rankdata(np.concatenate([members, others]))[:n]  # tied values share their average rank
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def tpr_at(members: np.ndarray, others: np.ndarray, rate: float) -> float:
    """The largest share of members above a threshold that at most `rate_used` of the others are above; in [0, 1].

    `members` [n], `others` [m]; above is strictly above. -inf is allowed, nan gives nan. Raises ValueError if one
    sample is empty. Source: Carlini et al. 2022 (TPR at a low FPR).
    """
    members, others = _two(members, others)
    if np.isnan(members).any() or np.isnan(others).any():
        return float("nan")
    allowed = int(rate_used(rate, others.size) * others.size + 1e-9)
    if allowed >= others.size:
        return 1.0
    threshold = np.sort(others)[-1 - allowed]  # the highest with at most `allowed` above it and the lowest such
    return float(np.mean(members > threshold))


def rate_used(rate: float, num_others: int) -> float:
    """max(rate, 1 / num_others): the false positive rate of `tpr_at`, since fewer than one text says nothing."""
    return max(rate, 1 / num_others)


def _two(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    members, others = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if not (members.size and others.size):
        found = f"found {members.size} members and {others.size} others"
        raise ValueError(f"membership: {found}, expected at least one of each")
    return members, others


# ---- Metrics.


@Scale("nearest", 0, 1)
def mia_auc(forget: Answers, holdout: Answers, *, k: float) -> float:
    """ROC AUC of min-k between forget texts and texts that were never trained on, in [0, 1]; 1: fully memorised.

    The value nearest to the retrained model's is best. That is 0.5 only if forget and holdout are exchangeable; a value
    below it means over-unlearned, which also reveals the forget set. Source: Shi et al. 2024.
    """
    return roc_auc(forget.per_example(min_k, k=k), holdout.per_example(min_k, k=k))


@Scale("nearest", 0, 1)
def attack_auc(forget: Answers, holdout: Answers, *, score: Score) -> float:
    """As `mia_auc`, of any `score` of the answers to one probe, in [0, 1]."""
    return roc_auc(forget.per_example(score), holdout.per_example(score))


@Scale("nearest", 0, 1)
def attack_tpr(forget: Answers, holdout: Answers, *, score: Score, rate: float) -> float:
    """`tpr_at` of any `score`, in [0, 1]; the value nearest to the retrained model's is best.

    With fewer than 1 / `rate` holdout texts the false positive rate is 1 / their number, which the results note.
    """
    return tpr_at(forget.per_example(score), holdout.per_example(score), rate)


@Scale("nearest", 0, 1, no_interval=SAME_TEXTS)
def reference_auc(forget: Answers, holdout: Answers, retrained: Mapping[str, Answers]) -> float:
    """As `mia_auc`, of `reference`, in [0, 1]; 0.5 for the retrained model itself, whose scores all tie."""
    return roc_auc(*_of_reference(forget, holdout, retrained))


@Scale("nearest", 0, 1, no_interval=SAME_TEXTS)
def reference_tpr(forget: Answers, holdout: Answers, retrained: Mapping[str, Answers], *, rate: float) -> float:
    """`tpr_at` of `reference`, in [0, 1]; 0 for the retrained model itself, as none of its scores is above another."""
    return tpr_at(*_of_reference(forget, holdout, retrained), rate)


@Scale("nearest", -100, math.inf, unit="%")
def privleak(forget: Answers, holdout: Answers, retrained_seeds: Sequence[Mapping[str, Answers]], *, k: float) -> float:
    """100 (A - A_r) / A_r in %, A the AUC of min-k, A_r its mean over retrained models, in [-100, inf].

    0: no trace; above: under-unlearned; below: over-unlearned. UndefinedError at A_r = 0. The sign is our own: that of
    MUSE is `muse_privleak`.
    """
    ours, never = _aucs(forget, holdout, retrained_seeds, k)
    if never == 0:
        raise UndefinedError("the retrained model's AUC is 0, by which it divides")
    return 100 * (ours - never) / never


@Scale("nearest", -100, math.inf, unit="%")
def muse_privleak(
    forget: Answers, holdout: Answers, retrained_seeds: Sequence[Mapping[str, Answers]], *, k: float
) -> float:
    """`privleak` in MUSE's dialect, 100 ((1-A) - (1-A_r)) / (1-A_r) in %, in [-100, inf]; above 0: over-unlearned.

    UndefinedError at A_r = 1. Source: Shi et al. 2024 (MUSE), whose AUC is that of non-members against members.
    """
    ours, never = _aucs(forget, holdout, retrained_seeds, k)
    if never == 1:
        raise UndefinedError("the retrained model's AUC is 1, by whose distance from 1 it divides")
    return 100 * (never - ours) / (1 - never)


@Scale("higher", 0, 1)
def s_mia(forget: Answers, holdout: Answers, retrained_seeds: Sequence[Mapping[str, Answers]], *, k: float) -> float:
    """1 - max((A - A_r) / (1 - A_r), (A_r - A) / A_r), in [0, 1], A and A_r as for `privleak`; higher is better.

    1: no trace; 0: the AUC is 0 or 1. UndefinedError if A_r is 0 or 1. Source: OpenUnlearning's form
    (`open_unlearning_s_mia`) with each side measured by the room that it has.
    """
    ours, never = _aucs(forget, holdout, retrained_seeds, k)
    if never in (0, 1):
        raise UndefinedError(f"the retrained model's AUC is {never:g}, by whose distance from 0 and from 1 it divides")
    return 1 - max((ours - never) / (1 - never), (never - ours) / never)


@Scale("higher", 0, 1)
def validation_s_mia(
    validation_forget: Answers,
    validation_holdout: Answers,
    retrained_seeds: Sequence[Mapping[str, Answers]],
    *,
    k: float,
) -> float:
    """`s_mia` on the rows kept apart for tuning, in [0, 1]; higher is better."""
    kept_apart = [
        {name: probe_of(of_seed, f"validation_{name}") for name in ("forget", "holdout")} for of_seed in retrained_seeds
    ]
    return s_mia(validation_forget, validation_holdout, kept_apart, k=k)


@Scale("higher", 0, 1)
def open_unlearning_s_mia(
    forget: Answers, holdout: Answers, retrained_seeds: Sequence[Mapping[str, Answers]], *, k: float
) -> float:
    """`s_mia` in OpenUnlearning's dialect, 1 - min(|A - A_r| / A_r, 1), in [0, 1]; higher is better.

    An untouched model (A = 1) has 0.445 where A_r is 0.643. UndefinedError at A_r = 0. Source: Dorna et al. 2025.
    """
    ours, never = _aucs(forget, holdout, retrained_seeds, k)
    if never == 0:
        raise UndefinedError("the retrained model's AUC is 0, by which it divides")
    return 1 - min(abs(ours - never) / never, 1)


@Scale("nearest", 0, 1)
def soul_release_mia_auc(forget: Answers, authors: Answers, facts: Answers, *, k: float) -> float:
    """`mia_auc` in the dialect of the SOUL release, in [0, 1]: see `soul_release_auc`."""
    others = [probe.per_example(min_k, k=k) for probe in (authors, facts)]
    return soul_release_auc(forget.per_example(min_k, k=k), np.concatenate(others))


def soul_release_auc(forget: np.ndarray, others: np.ndarray) -> float:
    """AUC of min-k in the dialect of the SOUL release, whose labels are misaligned with its texts, in [0, 1].

    The texts are forget, then others; the labels begin with those of the others, as many as these are. With n forgotten
    and m < n other texts it lies in 0.5 ± m / 2n; with n = m it is that of `mia_auc`. (The release scores prompt and
    answer, and its others are real authors and world facts; records hold the answers alone.) Source: the code of Jia et
    al. 2024.
    """
    scores = np.concatenate([forget, others])
    return roc_auc(scores[: len(others)], scores[len(others) :])


def open_unlearning_gradnorm(answers: Answers) -> np.ndarray:
    """`gradnorm` in OpenUnlearning's dialect: minus the mean over weight tensors of their gradients' norms. [N].

    (It leaves the model in training mode, which matters where that has dropout.) Source: the code of Dorna et al. 2025.
    """
    return -answers.numbers("gradnorm_mean")


def _of_reference(forget: Answers, holdout: Answers, retrained: Mapping[str, Answers]) -> tuple[np.ndarray, np.ndarray]:
    return reference(forget, probe_of(retrained, "forget")), reference(holdout, probe_of(retrained, "holdout"))


def _aucs(
    forget: Answers, holdout: Answers, retrained_seeds: Sequence[Mapping[str, Answers]], k: float
) -> tuple[float, float]:
    """The AUC of min-k of a model, and the mean of those of the retrained ones."""
    never = [mia_auc(probe_of(of_seed, "forget"), probe_of(of_seed, "holdout"), k=k) for of_seed in retrained_seeds]
    return mia_auc(forget, holdout, k=k), sum(never) / len(never)
