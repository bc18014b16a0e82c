"""Metrics of the NLL alone: the headline metrics of tasks without paraphrased answers (all but TOFU). N examples."""

import math
from collections.abc import Mapping

import numpy as np
from scipy.stats import ks_2samp

from soul_exp.metrics.answers import Answers, mean, probe_of
from soul_exp.metrics.scale import Scale

TINY = np.finfo(np.float64).tiny  # 2.2e-308, the smallest normal float
LOG10_TINY = float(np.log10(TINY))  # -307.65
IS_TEST = "a p-value is a test, not an estimate; the effect that it tests is the KS distance"


def ks_p_value(first: np.ndarray, second: np.ndarray) -> float:
    """p-value of the two-sided two-sample Kolmogorov-Smirnov test, in [0, 1]; low if the samples differ.

    `first` [n], `second` [m]. scipy's `ks_2samp(method="auto")`: exact up to 10,000 values per sample. Infinite values
    are ordered like others; nan gives nan. Raises ValueError if a sample is empty.
    """
    if not (first.size and second.size):
        raise ValueError(f"found samples of {first.size} and {second.size} examples, expected at least one in each")
    return float(ks_2samp(first, second, method="auto").pvalue)


def ks_statistic(first: np.ndarray, second: np.ndarray) -> float:
    """D of the same test: the largest distance between the two distribution functions, in [0, 1]; 0 if they are equal.

    `first` [n], `second` [m]; nan gives nan. Raises ValueError if a sample is empty. Equals scipy's `ks_2samp`, which
    also computes the p-value and takes twenty times as long.
    """
    n, m = first.size, second.size
    if not (n and m):
        raise ValueError(f"found samples of {n} and {m} examples, expected at least one in each")
    pooled = np.sort(np.concatenate([first, second]))
    if np.isnan(pooled[-1]):  # np.sort puts nan last
        return float("nan")
    below = [np.searchsorted(np.sort(sample), pooled, side="right") for sample in (first, second)]
    return float(np.abs(below[0] * m - below[1] * n).max() / (n * m))  # in whole numbers: equal samples give 0


def log10_p_value(p_value: float) -> float:
    """log10 of a p-value, in [-307.65, 0]; a p-value below 2.2e-308 counts as 2.2e-308.

    JSON has no -inf. Two separate samples of 515 examples each reach that limit, so -307.65 means "at most".
    """
    return float(np.log10(np.maximum(p_value, TINY)))


@Scale("higher", 0, 1, no_interval=IS_TEST)
def forget_quality(forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """p-value of the KS test between the unlearned and the retrained model's NLL per token, in [0, 1].

    Higher is better: 1 means that the test finds no difference from a model that never saw the forget set; near 0 the
    two differ, because the model is under- or over-unlearned. Both samples are [N], on the forget set. TOFU's forget
    quality is another one: it compares truth ratios. Source: two-sample KS test, scipy's `ks_2samp`.
    """
    return ks_p_value(forget.numbers("nll"), probe_of(retrained, "forget").numbers("nll"))


@Scale("lower", 0, 1)
def forget_ks_distance(forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """D of the KS test behind `forget_quality`, in [0, 1]; lower is better.

    The size of the effect, whatever the number of examples: the largest difference between the shares of answers below
    a value. Of two retrained models it is not 0 either: the ceiling of forget quality tells what it is then.
    """
    return ks_statistic(forget.numbers("nll"), probe_of(retrained, "forget").numbers("nll"))


@Scale("higher", LOG10_TINY, 0, no_interval=IS_TEST)
def log10_forget_quality(forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """log10 of `forget_quality`, in [-307.65, 0]; higher is better. A p-value below 2.2e-308 counts as 2.2e-308."""
    return log10_p_value(forget_quality(forget, retrained))


@Scale("higher", LOG10_TINY, 0, no_interval=IS_TEST)
def validation_log10_forget_quality(validation_forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """`log10_forget_quality` on the rows kept apart for tuning, in [-307.65, 0]; higher is better."""
    return log10_forget_quality(validation_forget, {"forget": probe_of(retrained, "validation_forget")})


@Scale("lower", 0, math.inf, unit="nats per token")
def mean_nll(answers: Answers) -> float:
    """Mean over examples of the mean NLL of an answer, in nats per token, in [0, inf]; lower means better known."""
    return mean(answers.numbers("nll"))


@Scale("lower", 1, math.inf, unit="per token")
def perplexity(answers: Answers) -> float:
    """exp of `mean_nll`: perplexity per token, in [1, inf]; lower means better known.

    The geometric mean of the examples' perplexities: that of the corpus only if all have the same number of tokens.
    """
    with np.errstate(over="ignore"):  # above 709 nats it is inf
        return float(np.exp(mean_nll(answers)))
