"""How metrics and numbers are written: names, directions, digits."""

import functools
import importlib
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from soul_exp import results
from soul_exp.metrics.scale import Direction, Scale

NULL = "—"
HEADLINE = ("log10_forget_quality", *results.HEADLINE)
MIA, DELTA = "mia_auc", "mia_auc_delta"  # delta: the retrained model's AUC minus this model's
NAMES = {"utility": "model utility", MIA: "MIA AUC", DELTA: "Δ (retrained − MIA AUC)"}
NAMES["open_unlearning_log10_forget_quality"] = "log10 FQ, open-unlearning"
REMOVED = {"soul_exp.metrics.general.choice_accuracy": "soul_exp.metrics.suite.mean_accuracy"}  # same scale


def declared(metrics: Mapping[str, Any] | None, name: str) -> tuple[str, Direction | None]:
    """The unit of metric `name` of the option task.metrics, and the direction of better values; "" and None without.

    A function of any one probe (`answers: forget` in the YAML) declares the direction for what is to be kept.
    """
    entry = (metrics or {}).get(name, {})
    scale = _scale(entry.get("_target_", ""))
    if scale is None:
        return "", None
    return scale.unit, scale.for_probe(entry["answers"]) if "answers" in entry else scale.better


@functools.cache
def _scale(target: str) -> Scale | None:
    target = REMOVED.get(target, target)
    module, _, function = target.rpartition(".")
    if module not in sys.modules and not target.startswith("soul_exp.metrics."):  # a results file imports nothing else
        return None
    try:
        return getattr(getattr(importlib.import_module(module), function), "scale", None)
    except (ImportError, AttributeError):  # of another version
        return None


def label_of(name: str, unit: str = "") -> str:
    """The name of a metric as a person reads it, followed by its unit."""
    words = NAMES.get(name) or name.replace("_", " ").replace("rouge", "ROUGE").replace("bleu", "BLEU")
    return f"{words} {unit}".rstrip()


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
