"""A published sequence classifier as a scorer of toxicity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from soul_exp.distributed import zero3
from soul_exp.errors import UsageError
from soul_exp.models import weight_files
from soul_exp.tasks.toxicity.scorer import Labelled, Score

TOXIC_BERT = "unitary/toxic-bert"
REVISION = "4d6c22e74ba2fdd26bc4f7238f50766b045a0d94"  # of toxic-bert: the commit that added its safetensors
LABEL = "toxic"  # the label whose probability is the score


@dataclass(frozen=True)
class Classifier:
    """A multi-label sequence classifier in `name`, a folder or hub name: the sigmoid of its label `toxic`."""

    name: str
    revision: str | None = None
    test: Sequence[Labelled] = ()
    batch_size: int = 64

    def identity(self) -> Any:
        folder = Path(self.name)
        if not folder.is_dir():
            return [self.name, self.revision]
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(folder.iterdir()) if f.is_file()]

    def check(self) -> None:
        """Raises UsageError unless the classifier has the label, and a local one matching weights in safetensors."""
        self._label()
        if not Path(self.name).is_dir():
            return
        where = f"task.scorer={self.name}"
        if not any(Path(self.name).glob("*.safetensors")):
            raise UsageError(f"{where} has no *.safetensors: convert its weights with save_pretrained first")
        config = self._from(AutoConfig)
        header = weight_files.read_header(weight_files.files_in(Path(self.name), where), where)
        with torch.device("meta"):
            cls = type(AutoModelForSequenceClassification.from_config(config))
        weight_files.check(cls, config, header, where)

    def load(self, cache: Path, device: str) -> Score:
        """The classifier in fp32 on `device`; a longer text than it reads is cut at its end."""
        label = self._label()
        tokenizer: Any = self._from(AutoTokenizer)
        model, loading_info = self._from(
            AutoModelForSequenceClassification, dtype=torch.float32, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
        weight_files.check_report(loading_info, type(model).__name__, f"task.scorer={self.name}")
        if name := zero3.nonfinite_weight(model):
            raise UsageError(f"task.scorer={self.name} has weights that are not finite numbers ({name}): copy it again")
        model.to(device).eval()
        max_length = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", math.inf))

        @torch.no_grad()
        def score(texts: Sequence[str]) -> np.ndarray:
            scores = np.zeros(len(texts))
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = tokenizer(
                    [texts[i] for i in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
                )
                logits = model(**batch.to(device)).logits[:, label]
                scores[rows] = torch.sigmoid(logits.double()).cpu().numpy()
            return scores

        return score

    def _label(self) -> int:
        """The index of the label `toxic`."""
        labels = self._from(AutoConfig).id2label
        indices = [int(index) for index, label in labels.items() if label == LABEL]
        if len(indices) != 1:
            raise UsageError(
                f"task.scorer={self.name} has the labels {', '.join(labels.values())}: expected one named {LABEL!r}, "
                f"as {TOXIC_BERT} has"
            )
        return indices[0]

    def _from(self, cls: Any, **options: Any) -> Any:
        local = Path(self.name).is_dir()
        where = {"local_files_only": True} if local else {"revision": self.revision}
        try:
            return cls.from_pretrained(self.name, trust_remote_code=False, **where, **options)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:160]
            advice = "put a config.json, a tokenizer and safetensors there" if local else "check the network"
            raise UsageError(
                f"task.scorer={self.name} cannot be read ({reason}): {advice}, or type task.scorer=own"
            ) from error
