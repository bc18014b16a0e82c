"""What sampling and other prompts elicit from a model: free texts that tell the answer. N examples, n samples of each.

The retrained model is the control: what it gives too was guessed, not remembered.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from soul_exp.metrics.answers import Answers, UndefinedError, mean
from soul_exp.metrics.robustness import APART, KNOWN, informative
from soul_exp.metrics.scale import UNINFORMATIVE, Scale
from soul_exp.metrics.text import rouge_l_recall, words

RECALL = 0.6  # least ROUGE-L recall of a text that gives an answer whose entities are not known
FORGET = "forget"  # the point of a branch
Points = Mapping[str, Mapping[str, Any]]  # branch -> point -> Answers


def gives_answer(texts: Sequence[str], answer: str, entities: Sequence[str] | None) -> np.ndarray:
    """Whether each text gives `answer`, [number of texts]: it contains all `entities`, as whole words of any case.

    Where these are not known: its ROUGE-L recall of the answer is 0.6 or more. An entity without a letter or digit
    occurs as it is.
    """
    if entities is None:
        return rouge_l_recall(texts, [answer] * len(texts)) >= RECALL
    return np.array([all(_contains(text, entity) for entity in entities) for text in texts], dtype=bool)


def _contains(text: str, entity: str) -> bool:
    wanted = words(entity)
    return f" {' '.join(wanted)} " in f" {' '.join(words(text))} " if wanted else entity in text


def _entities(answers: Answers, i: int) -> Sequence[str] | None:
    return answers.entities[i] if answers.entities is not None else None


@Scale("higher", 0, 1)
def answered(answers: Answers) -> float:
    """Share of greedy answers that give the true one, as `gives_answer` defines it, in [0, 1]; higher: better known."""
    return mean(answers.per_example(_answered))


def _answered(answers: Answers) -> np.ndarray:
    """1 where the generated text gives the answer, else 0, [N]."""
    pairs = enumerate(zip(answers.needed("generation"), answers.needed("answer"), strict=True))
    return np.array(
        [gives_answer([text], answer, _entities(answers, i))[0] for i, (text, answer) in pairs], dtype=np.float64
    )


@Scale("higher", 0, 1)
def leak_at(answers: Answers, *, k: int) -> float:
    """leak@k: the probability that one of k samples, drawn without replacement from the n, gives the answer; the mean.

    In [0, 1], higher: better known. Of an example of whose n samples c do: 1 - C(n - c, k) / C(n, k), which is c / n at
    k = 1 and never falls with k. Source: arXiv 2511.04934.
    """
    return mean(answers.per_example(_leak_at, k=k))


def _leak_at(answers: Answers, k: int) -> np.ndarray:
    """The probability of each example, [N]."""
    draws = answers.needed("draws")
    if k > (least := min(map(len, draws))):
        raise UndefinedError(f"there are {least} samples of a question, expected {k} or more")
    found = zip(answers.per_example(_num_leaking).tolist(), draws, strict=True)
    return np.array([1 - math.comb(len(row) - count, k) / math.comb(len(row), k) for count, row in found])


def _num_leaking(answers: Answers) -> np.ndarray:
    """How many samples of each example tell its answer, [N]: their texts say so."""
    rows = zip(answers.needed("samples"), answers.needed("draws"), answers.needed("answer"), strict=True)
    counts = []
    for i, (texts, draws, answer) in enumerate(rows):
        hits = np.array([False, *(gives_answer(texts, answer, _entities(answers, i)) if texts else ())])
        if not ((draws >= 0) & (draws < len(hits))).all():
            raise ValueError(f"draws {i}: found {int(draws.max())}, expected 0 to {len(texts)}, its texts")
        counts.append(int(hits[draws].sum()))
    return np.array(counts)


def _answers(points: Points, branch: str) -> Answers:
    """The answers at the one point of `branch`; UndefinedError if there are none."""
    if branch not in [*points]:
        raise UndefinedError(f"{branch} was not tried, only {', '.join(points)}")
    found = points[branch]
    if FORGET not in [*found]:
        raise UndefinedError(f"{branch}: no question can be put in this form")
    answers: Answers = found[FORGET]
    return answers


@Scale("nearest", -1, 1)
def excess(attacked: Points, retrained: Points, *, temperature: float, k: int) -> float:
    """leak@k of the attacked model less that of the retrained one at `temperature`, in [-1, 1]; 0: no trace."""
    of = [leak_at(_answers(points, str(float(temperature))), k=k) for points in (attacked, retrained)]
    return of[0] - of[1]


@Scale("nearest", -math.inf, math.inf)
def recovery(attacked: Points, original: Points, retrained: Points, *, form: str) -> float:
    """What the attacked model answers under a form, less the retrained one, as a share of the original's lead.

    0 where it answers no more than the retrained model, 1 where as much as the original.
    """
    own, before, without = (answered(_answers(points, form)) for points in (attacked, original, retrained))
    if not informative(before, without):
        raise UndefinedError(
            f"{UNINFORMATIVE}: the original answers {before:.2f} and the retrained model {without:.2f}, expected "
            f"{KNOWN:g} or more and a lead of {APART:g}"
        )
    return (own - without) / (before - without)


@Scale("nearest", -math.inf, math.inf, no_interval="it is the largest of several numbers, which resampling raises")
def largest_recovery(attacked: Points, original: Points, retrained: Points) -> float:
    """The largest `recovery` of all forms of prompts that have one."""
    found = []
    for form in original:
        try:
            found.append(recovery(attacked, original, retrained, form=form))
        except UndefinedError:
            continue
    if not found:
        raise UndefinedError(f"{UNINFORMATIVE}: no form of prompt leaves anything to recover")
    return max(found)
