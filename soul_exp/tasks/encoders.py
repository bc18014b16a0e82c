"""Published models that measure texts beside the model that unlearns: checked before the work, the same on any rank.

N texts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from soul_exp import compat
from soul_exp.distributed import zero3
from soul_exp.errors import UnreachableError, UsageError, explained
from soul_exp.models import weight_files
from soul_exp.models.checkpoint import from_pretrained
from soul_exp.models.language_model import reads_text

Read = Callable[[Any, Tensor], Tensor]  # of a model's output and the attention mask [B, T] what is wanted, [B, ...]


@dataclass(frozen=True)
class Encoder:
    """A model of the class AUTO in `name`, a folder or hub name that OPTION gives; OWN is the choice without one."""

    OPTION: ClassVar[str]
    OWN: ClassVar[str]
    AUTO: ClassVar[Any]
    name: str
    revision: str | None = None

    @property
    def where(self) -> str:
        return f"{self.OPTION}={self.name}"

    @property
    def path(self) -> str:
        """The folder or hub name of config.json, weights and tokenizer."""
        return self.name

    def check_files(self) -> None:
        """Raises UsageError unless a local folder holds sound weights of the model, and their tokenizer."""
        if not Path(self.path).is_dir():
            return
        if not any(Path(self.path).glob("*.safetensors")):
            raise UsageError(f"{self.where} has no *.safetensors: convert its weights with save_pretrained first")
        config = self.read(AutoConfig)
        files = weight_files.files_in(Path(self.path), self.where)
        with torch.device("meta"):
            skeleton = self.AUTO.from_config(config)
        weight_files.check(type(skeleton), config, weight_files.read_header(files, self.where), self.where)
        weight_files.check_finite(files, self.where)
        self._tokenizer(skeleton)

    def reader(
        self, device: str, read: Read, *, batch_size: int, max_length: float = math.inf
    ) -> Callable[[Sequence[str]], np.ndarray]:
        """The function of texts that returns what `read` does, [N, ...] in float64, by the model in fp32 on `device`.

        A text longer than `max_length` tokens, or than the model reads, is cut at its end.
        """
        with compat.no_remembered_deepspeed():  # else the weights of a run under ZeRO-3 are divided over the ranks
            model, loading_info = self.read(
                self.AUTO, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True,
                output_loading_info=True,
            )  # fmt: skip
        weight_files.check_report(loading_info, type(model).__name__, self.where)
        if name := zero3.nonfinite_weight(model):
            raise UsageError(f"{self.where} has weights that are not finite numbers ({name}): copy it again")
        tokenizer = self._tokenizer(model)
        model.to(device).eval()
        longest = getattr(model.config, "max_position_embeddings", math.inf)
        longest = int(min(max_length, tokenizer.model_max_length, longest))

        @torch.no_grad()
        def values(texts: Sequence[str]) -> np.ndarray:
            found: list[Any] = [None] * len(texts)
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = tokenizer(
                    [texts[i] for i in rows], padding=True, truncation=True, max_length=longest, return_tensors="pt"
                ).to(device)
                for i, value in zip(rows, read(model(**batch), batch["attention_mask"]), strict=True):
                    found[i] = value.double().cpu().numpy()
            return np.array(found)

        return values

    def _tokenizer(self, model: Any) -> Any:
        """The tokenizer. Raises UsageError unless it reads texts, can pad, and `model` has a row for each token."""
        tokenizer, rows = self.read(AutoTokenizer), model.get_input_embeddings().num_embeddings
        found = (
            "no tokenizer"
            if not reads_text(tokenizer)
            else "a tokenizer without a padding token"
            if tokenizer.pad_token is None
            else f"a tokenizer of {len(tokenizer)} tokens for an embedding of {rows} rows"
            if len(tokenizer) > rows
            else None
        )
        if found:
            raise UsageError(f"{self.where} has {found}: save its own there with save_pretrained")
        return tokenizer

    def read(self, cls: Any, **options: Any) -> Any:
        """`cls.from_pretrained` of the files."""
        advice = f"give one with a config.json, a tokenizer and safetensors, or type {self.OPTION}={self.OWN}"
        with explained((OSError, ValueError), f"{self.where} cannot be read", advice):
            return self.reached(lambda: from_pretrained(cls, self.path, self.revision, **options))

    def reached(self, get: Callable[[], Any]) -> Any:
        """What `get` returns; where the hub does not answer, the error says what to type without it."""
        try:
            return get()
        except UnreachableError as error:
            raise UnreachableError(f"{self.OPTION}: {error}, or type {self.OPTION}={self.OWN}") from error
