"""The statistics that several metrics share."""

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
    """p-value of the two-sided two-sample Kolmogorov-Smirnov test, in [0, 1]; low if they differ.

    scipy's `ks_2samp(method="auto")`: exact up to 10,000 values a sample. Infinite values are ordered like others, nan
    gives nan. Raises ValueError if a sample is empty.
    """
    if not (first.size and second.size):
        raise ValueError(f"found samples of {first.size} and {second.size} examples, expected at least one in each")
    return float(ks_2samp(first, second, method="auto").pvalue)


def log10_p_value(p_value: float) -> float:
    """log10 of a p-value, in [-307.65, 0].

    A p-value below the smallest normal float, 2.2e-308, counts as that float, since -inf is no JSON: two separated
    samples of 515 examples each are enough to get there. So -307.65 reads "at most".
    """
    return float(np.log10(np.maximum(p_value, np.finfo(np.float64).tiny)))


def probe_of(retrained: Mapping[str, Answers], probe: str) -> Answers:
    """The retrained model's answers to `probe`; ValueError if it was not asked."""
    if probe not in retrained:
        raise ValueError(f"found the retrained model's answers to {sorted(retrained)}, expected {probe!r} among them")
    return retrained[probe]
