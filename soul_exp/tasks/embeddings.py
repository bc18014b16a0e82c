"""Sentence embeddings, own (counts of character n-grams) and published (sentence-transformers): how near two texts are.

An embedding is a description until it is loaded: `identity` decides its cosines. A loaded one works on this rank alone.
N texts, C choices for each.
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoModel

from soul_exp.data import content_hash
from soul_exp.errors import UsageError, explained
from soul_exp.files import hashes
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.text import words
from soul_exp.models.checkpoint import from_hub
from soul_exp.tasks.encoders import Encoder

Cosines = Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]  # of N texts and their choices, [N, C]

OWN = "ngrams"
VERSION = 1  # of the own embedding: raise it when its cosines change
SIZES = (2, 3, 4)  # characters of an n-gram
MINILM = "sentence-transformers/paraphrase-MiniLM-L6-v2"  # of the SOUL release
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # which a sentence-transformers model may consist of
POOLINGS = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}  # as releases of it name them
MODE = "pooling_mode_"  # how the names of flags begin that older ones have
MODULES = ["Transformer", "Pooling", "Normalize"]
USUAL = "feature-extraction"  # what the transformer does
BROKEN = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError)  # of files that are not what they seem


@dataclass(frozen=True)
class Ngrams:
    """Counts of the runs of 2, 3 and 4 characters of a text's words, a blank before, between and after them.

    Words are those of any script, in lower case (`metrics/text.py`). Nothing is learnt or downloaded: two texts are
    near if they are spelt alike, whatever they mean.
    """

    title: str = "character n-grams"

    def identity(self) -> str:
        return f"{self.title} of {', '.join(map(str, SIZES))}, version {VERSION}"

    def load(self, device: str) -> Cosines:
        """The cosines, in [0, 1]; 0 where two texts share no n-gram, as with a text without a word."""
        return lambda texts, choices: np.array(
            [
                [_cosine(_counts(text), _counts(choice)) for choice in row]
                for text, row in zip(texts, choices, strict=True)
            ]
        )


@functools.lru_cache(maxsize=1 << 14)
def _counts(text: str) -> Counter[str]:
    found = words(text)
    spaced = f" {' '.join(found)} " if found else ""
    return Counter(spaced[i : i + size] for size in SIZES for i in range(len(spaced) - size + 1))


def _cosine(one: Mapping[str, int], other: Counter[str]) -> float:
    """In whole numbers up to the last division, so that equal counts tie exactly."""
    squares = [sum(count * count for count in each.values()) for each in (one, other)]
    product = sum(count * other[ngram] for ngram, count in one.items())
    return product / math.sqrt(squares[0] * squares[1]) if product else 0.0


@dataclass(frozen=True)
class Layout:
    """How a sentence-transformers model is put together."""

    transformer: Path  # the folder of its config.json, weights and tokenizer
    pooling: str  # mean | cls: of the vectors of a text's tokens
    max_length: float  # tokens; what is beyond is cut
    lower: bool  # whether texts are read in lower case


@dataclass(frozen=True)
class SentenceModel(Encoder):
    """A sentence-transformers model: a transformer, the mean or the first of its token vectors, perhaps normalised."""

    OPTION, OWN, AUTO = "task.embedding", OWN, AutoModel
    batch_size: int = 64

    def identity(self) -> str:
        """Title and hash of the content: a copy of the model is the same model."""
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:
        return f"{self.title}, sha256 {content_hash(hashes(self.folder, *FILES))}"

    @property
    def title(self) -> str:
        return Path(self.name).resolve().name if Path(self.name).is_dir() else self.name

    @functools.cached_property
    def folder(self) -> Path:
        """The folder itself, or the copy of the hub's model, which is downloaded unless it is here."""
        if Path(self.name).is_dir():
            return Path(self.name)
        fetch = functools.partial(snapshot_download, self.name, revision=self.revision, allow_patterns=[*FILES])
        return Path(self.reached(lambda: from_hub(self.name, fetch)))

    @property
    def path(self) -> str:
        return str(self.layout.transformer)

    def check(self) -> None:
        """Raises UsageError unless this program computes what sentence-transformers would, from sound files."""
        self.check_files()  # reads the layout first

    def load(self, device: str) -> Cosines:
        """The cosines, in [-1, 1], by the model in fp32 on `device`; a longer text than it reads is cut at its end."""
        layout = self.layout

        def pooled(output: Any, mask: Tensor) -> Tensor:
            hidden = output.last_hidden_state  # [B, T, D]
            if layout.pooling == "cls":
                return hidden[torch.arange(len(mask), device=mask.device), mask.argmax(1)]
            return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

        vectors_of = self.reader(device, pooled, batch_size=self.batch_size, max_length=layout.max_length)

        def cosines(texts: Sequence[str], choices: Sequence[Sequence[str]]) -> np.ndarray:
            every = list(dict.fromkeys([*texts, *(choice for row in choices for choice in row)]))
            vectors = vectors_of([text.lower() for text in every] if layout.lower else every)
            unit = dict(zip(every, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), strict=True))
            pairs = zip(texts, choices, strict=True)
            return np.array([[float(unit[text] @ unit[choice]) for choice in row] for text, row in pairs])

        return cosines

    @functools.cached_property
    def layout(self) -> Layout:
        """How the model is put together. Raises UsageError for what is not computed here."""
        advice = f"give a model that sentence-transformers saved, as {MINILM}, or type {self.OPTION}={OWN}"
        with explained(BROKEN, f"{self.where} is no sentence-transformers model", advice):
            modules = json.loads((self.folder / "modules.json").read_text())
            kinds = [module["type"].rpartition(".")[2] for module in modules]
            paths = [self.folder / module["path"] for module in modules]
            pooling = _settings(paths[1] / "config.json") if kinds[1:2] == ["Pooling"] else {}
            active = [key[len(MODE) :] for key, value in pooling.items() if key.startswith(MODE) and value is True]
            stated = pooling.get("pooling_mode", active)
            modes = [stated] if isinstance(stated, str) else list(stated)
            own = _settings(*paths[0].glob("sentence_*_config.json"))
            texts = _settings(*self.folder.glob("config_sentence_transformers.json"))
            problems = {
                f"the modules {', '.join(kinds)}": kinds not in (MODULES, MODULES[:2]),
                f"the pooling {', '.join(modes)}": len(modes) != 1 or modes[0] not in POOLINGS,
                f"the task {own.get('transformer_task')}": own.get("transformer_task", USUAL) != USUAL,
                "a prompt before each text": texts.get("default_prompt_name") is not None,
            }
            if found := [problem for problem, is_there in problems.items() if is_there]:
                expected = "a Transformer, mean or cls Pooling, and perhaps Normalize, without a prompt"
                raise UsageError(f"{self.where} has {found[0]}, expected {expected}: {advice}")
            longest = own.get("max_seq_length")
            return Layout(
                transformer=paths[0],
                pooling=POOLINGS[modes[0]],
                max_length=math.inf if longest is None else int(longest),
                lower=own.get("do_lower_case") is True,
            )


def _settings(*paths: Path) -> dict[str, Any]:
    return {key: value for path in paths for key, value in json.loads(path.read_text()).items()}


Embedding = Ngrams | SentenceModel


def make_embedding(name: str, revision: str | None) -> Embedding:
    """The embedding that `name` means: "ngrams", or a model's folder or hub name. UsageError if none can work."""
    if name == OWN:
        return Ngrams()
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"task.embedding={name} is unknown: choose {OWN}, {MINILM}, or a folder with such a model")
    model = SentenceModel(name, revision)
    model.check()
    return model


def with_similarity(
    answers: Mapping[str, Answers], choices: Mapping[str, Sequence[Sequence[str]]], embedding: Embedding, device: str
) -> dict[str, Answers]:
    """`answers` with the cosines of each text generated for a paraphrased question to the `choices` of its probe."""
    found, cosines, named = dict(answers), embedding.load(device), embedding.identity()
    for name, texts in choices.items():
        similarity = cosines(found[name].needed("rephrased_generation"), texts)
        found[name] = replace(found[name], similarity=similarity, embedding=[named] * len(texts))
    return found
