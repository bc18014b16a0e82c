"""A causal language model with its tokenizer, template and longest text; tokenizers, read or trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from soul_exp.data import Encoded, Item, Template, encode
from soul_exp.errors import UsageError, first_line
from soul_exp.models import lora
from soul_exp.models.checkpoint import from_pretrained
from soul_exp.models.layers import AnswerReader, max_positions

END, PAD = "<|end|>", "<|pad|>"
GENERIC = (
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
)  # classes of a tokenizer that tokenizer.json describes wholly


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
    ) -> Self:
        """Where the model has fewer positions than `max_length`, it reads no more tokens than that.

        Raises UsageError if the template writes a special token that the tokenizer does not know.
        """
        fit_vocabulary(model, tokenizer)
        unknown = [marker for marker in template.markers() if marker not in tokenizer.get_vocab()]
        if unknown:
            raise UsageError(
                f"model.template writes {unknown[0]}, which is no token of this model: choose model=<the entry of "
                f"conf/model/ for its family>, or give its own model.template"
            )
        longest = min(max_length, max_positions(model) or max_length)
        return cls(model, tokenizer, template, longest, AnswerReader(model))

    def with_model(self, model: PreTrainedModel) -> Self:
        """The same with another model, or with this one after its modules were replaced."""
        self.reader.close()
        return replace(self, model=model, reader=AnswerReader(model))

    def with_system_prompt(self, system_prompt: str) -> Self:
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
                found = f"the row {item.prompt[:60]!r} contains {token}, for which the model has no embedding"
                raise UsageError(f"{found}: rephrase it")
        return encoded


def train_tokenizer(texts: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`: any string survives a round trip; pad is not the end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=max_length
    )


def reads_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `tokenizer` has tokens of texts: without its files, the library makes an empty one of special tokens."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    return len(tokenizer) > len(special) and bool(tokenizer("a")["input_ids"])


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `path` (folder or hub name), with a pad token that is never the end token.

    Raises UsageError if there is none, if it cannot be read, or if it has no end token.
    """
    other = "name another with model.tokenizer="
    try:
        tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, path, revision)
        place = {"local_files_only": True} if Path(path).is_dir() else {"revision": revision}
        if get_tokenizer_config(path, **place).get("tokenizer_class") in GENERIC:
            # the library may have read it as its model's class, with other pieces of words and more tokens
            tokenizer = from_pretrained(PreTrainedTokenizerFast, path, revision)
        some = reads_text(tokenizer)
    except UsageError:
        raise
    except Exception as error:  # the tokenizers library raises no more special one
        if "instantiate the backend tokenizer" not in str(error):
            found = f"{path}: the tokenizer cannot be read ({first_line(error)})"
            raise UsageError(f"{found}: copy it again, or {other}") from error
        some = False
    if not some:
        raise UsageError(f"{path} has no tokenizer: name a folder or hub name that has, with model.tokenizer=")
    if not tokenizer.eos_token or tokenizer.eos_token_id is None:
        found = f"the tokenizer of {path} names no end token, in which every answer ends"
        raise UsageError(f"{found}: name one as eos_token in its tokenizer_config.json, or {other}")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        if spare := _spare_token(tokenizer, len(tokenizer)):
            tokenizer.pad_token = spare
        else:
            tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def _spare_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> str | None:
    """A special token with an id below `rows` that no text holds: it can pad without a new row of the embedding."""
    vocabulary = tokenizer.get_vocab()
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    special.sort(key=lambda token: vocabulary.get(token, rows))
    named, reserved = ([t for t in special if "pad" in t.lower()], [t for t in special if "reserved" in t])
    free = [t for t in (tokenizer.unk_token, *named, *reserved) if t not in (tokenizer.eos_token, tokenizer.bos_token)]
    return next((str(token) for token in free if token and vocabulary.get(token, rows) < rows), None)


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give `model` the tokenizer's pad and end ids, and a new embedding row for its pad where no other token can pad.

    Raises UsageError for other tokens without a row, which belong to another model's tokenizer; padding tokens, which
    published models have, are allowed. The end tokens in the generation settings remain end tokens.
    """
    embedding = lora.embedding_of(model)
    rows = embedding.num_embeddings
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    spare_tokens = {tokenizer.pad_token, *(token for token in beyond if "pad" in token.lower())}
    if tokenizer.pad_token in beyond and (spare := _spare_token(tokenizer, rows)):
        tokenizer.pad_token = spare
    if foreign := sorted(beyond.keys() - spare_tokens, key=lambda token: beyond[token]):
        raise UsageError(
            f"the tokenizer has {len(foreign)} token(s) beyond the {rows} rows of the model's embedding "
            f"({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}): it belongs to another model, name the "
            f"right one with model.tokenizer=<folder or hub name>"
        )
    if tokenizer.pad_token in beyond:
        both = model.get_input_embeddings(), model.get_output_embeddings()
        if lora.is_wrapped(model) and not all(isinstance(part, nn.Embedding | nn.Linear) for part in both):
            raise UsageError(
                "no token of the tokenizer can pad, and an embedding or output head that an adapter has changed cannot "
                "get a row for a new one: merge the adapter into its base with peft's merge_and_unload"
            )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=not embedding.weight.is_meta)
        setattr(model, lora.GROWN, True)
    generation = model.generation_config
    ends = [tokenizer.eos_token_id]
    if generation is not None:
        given = generation.eos_token_id
        ends += [end for end in (given if isinstance(given, list) else [given]) if end is not None and end != ends[0]]
        generation.pad_token_id = tokenizer.pad_token_id
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
