"""How metrics and numbers are written: names, directions, digits."""

from __future__ import annotations

import functools
import math
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from soul_exp import results
from soul_exp.metrics.scale import Direction, Scale

NULL = "—"
HEADLINE = ("log10_forget_quality", *results.HEADLINE)
MIA, DELTA = "mia_auc", "mia_auc_delta"  # delta: the retrained model's AUC minus this model's
NAMES = {"utility": "model utility", MIA: "MIA AUC", DELTA: "Δ (retrained − MIA AUC)"}
NEAREST = "retrained = target value"
HINTS: dict[Direction | None, str] = {"higher": "higher is better", "lower": "lower is better", "nearest": NEAREST}
ARROWS: dict[Direction | None, str] = {"higher": " ↑", "lower": " ↓", "nearest": " →"}
# Metrics that older results name and that were removed since -> one of the same scale.
REMOVED = {"soul_exp.metrics.general.choice_accuracy": "soul_exp.metrics.suite.mean_accuracy"}


def scale_of(config: Mapping[str, Any], name: str) -> Scale | None:
    """The scale that the function of metric `name` declares; None if it declares none or cannot be imported here."""
    return _declared(_entry(config, name).get("_target_", ""))


def direction_of(config: Mapping[str, Any], name: str) -> Direction | None:
    """Which values of metric `name` are best; None where no declaration says it.

    A function of any one probe (`answers: forget` in the YAML) declares the direction for what is to be kept.
    """
    scale, probe = scale_of(config, name), _entry(config, name).get("answers")
    return None if scale is None else scale.better if probe is None else scale.for_probe(probe)


def _entry(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return (config["task"].get("metrics") or {}).get(name, {})


@functools.cache
def _declared(target: str) -> Scale | None:
    try:
        return getattr(pkgutil.resolve_name(REMOVED.get(target, target)), "scale", None)
    except (ImportError, AttributeError, ValueError):  # a user's own metric, whose module is not on this machine
        return None


def label_of(name: str, scale: Scale | None = None) -> str:
    """The name of a metric as a person reads it, followed by the unit of its `scale` if it has one."""
    words = NAMES.get(name) or name.replace("_", " ").replace("rouge", "ROUGE").replace("bleu", "BLEU")
    return f"{words} {scale.unit}" if scale is not None and scale.unit else words


def headline_first(names: Iterable[str]) -> list[str]:
    """The names without repetition: those of `HEADLINE` in its order, then the others in theirs."""
    return sorted(dict.fromkeys(names), key=lambda name: HEADLINE.index(name) if name in HEADLINE else len(HEADLINE))


def number(value: float | None, size: float | None = None) -> str:
    """`value` with the digits that suit numbers of that `size` (by default its own): .1f for 26.4, .3f for 0.264."""
    size = abs(value or 0) if size is None else size
    digits = ".1e" if 0 < size < 1e-3 or size >= 1e7 else ".3f" if size < 10 else ".1f" if size < 1000 else ".0f"
    return NULL if value is None else f"{value:{digits}}"


def finite(value: Any) -> float | None:
    """`value` as a float; None if it is no finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
