"""Comparison of generated texts with references. N texts."""

import re
from collections.abc import Sequence

import numpy as np

from soul_exp.metrics.answers import Answers
from soul_exp.metrics.scale import Scale


def has_word(text: str) -> bool:
    """Whether `text` has a letter a-z or a digit, without which ROUGE and BLEU are undefined."""
    return re.search("[a-z0-9]", text.lower()) is not None


def rouge_l_recall(generations: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Length of the longest common subsequence of words over the reference's length, in [0, 1]; higher: more in common.

    Returns [N]. Words are lower-case and stemmed (Porter); only a-z and 0-9 form words. Raises ValueError if a
    reference has no word, or if the numbers of texts differ. Source: Lin 2004 (ROUGE-L), computed by rouge_score.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    if len(generations) != len(references):
        found = f"found {len(generations)} generations, expected {len(references)}, one per reference"
        raise ValueError(f"rouge_l_recall: {found}")
    for i, reference in enumerate(references):
        if not has_word(reference):
            found = f"found {reference[:60]!r} as reference {i}, expected at least one word of a-z or 0-9"
            raise ValueError(f"rouge_l_recall: {found}")
    scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))  # its default, without a log line
    scores = [scorer.score(*pair)["rougeL"].recall for pair in zip(references, generations, strict=True)]
    return np.array(scores, dtype=np.float64)


@Scale("higher", 0, 100)
def bleu(answers: Answers) -> float:
    """Corpus BLEU of generated answers, in [0, 100]; higher: better known. Papineni et al. 2002, as sacrebleu (13a)."""
    import sacrebleu

    references = [text.strip() for text in answers.needed("answer")]
    return float(sacrebleu.corpus_bleu(list(answers.needed("generation")), [references]).score)
