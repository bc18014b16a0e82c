"""Dialects: what other programs compute under the names of our metrics, from the same answers."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from soul_exp.metrics import membership, memorisation, tofu
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.suite import ScoredTask

Function = Callable[..., Any]
OURS = "ours"


@dataclass(frozen=True)
class Dialect:
    """What another program computes."""

    replaced: Mapping[Function, Function] = field(default_factory=dict)  # our function -> its own
    first: int | None = None  # so many examples of each probe; None: all
    differs: str = ""  # what it also measures otherwise, which our records do not hold
    test: str = "a two-sample KS test against the retrained model"  # whose p-value its forget quality is


DIALECTS = {
    OURS: Dialect(),
    "tofu": Dialect(
        first=300,
        differs="answers of at most 200 tokens in total, prompt included; evaluation in bf16",
    ),
    "open_unlearning": Dialect(
        replaced={
            tofu.forget_quality: tofu.open_unlearning_forget_quality,
            tofu.log10_forget_quality: tofu.open_unlearning_log10_forget_quality,
            tofu.model_utility: tofu.open_unlearning_model_utility,
            tofu.choice_probability: tofu.open_unlearning_choice_probability,
            tofu.truth_ratio: tofu.open_unlearning_truth_ratio,
            tofu.truth_ratio_forget: tofu.open_unlearning_truth_ratio_forget,
            memorisation.extraction_strength: memorisation.open_unlearning_extraction_strength,
            membership.s_mia: membership.open_unlearning_s_mia,
            membership.gradnorm: membership.open_unlearning_gradnorm,
        },
        differs="gradient norms in training mode; evaluation in bf16",
    ),
    "soul_release": Dialect(
        replaced={
            tofu.forget_quality: tofu.soul_release_forget_quality,
            tofu.log10_forget_quality: tofu.soul_release_log10_forget_quality,
            tofu.truth_ratio: tofu.soul_release_truth_ratio,
            tofu.truth_ratio_forget: tofu.soul_release_truth_ratio,
            membership.mia_auc: membership.soul_release_mia_auc,
        },
        differs="membership over prompt and answer; answers of at most 200 tokens in total; evaluation in fp16",
        test="a two-sample KS test of the model's forget answers against its own retain answers",
    ),
    "muse": Dialect(
        replaced={
            membership.mia_auc: functools.partial(membership.mia_auc, k=0.4),
            membership.privleak: membership.muse_privleak,
        },
    ),
}


def in_dialect(metric: Function, name: str) -> Function:
    """`metric`, one of ours or a partial of one, as the dialect `name` computes it; the same where both agree."""
    dialect = DIALECTS[name]
    found = _replaced(metric, dialect.replaced)
    return found if dialect.first is None else _of_first(found, dialect.first)


def _replaced(value: Any, replaced: Mapping[Function, Function]) -> Any:
    """`value` with every function in it, also among the keywords of a partial, that `replaced` names."""
    if not isinstance(value, functools.partial):
        return replaced.get(value, value) if callable(value) else value
    keywords = {key: _replaced(inner, replaced) for key, inner in value.keywords.items()}
    other = replaced.get(value.func, value.func)
    fixed = other.keywords if isinstance(other, functools.partial) else {}
    function = other.func if isinstance(other, functools.partial) else other
    return functools.partial(function, *value.args, **{**keywords, **fixed})


def _of_first(metric: Function, count: int) -> Function:
    """`metric` of the first `count` examples of each probe."""
    inner, given = (metric.func, metric.keywords) if isinstance(metric, functools.partial) else (metric, {})

    @functools.wraps(inner)
    def limited(*args: Any, **kwargs: Any) -> Any:
        return inner(*(_first(arg, count) for arg in args), **{key: _first(arg, count) for key, arg in kwargs.items()})

    limited.first = count  # type: ignore[attr-defined]
    return functools.partial(limited, **given)


def of_first(metrics: Mapping[str, Function], records: Mapping[str, Any]) -> tuple[dict[str, Function], dict[str, Any]]:
    """`metrics` without a limit to the first examples, and what they then read of `records`, model -> answers.

    What resamples the examples has to resample those that the dialect reads.
    """
    limits = {name: getattr(getattr(metric, "func", metric), "first", None) for name, metric in metrics.items()}
    unlimited = {
        name: metric if limits[name] is None else functools.partial(metric.func.__wrapped__, **metric.keywords)  # type: ignore[attr-defined]
        for name, metric in metrics.items()
    }
    counts = [limit for limit in limits.values() if limit is not None]
    return unlimited, _first(records, min(counts)) if counts else dict(records)


def _first(value: Any, count: int) -> Any:
    if isinstance(value, Answers):
        return value if len(value) <= count else value.take(np.arange(count))
    if isinstance(value, ScoredTask):
        return value
    if isinstance(value, Mapping):  # the retrained model's answers by probe
        return {key: _first(inner, count) for key, inner in value.items()}
    if isinstance(value, list | tuple):  # of several retrained models
        return [_first(inner, count) for inner in value]
    return value
