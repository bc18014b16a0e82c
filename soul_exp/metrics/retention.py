"""Matched retention: what a model knows of the forget rows where as much is retained as of any other model.

Weights move from the original's (alpha 0) to the attacked model's (alpha 1). The branch "path" has the points
"PROBE-at-ALPHA" for each alpha that was visited, and "chosen": the largest alpha up to which every visited one keeps a
given share of what the original knows, of the validation rows to retain and of general knowledge, and by which probes.
"""

import numpy as np

from soul_exp.metrics.answers import Answers, UndefinedError
from soul_exp.metrics.memorisation import extraction_strength
from soul_exp.metrics.robustness import AT, KNOWN, MEASURES, Branch, Points
from soul_exp.metrics.scale import UNINFORMATIVE, Scale
from soul_exp.metrics.tofu import choice_probability, probability

FORGET, RETAIN = "forget", "validation_retain"
PATH, CHOSEN = "path", "chosen"  # the branch, and its point of what was chosen


def point_of(probe: str, alpha: float) -> str:
    """The point of the answers to `probe` at `alpha`."""
    return f"{probe}{AT}{alpha}"


def alphas_of(branch: Branch) -> list[float]:
    """Every alpha that was visited, in increasing order."""
    return sorted(float(point.partition(AT)[2]) for point in branch if point.startswith(f"{FORGET}{AT}"))


def retained_strength(branch: Branch, alpha: float) -> float:
    """The extraction strength of the validation rows to retain at `alpha`, in [0, 1]."""
    return extraction_strength(branch[point_of(RETAIN, alpha)])


def general_knowledge(branch: Branch, alpha: float) -> float | None:
    """The mean over the probes of general knowledge of the right answer's probability at `alpha`, in [0, 1].

    Where a probe has wrong answers, as a share of that of all (`choice_probability`). None without such a probe.
    """
    names = [point for point in branch if point.endswith(f"{AT}{alpha}")]
    others = [name for name in names if name.partition(AT)[0] not in (FORGET, RETAIN)]
    return float(np.mean([_probability(branch[name]) for name in others])) if others else None


def _probability(answers: Answers) -> float:
    return probability(answers) if answers.wrong_nll is None else choice_probability(answers)


def keeps(branch: Branch, alpha: float, keep: float) -> bool:
    """Whether the weights at `alpha` keep the share `keep` of both measures of the original."""
    pairs = [(of(branch, alpha), of(branch, 0.0)) for of in (retained_strength, general_knowledge)]
    return all(own is None or before is None or own >= keep * before for own, before in pairs)


@Scale("higher", 0, 1, unit="(1 not binding)", no_interval="it is chosen among a few values")
def retention_alpha(attacked: Points) -> float:
    """The largest alpha up to which all visited ones keep the share asked for, in [0, 1]; 1: the model itself does."""
    branch, found = attacked[PATH], 0.0
    keep = branch[CHOSEN][PATH]["keep"]
    for alpha in alphas_of(branch):
        if not keeps(branch, alpha, keep):
            break
        found = alpha
    if found != (stated := branch[CHOSEN][PATH]["alpha"]):
        raise UndefinedError(f"its records give {found:g}, and state {stated:g}")
    return found


@Scale("lower", 0, 1)
def retention_forget(attacked: Points, *, measure: str = "extraction_strength") -> float:
    """The measure of the forget rows at the chosen alpha, in [0, 1]; lower means that more is forgotten.

    Optimizers are compared by it, since how much each was made to retain is then no explanation. A model that never
    knew the rows has the retrained model's own measure of them. The retrained model is no control here: it does not lie
    on a straight line from the original along which the rest is retained. Its interval is that of this alpha. Source:
    arXiv 2406.09179.
    """
    branch, of = attacked[PATH], MEASURES[measure]
    if (before := of(branch[point_of(FORGET, 0.0)])) < KNOWN:
        raise UndefinedError(f"{UNINFORMATIVE}: the original knows {before:.2f}, expected {KNOWN:g} or more")
    return of(branch[point_of(FORGET, branch[CHOSEN][PATH]["alpha"])])


@Scale("higher", 0, np.inf)
def retention_retain(attacked: Points) -> float:
    """The extraction strength of the validation rows to retain at the chosen alpha, as a share of the original's."""
    branch = attacked[PATH]
    return _share(retained_strength(branch, branch[CHOSEN][PATH]["alpha"]), retained_strength(branch, 0.0))


@Scale("higher", 0, np.inf)
def retention_general(attacked: Points) -> float:
    """General knowledge at the chosen alpha, as a share of the original's."""
    branch = attacked[PATH]
    own, before = (general_knowledge(branch, alpha) for alpha in (branch[CHOSEN][PATH]["alpha"], 0.0))
    if own is None or before is None:
        raise UndefinedError("the task has no probe of general knowledge: alpha is chosen by the rows to retain alone")
    return _share(own, before)


def _share(own: float, before: float) -> float:
    if not before:
        raise UndefinedError("the original knows nothing of it")
    return own / before
