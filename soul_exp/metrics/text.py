"""Words of any script, and the comparison of generated texts with references. N texts.

A word is a run of letters, marks and digits (Unicode L, M, Nd) that begins with a letter or digit, in lower case and
NFC; all else separates, apostrophe and underscore included. Scripts that write no blanks between words (Han, kana,
Thai, Lao, Khmer, Myanmar) count by grapheme: each is a word.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import regex

from soul_exp.metrics.answers import Answers
from soul_exp.metrics.scale import Scale

_UNSPACED = "".join(rf"\p{{scx={name}}}" for name in "Han Hiragana Katakana Thai Lao Khmer Myanmar".split())
_GRAPHEME = rf"(?=[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]])\X"  # one that is a word
_OTHER = rf"(?!{_GRAPHEME})"
_MARKS = r"[^\s\p{L}\p{M}\p{N}]*"  # punctuation, which belongs to the word that it touches
_compiled = functools.partial(regex.compile, flags=regex.VERSION1)
_words = _compiled(rf"{_GRAPHEME}|{_OTHER}[\p{{L}}\p{{Nd}}](?:{_OTHER}[\p{{L}}\p{{M}}\p{{Nd}}])*")
_graphemes = _compiled(_GRAPHEME)
_pieces = _compiled(rf"{_MARKS}{_GRAPHEME}{_MARKS}|(?:(?!{_MARKS}{_GRAPHEME})\S)+")
_ascii_words = re.compile("[a-z0-9]+")


def words(text: str, *, ascii_only: bool = False) -> list[str]:
    """The words of `text`; with `ascii_only` runs of a-z and 0-9, as rouge_score and so TOFU's authors read it."""
    lower = unicodedata.normalize("NFC", text).lower() if not ascii_only else text.lower()
    return (_ascii_words if ascii_only else _words).findall(lower)


def begins_without_blank(text: str) -> bool:
    """Whether running text that continues with `text` has no blank before it, by the script of its first character."""
    return _graphemes.match(text) is not None


def spans(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each piece of running text that counts as a word where text is cut, in order.

    Pieces are what white space separates; in scripts without blanks between words each grapheme, with the punctuation
    that touches it. Between them is white space or nothing.
    """
    for chunk in re.finditer(r"\S+", text):
        if _graphemes.search(chunk[0]) is None:
            yield chunk.span()
        else:
            yield from ((chunk.start() + m.start(), chunk.start() + m.end()) for m in _pieces.finditer(chunk[0]))


def pieces(text: str) -> list[str]:
    """The texts of `spans`, each after a blank if white space precedes it or it is the first: joined, they are `text`.

    Apart from white space, which is one blank.
    """
    return [f"{'' if start and not text[start - 1].isspace() else ' '}{text[start:end]}" for start, end in spans(text)]


@dataclass(frozen=True)
class Stems:
    """What ROUGE compares: `words`, of which those of a-z and 0-9 that are longer than three are stemmed (Porter)."""

    ascii_only: bool

    def tokenize(self, text: str) -> list[str]:
        return [_stem(word) for word in words(text, ascii_only=self.ascii_only)]


@functools.lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return _porter()(word) if len(word) > 3 and _ascii_words.fullmatch(word) else word


@functools.cache
def _porter() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer().stem


def rouge_l_recall(generations: Sequence[str], references: Sequence[str], *, ascii_only: bool = False) -> np.ndarray:
    """Length of the longest common subsequence of words over the reference's length, in [0, 1]; higher: more in common.

    Returns [N]. `Stems` states what is compared; texts of ASCII alone do not depend on `ascii_only`. Raises ValueError
    if a reference has no word, or if the numbers of texts differ. Source: Lin 2004 (ROUGE-L), computed by rouge_score.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if len(generations) != len(references):
        found = f"found {len(generations)} generations, expected {len(references)}, one per reference"
        raise ValueError(f"rouge_l_recall: {found}")
    for i, reference in enumerate(references):
        if not words(reference, ascii_only=ascii_only):
            found = f"found {reference[:60]!r} as reference {i}, expected at least one word"
            raise ValueError(f"rouge_l_recall: {found}")
    scorer = RougeScorer(["rougeL"], tokenizer=Stems(ascii_only))
    scores = [scorer.score(*pair)["rougeL"].recall for pair in zip(references, generations, strict=True)]
    return np.array(scores, dtype=np.float64)


@Scale("higher", 0, 100)
def bleu(answers: Answers) -> float:
    """Corpus BLEU of generated answers, in [0, 100]; higher: better known. Papineni et al. 2002, as sacrebleu (13a).

    Graphemes of scripts without blanks between words are tokens of their own. 0 if no generated answer has four tokens.
    """
    from sacrebleu.metrics import BLEU

    counts = answers.per_example(_bleu_counts).sum(axis=0).tolist()
    order = (len(counts) - 2) // 2
    return float(BLEU.compute_bleu(counts[:order], counts[order:-2], counts[-2], counts[-1], smooth_method="exp").score)


def _bleu_counts(answers: Answers) -> np.ndarray:
    """What corpus BLEU sums over the texts, [N, 10]: right and all n-grams (n = 1 to 4), lengths of text, reference."""
    from sacrebleu.metrics import BLEU

    def spaced(text: str) -> str:
        return _graphemes.sub(r" \g<0> ", unicodedata.normalize("NFC", text))

    bleu = BLEU(effective_order=True)  # of single sentences it changes the score alone, which nothing reads
    pairs = zip(answers.needed("generation"), answers.needed("answer"), strict=True)
    found = [bleu.sentence_score(spaced(text), [spaced(reference.strip())]) for text, reference in pairs]
    return np.array([[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in found], dtype=np.int64)
