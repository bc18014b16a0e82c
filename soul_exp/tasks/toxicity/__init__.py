"""Scorers of toxicity: a probability for each text.

- `scorer`: what a scorer is, its scores of a model's answers, its AUC.
- `own`: the project's own, trained in a second on labelled texts.
- `classifier`: a published sequence classifier with a label `toxic`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from soul_exp.errors import UsageError
from soul_exp.tasks.toxicity.classifier import REVISION, TOXIC_BERT, Classifier
from soul_exp.tasks.toxicity.own import OWN, Own
from soul_exp.tasks.toxicity.scorer import Labelled, Score, Scorer, auc, note, report, with_toxicity

__all__ = ["OWN", "Labelled", "Score", "Scorer", "auc", "make_scorer", "note", "report", "with_toxicity"]


def make_scorer(name: str, revision: str | None, train: Sequence[Labelled], test: Sequence[Labelled]) -> Scorer:
    """The scorer that `name` means: "own", or a folder or hub name of a classifier with a label `toxic`.

    Raises UsageError, which begins with task.scorer, if there is none or it cannot work.
    """
    scorer: Own | Classifier
    if name == OWN:
        scorer = Own(tuple(train), tuple(test))
    elif not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"task.scorer={name} is unknown: choose own, {TOXIC_BERT}, or a folder with a classifier")
    else:
        scorer = Classifier(name, REVISION if name == TOXIC_BERT and revision is None else revision, tuple(test))
    scorer.check()
    return scorer
