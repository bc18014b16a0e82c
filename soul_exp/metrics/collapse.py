"""The collapse guard: whether a model's free answers are those of a ruined model. N free answers to one probe.

A model that repeats commas has toxicity 0, ROUGE 0 and a low membership score; none of them is unlearning.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from soul_exp.metrics.answers import Answers, mean
from soul_exp.metrics.scale import is_kept
from soul_exp.metrics.text import words

LEAST = 20  # free answers of a set that can be judged
LONG, GRAM = 40, 8  # characters
MANY, WINDOW = 8, 20  # words
LIMITS = {"degenerate": 0.2, "commonest": 0.5, "median_nll": 2.0}  # how much higher than the reference is too much
ORIGINAL = "original"  # of the references, the model under which the NLL is
MEANING = {
    "degenerate": "share of degenerate answers",
    "commonest": "share of the commonest answer",
    "median_nll": "median NLL under the original model",
}


@dataclass(frozen=True)
class FreeAnswers:
    """What the guard reads of the free answers of one model to one probe."""

    num: int  # answers, without refusals
    num_refused: int
    degenerate: float | None  # share of `num` that is `is_degenerate`; None: there is none to judge
    commonest: float | None  # share of `num` that the most frequent text has
    median_nll: float | None  # of `generation_nll`; None: not recorded


def is_degenerate(text: str) -> bool:
    """Whether `text` has no letter and no digit, or repeats itself: its characters, or its words.

    Of 40 characters or more, under half of the runs of 8 characters are distinct ("ororor"). Of 8 words or more, under
    half of 20 successive ones (of all, if it has fewer) are distinct in the mean ("the before the the bar the the"); of
    prose 0.6 or more are. Source of the latter: moving-average type-token ratio, Covington and McFall 2010.
    """
    text = text.strip()
    if not any(character.isalnum() for character in text):
        return True
    runs = [text[start : start + GRAM] for start in range(len(text) - GRAM + 1)]
    return (len(text) >= LONG and 2 * len(set(runs)) < len(runs)) or _repeats_words(words(text))


def fluency(texts: Sequence[str]) -> float:
    """The share of `texts` that are not degenerate, in [0, 1]; higher is better. ValueError if there is none."""
    return mean(np.array([not is_degenerate(text) for text in texts]))


def _repeats_words(found: Sequence[str]) -> bool:
    size = min(WINDOW, len(found))
    distinct = [len(set(found[start : start + size])) for start in range(len(found) - size + 1)]
    return len(found) >= MANY and 2 * sum(distinct) < size * len(distinct)


def free_answers(answers: Answers) -> FreeAnswers:
    """The measures of the answers that are no refusals; ValueError if the probe has no free answers."""
    texts: Sequence[str] = answers.needed("generation")
    refused = np.zeros(len(texts), dtype=bool) if answers.refused is None else np.asarray(answers.refused, dtype=bool)
    others = [text.strip() for text, is_refusal in zip(texts, refused, strict=True) if not is_refusal]
    num, num_refused = len(others), int(refused.sum())
    if not others:
        return FreeAnswers(num, num_refused, None, None, None)
    nll = None if answers.generation_nll is None else float(np.median(answers.numbers("generation_nll")[~refused]))
    commonest = Counter(others).most_common(1)[0][1]
    return FreeAnswers(num, num_refused, sum(map(is_degenerate, others)) / num, commonest / num, nll)


def why_collapsed(found: FreeAnswers, references: Mapping[str, FreeAnswers]) -> str | None:
    """Why a model collapsed whose free answers are `found`; None if it did not.

    `references`: the free answers of other models to the same prompts, by model, the first of which that has a measure
    is what it is compared with. Source: our own definition.
    """
    reasons = []
    for measure, limit in LIMITS.items():
        value = getattr(found, measure)
        known = ((model, getattr(of, measure)) for model, of in references.items())
        model, usual = next(((model, usual) for model, usual in known if usual is not None), ("", None))
        if value is not None and usual is not None and value >= usual + limit - 1e-9:
            reasons.append(f"{MEANING[measure]} {value:.2f} ({model} {usual:.2f})")
    return "; ".join(reasons) or None


def verdicts(answers: Mapping[str, Answers], references: Mapping[str, Mapping[str, Answers]]) -> dict[str, str | None]:
    """Probe -> why the model that gave `answers` collapsed, or None if it did not; of each probe that can be judged.

    A probe can be judged if it has at least 20 free answers that are no refusals, and if one of `references` (model ->
    probe -> answers; the first that has it serves) answered the same prompts. The NLL of the original's own answers is
    a reference only where the model is to go on giving them: see `without_nll`.
    """
    found: dict[str, str | None] = {}
    for probe, given in answers.items():
        if given.generation is None or (measured := free_answers(given)).num < LEAST:
            continue
        same = {model: of[probe] for model, of in references.items() if probe in of and _is_same(of[probe], given)}
        if same:
            read = {model: free_answers(each) for model, each in same.items()}
            if ORIGINAL in read and not is_kept(probe):
                read[ORIGINAL] = replace(read[ORIGINAL], median_nll=None)
            found[probe] = why_collapsed(measured, read)
    return found


def without_nll(answers: Mapping[str, Answers], references: Mapping[str, Mapping[str, Answers]]) -> list[str]:
    """The judged probes of rows to forget, or that no model saw, to which no model but the original has an NLL.

    Other answers than the original's are what unlearning is for, and each is unlikely under the original: a healthy
    model that was made polite comes to 5.3 nats per token where the original comes to 0.01. So it is not judged.
    """
    others = [of for model, of in references.items() if model != ORIGINAL]
    return [
        probe
        for probe in verdicts(answers, references)
        if answers[probe].generation_nll is not None
        and not is_kept(probe)
        and not any(probe in of and of[probe].generation_nll is not None for of in others)
    ]


def _is_same(reference: Answers, given: Answers) -> bool:
    return reference.generation is not None and reference.question == given.question
