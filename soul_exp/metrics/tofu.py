"""The metrics of TOFU, as its authors' code aggregates their logs. Source of each: Maini et al. 2024.

N examples, K wrong answers per example. p(a) = exp(-nll) is the length-normalised probability of answer a.
"""

from collections.abc import Mapping

import numpy as np
from scipy.special import logsumexp, softmax
from scipy.stats import hmean

from soul_exp.metrics.answers import Answers, mean, probe_of
from soul_exp.metrics.general import IS_TEST, LOG10_TINY, ks_p_value, ks_statistic, log10_p_value
from soul_exp.metrics.scale import Scale

ADDED = 1e-10  # by OpenUnlearning, to p(correct) and to the sum of probabilities
RELEASE_ADDED = 1e-12  # by the SOUL release, to p(correct)
BARE = "2: the paraphrased question, no end token, and 1e-12 added to p(correct), as the release"


@Scale("higher", 0, 1)
def probability(answers: Answers) -> float:
    """Mean of p(answer), in [0, 1]; higher means better known. For any probe. Source: Maini et al. 2024."""
    return mean(np.exp(-answers.numbers("nll")))


@Scale("higher", 0, 1)
def choice_probability(answers: Answers) -> float:
    """Mean of p(answer) / (p(answer) + sum of p(wrong)), in [0, 1]; higher means better known. For authors and facts.

    1 / (K + 1) if all are as likely. As a softmax: very unlikely answers do not give 0 / 0. Source: Maini et al. 2024.
    """
    return mean(answers.per_example(_shares))


def _shares(answers: Answers) -> np.ndarray:
    """The true answer's share of the probability of all, [N]."""
    choices = np.column_stack([answers.numbers("nll"), answers.numbers("wrong_nll")])  # [N, 1 + K], the true one first
    return np.asarray(softmax(-choices, axis=1)[:, 0])


@Scale("higher", 0, 1)
def rouge(answers: Answers) -> float:
    """Mean ROUGE-L recall of the generated answers, in [0, 1]; higher means better known. Source: Maini et al. 2024."""
    return mean(answers.numbers("rouge_l"))


@Scale("higher", 0, 1)
def accuracy(answers: Answers) -> float:
    """Share of the answers to paraphrased questions that are nearest to the paraphrased answer, in [0, 1].

    Higher: better known. Nearest of it and the K perturbed answers, by the cosine of sentence embeddings; by chance
    1 / (K + 1). A tie is right, but for one at exactly 0: an answer that shares nothing with any of them is wrong, else
    ",,,," would be right by an embedding that counts. For forget and retain. Source: Jia et al. 2024 (SOUL).
    """
    return mean(answers.per_example(_is_nearest))


def _is_nearest(answers: Answers) -> np.ndarray:
    """1 where the paraphrased answer is nearest, else 0, [N]; nan where a cosine is."""
    cosines = answers.numbers("similarity")  # [N, 1 + K], that to the paraphrased answer first
    right = (cosines[:, 0] >= cosines.max(axis=1)) & (cosines[:, 0] != 0)
    return np.where(np.isnan(cosines).any(axis=1), np.nan, right)


@Scale("higher", 0, 1)
def containment(answers: Answers) -> float:
    """Share of the generated answers in which the true answer occurs, in upper or lower case, in [0, 1]; higher: known.

    The accuracy of SOUL for authors and facts, whose answers are names. Source: Jia et al. 2024.
    """
    return mean(answers.per_example(_contains_answer))


def _contains_answer(answers: Answers) -> np.ndarray:
    pairs = zip(answers.needed("answer"), answers.needed("generation"), strict=True)
    return np.array([answer.strip().casefold() in text.casefold() for answer, text in pairs], dtype=np.float64)


@Scale("higher", 0, 1)
def paraphrased_question_probability(answers: Answers) -> float:
    """`probability` of the same answer, end token included, to the paraphrased question, in [0, 1]; higher: known.

    Whether a fact is gone, or only the question under which it was forgotten. OpenUnlearning's paraphrased probability
    is another one: of the paraphrased answer to the original question.
    """
    return mean(np.exp(-answers.numbers("rephrased_nll")))


def truth_ratios(answers: Answers) -> np.ndarray:
    """R = (geometric mean of p(wrong)) / p(correct), in [0, inf]; below 1 the model prefers the truth. Returns [N].

    `correct` is the paraphrased answer where the probe has one, as the released code: forget, retain; else the answer.
    """
    with np.errstate(over="ignore"):  # an R above the largest float is inf
        return np.asarray(np.exp(_log_truth_ratios(answers)))


@Scale("nearest", 0, 1)
def truth_ratio_forget(answers: Answers) -> float:
    """Mean of min(R, 1/R), in [0, 1]; higher means that the model separates true and wrong answers less.

    Nearest to the retrained model's is best: R far from 1 either way gives a low value. ValueError without paraphrases.
    """
    answers.needed("paraphrase_nll")
    return mean(np.exp(-np.abs(_log_truth_ratios(answers))))


@Scale("higher", 0, 1)
def truth_ratio(answers: Answers) -> float:
    """Mean of max(0, 1 - R), in [0, 1]; higher: the truth is preferred more clearly. For retain, authors and facts."""
    return mean(np.maximum(0.0, 1.0 - truth_ratios(answers)))


@Scale("higher", 0, 1, no_interval=IS_TEST)
def forget_quality(forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """p-value of the KS test between R of the unlearned and R of the retrained model on the forget set, in [0, 1].

    Higher is better: 1 means that the test finds no difference from a model that never saw the forget set; near 0 the
    two differ: under- or over-unlearned. Both samples are [N]. ValueError if either probe has no paraphrased answers.
    """
    return ks_p_value(*_compared(forget, retrained))


@Scale("lower", 0, 1)
def forget_ks_distance(forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """D of the KS test behind `forget_quality`, in [0, 1]; lower is better.

    The size of the effect, whatever the number of examples: the largest difference between the shares of answers whose
    truth ratio is below a value. Of two retrained models it is not 0 either, as the ceiling of forget quality tells.
    """
    return ks_statistic(*_compared(forget, retrained))


@Scale("higher", LOG10_TINY, 0, no_interval=IS_TEST)
def log10_forget_quality(forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """log10 of `forget_quality`, in [-307.65, 0]; higher is better. A p-value below 2.2e-308 counts as 2.2e-308."""
    return log10_p_value(forget_quality(forget, retrained))


@Scale("higher", LOG10_TINY, 0, no_interval=IS_TEST)
def validation_log10_forget_quality(validation_forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """`log10_forget_quality` on the rows kept apart for tuning, in [-307.65, 0]; higher is better."""
    return log10_forget_quality(validation_forget, {"forget": probe_of(retrained, "validation_forget")})


@Scale("higher", 0, 1)
def model_utility(retain: Answers, authors: Answers, facts: Answers) -> float:
    """Harmonic mean of {probability, ROUGE, truth ratio} × {retain, authors, facts}, in [0, 1]; higher is better.

    0 if one of the nine is 0. ValueError if the retain probe has no paraphrased answers. Source: Maini et al. 2024.
    """
    retain.needed("paraphrase_nll")
    probes = (retain, authors, facts)
    probabilities = [probability(retain), choice_probability(authors), choice_probability(facts)]
    return float(hmean(probabilities + [rouge(probe) for probe in probes] + [truth_ratio(probe) for probe in probes]))


@Scale("higher", 0, 1)
def validation_utility(validation_retain: Answers, validation_authors: Answers, validation_facts: Answers) -> float:
    """`model_utility` on the rows kept apart for tuning, in [0, 1]; higher is better."""
    return model_utility(validation_retain, validation_authors, validation_facts)


# ---- The dialect of OpenUnlearning: R = p(wrong) / (p(correct) + 1e-10). Source: the code of Dorna et al. 2025.


@Scale("higher", 0, 1, no_interval=IS_TEST)
def open_unlearning_forget_quality(forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """`forget_quality` in OpenUnlearning's dialect, in [0, 1]; higher is better.

    It differs where paraphrases became about as unlikely as 1e-10 per token, which bounds R by 1e10.
    """
    return ks_p_value(*_compared(forget, retrained, added=ADDED))


@Scale("higher", LOG10_TINY, 0, no_interval=IS_TEST)
def open_unlearning_log10_forget_quality(forget: Answers, retrained: Mapping[str, Answers]) -> float:
    """log10 of `open_unlearning_forget_quality`, in [-307.65, 0]; higher is better."""
    return log10_p_value(open_unlearning_forget_quality(forget, retrained))


@Scale("higher", 0, 1)
def open_unlearning_choice_probability(answers: Answers) -> float:
    """`choice_probability` in OpenUnlearning's dialect, which adds 1e-10 to the sum, in [0, 1]."""
    right, wrong = np.exp(-answers.numbers("nll")), np.exp(-answers.numbers("wrong_nll")).sum(axis=1)
    return mean(right / (right + wrong + ADDED))


@Scale("nearest", 0, 1)
def open_unlearning_truth_ratio_forget(answers: Answers) -> float:
    """`truth_ratio_forget` in OpenUnlearning's dialect, mean of min(R, 1 / (R + 1e-10)), in [0, 1]."""
    answers.needed("paraphrase_nll")
    ratios = np.exp(answers.per_example(_of_answers, added=ADDED))
    return mean(np.minimum(ratios, 1 / (ratios + ADDED)))


@Scale("higher", 0, 1)
def open_unlearning_truth_ratio(answers: Answers) -> float:
    """`truth_ratio` in OpenUnlearning's dialect, in [0, 1]; higher: the truth is preferred more clearly."""
    return mean(np.maximum(0.0, 1.0 - np.exp(answers.per_example(_of_answers, added=ADDED))))


@Scale("higher", 0, 1)
def open_unlearning_model_utility(retain: Answers, authors: Answers, facts: Answers) -> float:
    """`model_utility` of OpenUnlearning's nine numbers, in [0, 1]; higher is better."""
    retain.needed("paraphrase_nll")
    probes = (retain, authors, facts)
    probabilities = [probability(retain), *map(open_unlearning_choice_probability, (authors, facts))]
    return float(hmean([*probabilities, *map(rouge, probes), *map(open_unlearning_truth_ratio, probes)]))


# ---- The dialect of the SOUL release. Source: the code of Jia et al. 2024.


@Scale("higher", 0, 1, no_interval=IS_TEST, history=("first definition", BARE))
def soul_release_forget_quality(forget: Answers, retain: Answers) -> float:
    """p-value of the KS test between R of the forget and of the retain answers of the *same* model, in [0, 1].

    Higher counts as better there: a model that answers everything with the same character reaches 1. R is that of
    `soul_release_truth_ratio`.
    """
    return ks_p_value(forget.per_example(_of_means), retain.per_example(_of_means))


@Scale("higher", LOG10_TINY, 0, no_interval=IS_TEST, history=("first definition", BARE))
def soul_release_log10_forget_quality(forget: Answers, retain: Answers) -> float:
    """log10 of `soul_release_forget_quality`, in [-307.65, 0]."""
    return log10_p_value(soul_release_forget_quality(forget, retain))


@Scale("lower", 0, 1 / RELEASE_ADDED, history=("first definition", BARE))
def soul_release_truth_ratio(answers: Answers) -> float:
    """Mean of R = (arithmetic mean of p(wrong)) / (p(correct) + 1e-12), in [0, 1e+12]; below 1 the truth is preferred.

    The p are of the answers without the end token, to the paraphrased question where the probe has one. `correct` as in
    `truth_ratios`.
    """
    return mean(np.exp(answers.per_example(_of_means)))


def _of_means(answers: Answers) -> np.ndarray:
    """log of the release's R of each example, [N]."""
    wrong, correct = answers.numbers("bare_wrong_nll"), answers.numbers("bare_nll")
    with np.errstate(invalid="ignore"):  # of nan
        added = np.logaddexp(-correct, np.log(RELEASE_ADDED))
    return np.asarray(logsumexp(-wrong, axis=1) - np.log(wrong.shape[1]) - added)


def _compared(forget: Answers, retrained: Mapping[str, Answers], **added: float) -> tuple[np.ndarray, np.ndarray]:
    """The log R of both models' answers to the forget set, whose answers must be paraphrased.

    The test depends on the order of the values alone, and logarithms neither overflow nor underflow.
    """
    others = probe_of(retrained, "forget")
    for answers in (forget, others):
        answers.needed("paraphrase_nll")
    return forget.per_example(_of_answers, **added), others.per_example(_of_answers, **added)


def _log_truth_ratios(answers: Answers) -> np.ndarray:
    """log R of each example, [N]."""
    return answers.per_example(_of_answers)


def _of_answers(answers: Answers, added: float = 0.0) -> np.ndarray:
    """log R of each example, [N], with `added` to p(correct)."""
    correct = answers.numbers("nll" if answers.paraphrase_nll is None else "paraphrase_nll")  # [N]
    wrong = answers.numbers("wrong_nll").mean(axis=1)  # [N]
    if added:
        correct = -np.logaddexp(-correct, np.log(added))
    with np.errstate(invalid="ignore"):  # both of probability 0: inf - inf is nan, as it should be
        return np.asarray(correct - wrong)
