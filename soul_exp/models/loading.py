"""Models and tokenizers: from scratch, from a folder or from the hub; saved and read back."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import GENERATION_CONFIG_NAME

from soul_exp import compat
from soul_exp.distributed import zero3
from soul_exp.errors import UsageError
from soul_exp.models import lora, weight_files
from soul_exp.models.attention import KERNELS
from soul_exp.models.weight_files import UNBUILT, first_line

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
END, PAD = "<|end|>", "<|pad|>"
SMALL = 20_000_000  # weights: a model of so many is built with random ones in a moment, to see what it computes


def train_tokenizer(texts: Sequence[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts`: any string survives a round trip, and pad is never the end token."""
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


def from_scratch(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A randomly initialised causal model with the architecture `config` (its `model_type` and fields)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            **config,
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    check_causal(model, "model.scratch.config")
    return model


def check_folder(folder: Path, option: str, own_tokenizer: bool = True) -> None:
    """Raises UsageError unless `folder` holds a checkpoint that can be read without unpickling anything.

    And a tokenizer, unless `own_tokenizer` says that another is used. Of an adapter's folder, unless its base is there,
    sound and fits; a base on the hub is first seen when it is loaded.
    """
    if lora.is_adapter(str(folder)):
        lora.check_files(folder, option)
        _check_tokenizer(folder, option)
        base = Path(lora.base_of(folder)[0])
        if base.is_absolute() and not base.is_dir():
            raise UsageError(
                f"{option}={folder} is an adapter of {base}, which is not there: put that checkpoint back or name its "
                f"new place in {lora.SETTINGS}"
            )
        if base.is_dir():
            if base.samefile(folder):
                raise UsageError(f"{option}={folder} names itself as its base in {lora.SETTINGS}: name the model there")
            check_folder(base, f"the base of {option}")
            load_model(str(folder), weights=False)
        return
    if not (folder / "config.json").is_file():
        raise UsageError(f"{option}={folder} has no config.json: give a checkpoint folder as save_pretrained writes it")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise UsageError(f"{option}={folder} has {found}: convert to *.safetensors with save_pretrained first")
    config = _config_of(str(folder), None, f"{option}={folder}")
    check_architecture(config, f"{option}={folder}")
    if (folder / GENERATION_CONFIG_NAME).is_file():
        try:
            GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"{option}={folder}: {GENERATION_CONFIG_NAME} is not valid ({first_line(error)}): correct or remove it"
            ) from error
    if own_tokenizer:
        _check_tokenizer(folder, option)


def _check_tokenizer(folder: Path, option: str) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(f"{option}={folder} has no tokenizer: save it there with tokenizer.save_pretrained")


def check_architecture(config: Any, label: str) -> None:
    """Raises UsageError unless `config` describes a causal language model.

    A large one is not run here, but when it is loaded.
    """
    _check_kind(config, label)
    if zero3.num_weights(_skeleton_of(config, label)) <= SMALL:
        with torch.random.fork_rng(devices=[]), compat.no_remembered_deepspeed():
            check_causal(AutoModelForCausalLM.from_config(config, dtype=torch.float32), label)


def _skeleton_of(config: Any, label: str) -> PreTrainedModel:
    try:
        return skeleton(config)
    except UNBUILT as error:
        reason = first_line(error)
        raise UsageError(
            f"{label}: no {config.model_type} model can be built of it ({reason}): correct its configuration"
        ) from error


def _check_kind(config: Any, label: str) -> None:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise UsageError(f"{label} is a {config.model_type} model: expected a causal language model")


@torch.no_grad()
def check_causal(model: PreTrainedModel, label: str) -> None:
    """Raises UsageError if the logits at a token depend on later tokens, as an encoder's do."""
    embedding: Any = model.get_input_embeddings()
    rows = compat.full_shape(getattr(embedding, "base_layer", embedding).weight)[0]  # it may have an adapter
    ids = [i for i in range(rows) if i != model.config.pad_token_id][:12]
    both = torch.tensor([ids[:8], ids[:4] + ids[-4:]], device=next(model.parameters()).device)
    modes = [(module, module.training) for module in model.modules()]
    with zero3.gathering(model.eval()):
        logits = model(input_ids=both).logits[:, :4].float()
    for module, training in modes:
        module.training = training
    # exactly 0 in a causal model, but for the rounding of experts, which see other tokens beside these
    rounding = max(1e-5, 4 * torch.finfo(next(model.parameters()).dtype).eps)
    if (logits[0] - logits[1]).abs().max() > rounding * logits.abs().max():
        raise UsageError(
            f"{label} is no causal language model: what {type(model).__name__} predicts after a token changes with the "
            f"tokens that follow: give a decoder (of an encoder, is_decoder=true in its config.json)"
        )


def check_finite(model: PreTrainedModel, label: str) -> None:
    """Raises UsageError if a weight is not a finite number."""
    if name := zero3.not_finite(model):
        raise UsageError(f"{label} has weights that are not finite numbers ({name}): copy or make the checkpoint again")


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `path` (folder or hub name), with a pad token that is never the end token.

    Raises UsageError if there is none: transformers then makes one up, for which every text is empty.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, path, revision)
        some = len(tokenizer) > 1 and tokenizer("a")["input_ids"]
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        if "instantiate the backend tokenizer" not in str(error):
            raise UsageError(
                f"{path}: the tokenizer cannot be read ({first_line(error)}): copy it again, or name another with "
                f"model.tokenizer="
            ) from error
        some = False
    if not some:
        raise UsageError(f"{path} has no tokenizer: name a folder or hub name that has, with model.tokenizer=")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = _spare(tokenizer, len(tokenizer))
        if spare is None:
            tokenizer.add_special_tokens({"pad_token": PAD})
        else:
            tokenizer.pad_token = spare
    return tokenizer


def _spare(tokenizer: PreTrainedTokenizerBase, rows: int) -> str | None:
    """A special token below id `rows` that no text holds: it can pad without a new embedding row, so all still fits."""
    vocabulary = tokenizer.get_vocab()
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    named = sorted((token for token in special if "pad" in token.lower()), key=lambda token: vocabulary[token])
    reserved = sorted((token for token in special if "reserved" in token), key=lambda token: vocabulary[token])
    used = (tokenizer.eos_token, tokenizer.bos_token)
    for token in (tokenizer.unk_token, *named, *reserved):
        if token and token not in used and vocabulary.get(token, rows) < rows:
            return str(token)
    return None


def load_model(
    path: str,
    revision: str | None = None,
    dtype: str = "float32",
    attention: str = "sdpa",
    weights: bool = True,
    deepspeed: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The causal model in `path` (folder or hub name), from safetensors and without remote code.

    An adapter's folder gives its base with the adapter on. `weights` false gives a folder's architecture only, which
    takes no memory and computes nothing. Raises UsageError where weights are missing, too many or of another shape.
    """
    if lora.is_adapter(path):
        base = load_model(*lora.base_of(Path(path)), dtype, attention, weights, deepspeed)
        with zero3.loading(deepspeed):
            lora.grow(base, Path(path))
            fit_vocabulary(base, load_tokenizer(path))
            with torch.device("cpu" if weights else "meta"):
                return lora.attached(base, Path(path), weights)
    config = _config_of(path, revision, path)
    if not weights:
        return skeleton(config)
    with zero3.loading(deepspeed):
        model, found = _from_pretrained(
            AutoModelForCausalLM,
            path,
            revision,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa" if attention in KERNELS else attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in `found`
            output_loading_info=True,
        )
    weight_files.refuse(found, type(model).__name__, path)
    return model


def _config_of(path: str, revision: str | None, label: str) -> Any:
    """The configuration of a checkpoint whose files hold what it says.

    Tied matrices that the files hold with different values are two: the library keeps them apart too, but for ZeRO-3.
    """
    try:
        config = _from_pretrained(AutoConfig, path, revision)
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{label}: config.json cannot be read ({first_line(error)}): copy it again") from error
    _check_kind(config, label)
    if getattr(config, "quantization_config", None):
        raise UsageError(
            f"{label} has quantised weights, which cannot be trained: give the checkpoint before quantisation"
        )
    if Path(path).is_dir():
        files = weight_files.files_in(Path(path), label)
    else:
        files = _of_hub(path, lambda: weight_files.downloaded(path, revision))
    if files:
        header, cls = weight_files.read_header(files, label), type(_skeleton_of(config, label))
        weight_files.check(cls, config, header, label)
        if weight_files.contradicts_tying(cls, config, header, label):
            config.tie_word_embeddings = False
    return config


def skeleton(config: Any) -> PreTrainedModel:
    """A model with the architecture `config` whose weights have shapes but no storage."""
    with torch.device("meta"), compat.no_remembered_deepspeed():
        return AutoModelForCausalLM.from_config(config)


def described(model: Mapping[str, Any]) -> PreTrainedModel | None:
    """The `skeleton` of what the configuration `model` starts from; None if that would need a download."""
    path = model["path"]
    if path and Path(path).is_dir():
        return load_model(path, weights=False)
    if path:
        return None
    return skeleton(scratch_config(model["scratch"]))


def scratch_config(scratch: Mapping[str, Any]) -> Any:
    """The configuration of a model from scratch. Raises UsageError if the library knows none like it."""
    try:
        return AutoConfig.for_model(**scratch["config"], vocab_size=scratch["vocab_size"])
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.scratch.config describes no model ({first_line(error)})") from error


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give `model` the tokenizer's pad and end ids, and an embedding row for its pad where nothing else can pad.

    Other tokens without a row belong to another model's tokenizer: UsageError, but for spare tokens to pad with, as
    published models have them. What the generation settings name as an end remains one.
    """
    embedding: Any = model.get_input_embeddings()
    embedding = getattr(embedding, "base_layer", embedding)  # it may have an adapter
    rows = embedding.num_embeddings
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    spare_tokens = {tokenizer.pad_token, *(token for token in beyond if "pad" in token.lower())}
    if tokenizer.pad_token in beyond and (spare := _spare(tokenizer, rows)):
        tokenizer.pad_token = spare
    if foreign := sorted(beyond.keys() - spare_tokens, key=lambda token: beyond[token]):
        raise UsageError(
            f"the tokenizer has {len(foreign)} token(s) beyond the {rows} rows of the model's embedding "
            f"({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}): it belongs to another model, name the "
            f"right one with model.tokenizer=<folder or hub name>"
        )
    if tokenizer.pad_token in beyond:
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


def _from_pretrained(cls: Any, path: str, revision: str | None, **options: Any) -> Any:
    if Path(path).is_dir():
        return cls.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    return _of_hub(path, lambda: cls.from_pretrained(path, revision=revision, trust_remote_code=False, **options))


def _of_hub(path: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError as error:
        text = str(error)
        if "gated" in text or "401" in text or "403" in text:
            token = "the token in HF_TOKEN was refused" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
            raise UsageError(
                f"{path} is gated and {token}: accept its licence on the hub, then export HF_TOKEN=<your token>"
            ) from error
        if "safetensors" in text:
            raise UsageError(
                f"{path} has no safetensors weights: name a revision that has, with model.revision="
            ) from error
        raise UsageError(
            f"{path} is neither a folder here nor to be had from the hub ({text.splitlines()[0][:120]}): "
            f"give a checkpoint folder or check the network"
        ) from error


def move(model: nn.Module, device: str) -> None:
    """Put the weights on `device`, in place; divided ones are on their rank's already."""
    if not zero3.is_sharded(model):
        nn.Module.to(model, device)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, first: bool = True) -> None:
    """Write weights (safetensors; of an adapter its own), configuration and tokenizer, as libraries read them.

    All ranks call it, the `first` one writes.
    """
    save_weights(model, folder, first, published=True)
    if first:
        tokenizer.save_pretrained(folder)


def check_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UsageError if `save` could not write the settings of `model`: before training, not at its first save."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            zero3.save_settings(lora.bare(model), Path(folder))
            tokenizer.save_pretrained(folder)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UsageError(
            f"{type(model).__name__} could not be saved after training ({first_line(error)}): correct config.json, "
            f"generation_config.json or the tokenizer's files of the checkpoint"
        ) from error


def save_weights(model: PreTrainedModel, folder: Path, first: bool, published: bool = False) -> None:
    """`save` without the tokenizer, with weights named as `read_weights` needs them unless `published`."""
    if not isinstance(model, PeftModel):
        zero3.save(model, folder, first=first, published=published)
    elif first:
        lora.save(model, folder)


def read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give `model`, whose parameters stay the objects that they are, the weights that `save_weights` wrote."""
    if isinstance(model, PeftModel):
        lora.restore(model, folder)
    else:
        zero3.read(model, folder)
