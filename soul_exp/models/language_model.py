"""A causal language model with its tokenizer, its template and the longest text that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soul_exp.data import Encoded, Item, Template, encode
from soul_exp.errors import UsageError
from soul_exp.models import lora
from soul_exp.models.layers import AnswerReader
from soul_exp.models.vocabulary import fit_vocabulary


@dataclass
class LanguageModel:
    """A model with all that is needed to evaluate it on texts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    max_length: int  # tokens
    reader: AnswerReader

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int
    ) -> LanguageModel:
        """Raises UsageError if the template writes a special token that the tokenizer does not know."""
        fit_vocabulary(model, tokenizer)
        unknown = [marker for marker in template.markers() if marker not in tokenizer.get_vocab()]
        if unknown:
            raise UsageError(
                f"model.template writes {unknown[0]}, which is no token of this model: choose model=<the entry of "
                f"conf/model/ for its family>, or give its own model.template"
            )
        return cls(model, tokenizer, template, max_length, AnswerReader(model))

    def with_model(self, model: PreTrainedModel) -> LanguageModel:
        """The same with another model, or with this one after its modules were replaced."""
        self.reader.close()
        return replace(self, model=model, reader=AnswerReader(model))

    def with_system_prompt(self, system_prompt: str) -> LanguageModel:
        """The same, with `system_prompt` before every prompt."""
        return replace(self, template=replace(self.template, system_prompt=system_prompt))

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def encode(self, items: Sequence[Item]) -> list[Encoded]:
        """The token ids of each item. Raises UsageError for an item that the model cannot read."""
        encoded = encode(items, self.tokenizer, self.template, self.max_length)
        rows = lora.embedding_of(self.model).num_embeddings
        for item, row in zip(items, encoded, strict=True):
            if max(row.ids) >= rows:
                token = self.tokenizer.convert_ids_to_tokens(max(row.ids))
                raise UsageError(
                    f"the row {item.prompt[:60]!r} contains {token}, for which the model has no embedding: rephrase it"
                )
        return encoded
