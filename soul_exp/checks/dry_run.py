"""Metrics tried on made-up answers before work starts: a field that a probe does not record is found then."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np

from soul_exp import binding
from soul_exp.metrics.answers import Answers, NotRecordedError
from soul_exp.tasks.task import Probe

NUM = 2  # made-up examples
OF_GENERATION = ("rouge_l", "generation")


def missing_field(metric: Callable[..., float], probes: Mapping[str, Probe]) -> tuple[str, str] | None:
    """The first probe that `metric` reads but cannot, and the field that this probe does not record; None: it can."""
    for name in binding.names(metric):
        if name not in probes:
            continue
        absent = unrecorded(probes[name])
        complete = {other: _made_up(()) for other in probes}
        given = {**complete, name: _made_up(absent)}
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                binding.call(metric, {**given, "retrained": given})
        except NotRecordedError as error:
            if error.field in absent:
                return name, error.field
        except (ValueError, ArithmeticError, LookupError):  # made-up numbers are not what it is for
            continue
    return None


def unrecorded(probe: Probe) -> tuple[str, ...]:
    """The fields of Answers that `probe` will leave empty."""
    absent: tuple[str, ...] = () if probe.paraphrases is not None else ("paraphrase_nll",)
    absent += () if probe.wrong is not None else ("wrong_nll",)
    return absent if probe.generate else (*absent, *OF_GENERATION)


def _made_up(absent: tuple[str, ...]) -> Answers:
    fields = {
        "logp": [np.zeros(1)] * NUM,
        "right": [np.ones(1, dtype=bool)] * NUM,
        "paraphrase_nll": np.zeros(NUM),
        "wrong_nll": np.zeros((NUM, 1)),
        "rouge_l": np.ones(NUM),
        "question": ["question"] * NUM,
        "answer": ["answer"] * NUM,
        "generation": ["answer"] * NUM,
    }
    return Answers(nll=np.zeros(NUM), **{name: value for name, value in fields.items() if name not in absent})  # type: ignore[arg-type]
