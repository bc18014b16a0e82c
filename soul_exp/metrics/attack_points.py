"""The measures of an attack's points, and the points that leave nothing to recover."""

from collections.abc import Mapping
from typing import Any

from soul_exp.metrics.answers import Answers, Scores
from soul_exp.metrics.depth import mean_losses
from soul_exp.metrics.leakage import answered, leak_at
from soul_exp.metrics.robustness import AT, MEASURES, informative
from soul_exp.metrics.tofu import choice_probability, probability

JUDGED = ("extraction_strength", "answered", "leak_1")  # measures of which a point has one at most


def measured(found: Answers | Scores) -> dict[str, float]:
    """The measures of what a model answers at one point; of counts of codes the share of the same, of others all."""
    if not isinstance(found, Answers):
        same = {name: {"same": of["same"] / of["size"]} if "size" in of else of for name, of in found.items()}
        return {f"{name}_{measure}": value for name, of in same.items() for measure, value in of.items()}
    if found.exchanged_logp is not None:
        return {f"loss_{number}": loss for number, loss in enumerate(mean_losses(found))}
    known = MEASURES if found.right is not None else {"probability": probability}
    if found.wrong_nll is not None:
        known = {**known, "choice_probability": choice_probability}
    return {**_of_texts(found), **{name: function(found) for name, function in known.items()}}


def _of_texts(answers: Answers) -> dict[str, float]:
    """The measures of free texts, where there are any; and of how many questions, where not all can be asked."""
    found: dict[str, float] = {}
    if answers.generation is not None:
        found |= {"answered": answered(answers), "num_answers": float(len(answers))}
    if answers.draws is not None:
        num_samples = min(map(len, answers.draws))
        found |= {f"leak_{2**power}": leak_at(answers, k=2**power) for power in range(num_samples.bit_length())}
    return found


def uninformative(original: Mapping[str, Any], retrained: Mapping[str, Any]) -> dict[str, list[str]]:
    """branch -> the points at which the first of JUDGED leaves nothing to recover; both models' measures."""
    found = {
        branch: [
            point
            for point, values in points.items()
            for name in [name for name in JUDGED if name in values][:1]
            if AT not in point and not informative(values[name] or 0.0, retrained[branch][point][name] or 0.0)
        ]
        for branch, points in original.items()
    }
    return {branch: points for branch, points in found.items() if points}
