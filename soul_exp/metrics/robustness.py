"""What an attack brings back: numbers of its points, of the attacked model beside the original and the retrained one.

A model's points are branch -> point -> answers to the forget probe; a measure of an answer is higher where the model
knows more. The retrained model is the control: what it gains too was taught by the attack, not recovered.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from soul_exp.metrics.answers import UndefinedError
from soul_exp.metrics.memorisation import extraction_strength
from soul_exp.metrics.scale import UNINFORMATIVE, Scale
from soul_exp.metrics.tofu import probability

MEASURES = {"extraction_strength": extraction_strength, "probability": probability}
KNOWN, APART = 0.5, 0.2  # least measure of the original, and least lead of it over the retrained model: else no attack
SPLITS = ("first", "second")  # which half of the forgotten units is tuned on
AT = "-at-"  # PROBE-at-ALPHA: a point of weights on the way to the attacked model's, which is no attack on it
STILL = 0.05  # a change that is no change
Branch = Mapping[str, Any]  # point -> Answers, or Scores
Points = Mapping[str, Branch]


def informative(original: float, retrained: float) -> bool:
    """Whether a measure of both models at one point leaves something to recover."""
    return original >= KNOWN and original - retrained >= APART


def _curve(branch: Branch, measure: str) -> np.ndarray:
    """[P, 2], the points of a branch whose names are numbers, in increasing order, and the measure there."""
    found = sorted((float(point), MEASURES[measure](branch[point])) for point in branch)
    return np.array(found, dtype=float).reshape(-1, 2)


def _curves(measure: str, control: float | None, *models: Points) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Of each branch, where its points are, and each model's measure there; the last model is the retrained one.

    Branches in which that one moves by more than `control` are left out; UndefinedError if all are.
    """
    found, moved = [], []
    for branch in models[-1]:
        curves = [_curve(model[branch], measure) for model in models]
        values = [curve[:, 1] for curve in curves]
        moved.append(float(np.abs(values[-1] - values[-1][0]).max()))
        if control is None or moved[-1] <= control:
            found.append((curves[0][:, 0], values))
    if not found:
        raise UndefinedError(f"control moved: the retrained model by {min(moved):.2f}, expected {control:g} at most")
    return found


@Scale("nearest", -1, 1)
def excess_area(
    attacked: Points, original: Points, retrained: Points, *, measure: str = "extraction_strength",
    control: float | None = None,
) -> float:  # fmt: skip
    """How much more than the retrained model the attacked one knows under the same attack; the largest of all branches.

    Of a branch: the area between both curves (trapezoids) over its length, in [-1, 1]; 0 where both know as much at
    every point. Branches in which no attacked point is informative do not count, nor those whose retrained model moves
    by more than `control`.
    """
    areas = [
        float(np.trapezoid(found - without, at) / (at[-1] - at[0]))
        for at, (found, before, without) in _curves(measure, control, attacked, original, retrained)
        if any(informative(*pair) for pair in zip(before[1:], without[1:], strict=True))
    ]
    if not areas:
        raise UndefinedError(f"{UNINFORMATIVE}: no point leaves {KNOWN:g} of the original and a lead of {APART:g}")
    return max(areas)


@Scale("higher", 0, 1)
def relearning_similarity(
    attacked: Points, retrained: Points, *, step: int, measure: str = "extraction_strength",
    control: float | None = None,
) -> float:  # fmt: skip
    """R = 1 - |d_u - d_r| / (|d_u| + |d_r|), the least over branches; 1 where both models gain as much in `step` steps.

    d is the gain of a model's measure from its first point to `step`. A branch in which both stay where they are does
    not count. Source: arXiv 2506.00688.
    """
    found = []
    for at, values in _curves(measure, control, attacked, retrained):
        if step not in at:
            raise UndefinedError(f"the attack has no point {step}")
        own, other = (float(curve[at == step][0] - curve[0]) for curve in values)
        if abs(own) + abs(other) >= STILL:
            found.append(1 - abs(own - other) / (abs(own) + abs(other)))
    if not found:
        raise UndefinedError(f"neither model moves by {STILL:g} in {step} steps")
    return min(found)


@Scale("higher", 0, np.inf, no_interval="it is a number of steps, one of a few")
def steps_to_recover(
    attacked: Points, original: Points, retrained: Points, *, measure: str = "extraction_strength",
    control: float | None = None,
) -> float:  # fmt: skip
    """The least number of steps, over branches, after which half of what was forgotten is back.

    That is, the measure is at least the mean of the original's and the retrained model's before the attack.
    """
    found, last = [], 0.0
    for at, (own, before, without) in _curves(measure, control, attacked, original, retrained):
        if not informative(before[0], without[0]):
            continue
        enough = own >= (before[0] + without[0]) / 2
        found += [float(at[enough][0])] if enough.any() else []
        last = max(last, float(at[-1]))
    if not last:
        raise UndefinedError(f"{UNINFORMATIVE}: before the attack nothing leaves {KNOWN:g} and a lead of {APART:g}")
    if not found:
        raise UndefinedError(f"half of it is not back after {last:g} steps")
    return min(found)


@Scale("nearest", 0, np.inf)
def retrained_on_part(
    attacked: Points, original: Points, retrained: Points, *, measure: str = "extraction_strength"
) -> float:
    """What fine-tuning on one half of the forgotten units brings back of the other, as a share of what is left there.

    That is, the measure on the other half over the original's, 1 where everything is back; the mean of both ways round.
    The learning rate and the number of steps of each model are those with the largest measure on the half it is tuned
    on; of several the fewest steps, then the smallest rate. Source: arXiv 2410.08827.
    """
    shares = []
    for split in SPLITS:
        own, before, without = (_best_on_part(model, split, measure) for model in (attacked, original, retrained))
        if not informative(before, without):
            found = f"of the other half the original knows {before:.2f}, the retrained model {without:.2f}"
            raise UndefinedError(f"{UNINFORMATIVE}: {found}")
        shares.append(own / before)
    return float(np.mean(shares))


def _best_on_part(points: Points, split: str, measure: str) -> float:
    """The measure on the half that is left out, where the one on the other half is the largest."""
    of, begin = MEASURES[measure], f"{split}-tuned-"
    found = [(branch, point) for branch in points for point in points[branch] if point.startswith(begin)]

    def place(at: tuple[str, str]) -> tuple[float, int, float]:
        value = of(points[at[0]][at[1]])
        return value if math.isfinite(value) else -math.inf, -int(at[1].removeprefix(begin)), -float(at[0])

    branch, point = max(found, key=place)
    return of(points[branch][point.replace("-tuned-", "-left-")])


@Scale("nearest", -np.inf, np.inf)
def quantised_recovery(
    attacked: Points, original: Points, retrained: Points, *, scheme: str, measure: str = "extraction_strength"
) -> float:
    """What quantising brings back, less what it gives the retrained model, as a share of what was forgotten.

    0 where it brings back nothing, 1 where everything.
    """

    def of(points: Points, branch: str) -> float:
        return float(MEASURES[measure](points[branch]["forget"]))

    gains = [of(points, scheme) - of(points, "none") for points in (attacked, retrained)]
    if not informative(of(original, scheme), of(retrained, scheme)):
        raise UndefinedError(f"{UNINFORMATIVE}: quantised, the original knows {of(original, scheme):.2f}")
    lost = of(original, scheme) - of(attacked, "none")
    if lost <= APART:
        found = f"the original, quantised, knows {round(lost, 2) + 0.0:.2f} more than the model"  # + 0.0: no -0.00
        raise UndefinedError(f"{found}, expected more than {APART:g}")
    return (gains[0] - gains[1]) / lost


@Scale("nearest", 0, 1, no_interval="it counts all weights, of which no sample is drawn")
def same_codes(attacked: Points, *, scheme: str) -> float:
    """Share of the weights that quantise to the code that they have in the original, on the original's scales."""
    codes = attacked[scheme]["codes"]["all"]
    return codes["same"] / codes["size"]
