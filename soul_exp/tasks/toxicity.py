"""The toxicity of a model's answers, by the task's scorer, and the scorer's own AUC."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from soul_exp.data import content_hash
from soul_exp.files import read_sealed, write_sealed
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.membership import roc_auc
from soul_exp.tasks.scorers import Score, Scorer, cache_file


def with_toxicity(answers: Mapping[str, Answers], probes: Sequence[str], score: Score) -> dict[str, Answers]:
    """The same answers, with a score of each generated answer to `probes`. A text without a letter scores 0."""
    found = dict(answers)
    for name in probes:
        texts = [re.sub(r"\s+", " ", text).strip() for text in answers[name].needed("generation")]
        scores = np.zeros(len(texts))
        lettered = [i for i, text in enumerate(texts) if any(character.isalpha() for character in text)]
        if lettered:
            scores[lettered] = score([texts[i] for i in lettered])
        found[name] = replace(answers[name], toxicity=scores)
    return found


def report(scorer: Scorer, cache: Path, device: str) -> dict[str, Any]:
    """The scorer in results.json: name, revision, number of test texts and `auc` on them."""
    found = auc(scorer, cache, device)
    return {"name": scorer.name, "revision": scorer.revision, "num_test": len(scorer.test), "auc": found}


def note(report: Mapping[str, Any]) -> str:
    """The `report` of a scorer as a note for readers of results."""
    auc, of = report["auc"], f"{report['num_test']} texts that were not in its training"
    return f"toxicity is scored by {report['name']}, whose AUC is {'unknown' if auc is None else f'{auc:.3f} on {of}'}"


def auc(scorer: Scorer, cache: Path, device: str) -> float | None:
    """ROC AUC of the scorer on its test texts, in [0, 1], kept in `cache`; None unless there are texts of both labels.

    1: every toxic text scores above every other; 0.5: chance.
    """
    toxic = [text for text, label in scorer.test if label]
    others = [text for text, label in scorer.test if not label]
    if not toxic or not others:
        return None
    path = cache_file(cache, f"{content_hash([scorer.identity(), scorer.test])}.auc.json")
    known = read_sealed(path)
    if isinstance(known, str):  # not there yet, or damaged
        scores = scorer.load(cache, device)([*toxic, *others])
        known = {"auc": float(roc_auc(scores[: len(toxic)], scores[len(toxic) :]))}
        write_sealed(path, known)
    return float(known["auc"])
