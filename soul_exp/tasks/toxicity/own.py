"""The project's own scorer: logistic regression on hashed n-grams.

N texts; 2 kinds of n-grams (words, characters), BUCKETS features of each.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression

from soul_exp.data import content_hash
from soul_exp.errors import UsageError
from soul_exp.files import write_atomically
from soul_exp.tasks.toxicity.classifier import TOXIC_BERT
from soul_exp.tasks.toxicity.scorer import Labelled, Score, cache_file

OWN = "own"
VERSION = 1  # raise it when a change to this module changes scores
MIN_TEXTS = 20  # of each label, to train on
BUCKETS = 2**18  # of hashed n-grams, of each kind
STRENGTH = 100.0  # inverse regularisation: of 1, 10 and 100 the best Brier score on real comments


@dataclass(frozen=True)
class Own:
    """Logistic regression on word and character n-grams, trained on `train` in a second and bit-equal every time."""

    train: Sequence[Labelled]
    test: Sequence[Labelled] = ()
    name: str = OWN
    revision: str | None = None

    def identity(self) -> Any:
        return [OWN, VERSION, sklearn.__version__, content_hash(self.train)]

    def check(self) -> None:
        """Raises UsageError unless there are enough texts of each label to train and to test."""
        for part, texts, least in (("scorer-train", self.train, MIN_TEXTS), ("scorer-test", self.test, 1)):
            toxic = sum(label for _, label in texts)
            if min(toxic, len(texts) - toxic) < least:
                raise UsageError(
                    f"task.scorer=own: {part} has {toxic} toxic and {len(texts) - toxic} other texts, expected {least} "
                    f"of each: give more data, or task.scorer={TOXIC_BERT}"
                )

    def load(self, cache: Path, device: str) -> Score:
        """The scorer, on the CPU; trained unless `cache` has it."""
        path = cache_file(cache, f"{content_hash(self.identity())}.npz")
        try:
            idf, weights, bias = _arrays(path)
        except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile):  # not trained yet, or damaged
            file = io.BytesIO()
            np.savez_compressed(file, *self._fitted())
            write_atomically(path, file.getvalue())
            idf, weights, bias = _arrays(path)

        def score(texts: Sequence[str]) -> np.ndarray:
            logits = _features(texts, idf) @ weights + bias
            return np.array([1 / (1 + math.exp(-logit)) for logit in logits])

        return score

    def _fitted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inverse document frequencies [2 BUCKETS], weights [2 BUCKETS] and bias [1] of the regression."""
        texts, labels = [text for text, _ in self.train], [toxic for _, toxic in self.train]
        idf = np.concatenate([TfidfTransformer().fit(counts).idf_ for counts in _counts(texts)])
        # liblinear runs in one thread and in one order; balanced, so that 0.5 favours neither label
        regression = LogisticRegression(C=STRENGTH, solver="liblinear", class_weight="balanced", random_state=0)
        regression.fit(_features(texts, idf), labels)
        return idf, regression.coef_[0], regression.intercept_


def _arrays(path: Path) -> list[np.ndarray]:
    """The arrays in an npz file; its format checks a checksum of each."""
    with np.load(path) as arrays:
        return [arrays[name] for name in arrays.files]


def _counts(texts: Sequence[str]) -> list[sparse.csr_matrix]:
    """Counts of the hashed n-grams in each text: [N, BUCKETS] of 1 and 2 words, [N, BUCKETS] of 2 to 5 characters."""
    kinds = ({"ngram_range": (1, 2)}, {"ngram_range": (2, 5), "analyzer": "char_wb"})
    return [HashingVectorizer(n_features=BUCKETS, alternate_sign=False, norm=None, **k).transform(texts) for k in kinds]


def _features(texts: Sequence[str], idf: np.ndarray) -> sparse.csr_matrix:
    """[N, 2 BUCKETS]: (1 + log count) * idf, the n-grams of each kind scaled to length 1."""
    blocks = []
    for counts, weights in zip(_counts(texts), np.split(idf, 2), strict=True):
        counts.data = (1 + np.log(counts.data)) * weights[counts.indices]
        lengths = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
        blocks.append(sparse.diags(1 / np.maximum(lengths, 1e-12)) @ counts)
    return sparse.hstack(blocks, format="csr")
