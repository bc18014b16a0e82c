"""The headline metrics of the tasks other than TOFU, which have no paraphrases."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from soul_exp.metrics.answers import Answers
from soul_exp.metrics.statistics import ks_p_value, log10_p_value, mean, probe_of


def forget_quality(forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """p-value of the KS test between the unlearned and the retrained model's NLL per token, in [0, 1].

    1: not told apart from a model that never saw the forget set; near 0: they differ, under- and over-unlearned alike.
    Both on the forget set. Not TOFU's forget quality, which compares truth ratios.
    """
    return ks_p_value(forget.numbers("nll"), probe_of(retrained, "forget").numbers("nll"))


def log10_forget_quality(forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """log10 of `forget_quality`, in [-307.65, 0]; 0 is the best. A p-value below 2.2e-308 counts as 2.2e-308."""
    return log10_p_value(forget_quality(forget, retrained))


def validation_log10_forget_quality(validation_forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """`log10_forget_quality` on the rows that are kept apart for tuning, in [-307.65, 0]; higher is better."""
    return log10_forget_quality(validation_forget, {"forget": probe_of(retrained, "validation_forget")})


def mean_nll(answers: Answers) -> float:
    """Mean over items of the NLL per answer token, in nats, at least 0; lower means more familiar."""
    return mean(answers.numbers("nll"))


def perplexity(answers: Answers) -> float:
    """exp of `mean_nll`, in [1, inf]; lower means more familiar.

    Every item weighs the same: it is the geometric mean of the items' perplexities, and equals the perplexity of the
    whole corpus only if all items have the same number of tokens.
    """
    with np.errstate(over="ignore"):  # above 709 nats it is inf
        return float(np.exp(mean_nll(answers)))
