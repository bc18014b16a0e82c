"""Statistics that several metrics share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.stats import ks_2samp

from soul_exp.metrics.answers import Answers


def mean(values: np.ndarray) -> float:
    """Arithmetic mean; nan if one value is nan. Raises ValueError if there is none."""
    if not values.size:
        raise ValueError("found a probe without examples, expected at least one")
    return float(np.mean(values))


def ks_p_value(first: np.ndarray, second: np.ndarray) -> float:
    """p-value of the two-sided two-sample Kolmogorov-Smirnov test, in [0, 1]; low if the samples differ.

    `first` [n], `second` [m]. scipy's `ks_2samp(method="auto")`: exact up to 10,000 values per sample. Infinite values
    are ordered like others; nan gives nan. Raises ValueError if a sample is empty.
    """
    if not (first.size and second.size):
        raise ValueError(f"found samples of {first.size} and {second.size} examples, expected at least one in each")
    return float(ks_2samp(first, second, method="auto").pvalue)


TINY = np.finfo(np.float64).tiny  # 2.2e-308, the smallest normal float
LOG10_TINY = float(np.log10(TINY))  # -307.65


def log10_p_value(p_value: float) -> float:
    """log10 of a p-value, in [-307.65, 0]; a p-value below 2.2e-308 counts as 2.2e-308.

    JSON has no -inf. Two separate samples of 515 examples each reach that limit, so -307.65 means "at most".
    """
    return float(np.log10(np.maximum(p_value, TINY)))


def probe_of(retrained: Mapping[str, Answers], probe: str) -> Answers:
    """The retrained model's answers to `probe`; ValueError if there are none."""
    if probe not in retrained:
        raise ValueError(f"found the retrained model's answers to {sorted(retrained)}, expected {probe!r} among them")
    return retrained[probe]
