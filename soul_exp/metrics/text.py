"""Comparison of generated text with a reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from soul_exp.metrics.answers import Answers


def rouge_l_recall(generations: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Share of each reference's words that lie, in order, in its generation, in [0, 1]; higher is closer. Returns [N].

    Words are lower-case and stemmed (Porter); only a-z and 0-9 make words. Raises ValueError if a reference has none,
    or if the numbers of texts differ. Source: Lin 2004 (ROUGE-L), computed by rouge_score.
    """
    if len(generations) != len(references):
        found = f"found {len(generations)} generations, expected {len(references)}, one per reference"
        raise ValueError(f"rouge_l_recall: {found}")
    for i, reference in enumerate(references):
        if not any(character.isascii() and character.isalnum() for character in reference.lower()):
            found = f"found {reference[:60]!r} as reference {i}, expected at least one word of a-z or 0-9"
            raise ValueError(f"rouge_l_recall: {found}")
    scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))  # its default, without a log line
    scores = [scorer.score(*pair)["rougeL"].recall for pair in zip(references, generations, strict=True)]
    return np.array(scores, dtype=np.float64)


def bleu(answers: Answers) -> float:
    """Corpus BLEU of the free answers against the true ones, in [0, 100]; higher is closer.

    Raises ValueError if the probe was not answered freely. Source: Papineni et al. 2002, computed by sacrebleu (13a).
    """
    references = [text.strip() for text in answers.needed("answer")]
    return float(sacrebleu.corpus_bleu(list(answers.needed("generation")), [references]).score)
