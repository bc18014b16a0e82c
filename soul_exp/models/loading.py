"""Causal language models: read from a folder or the hub, or random; their files are checked before they are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from soul_exp import compat, hub
from soul_exp.distributed import zero3
from soul_exp.errors import UsageError, explained, first_line
from soul_exp.models import lora, weight_files
from soul_exp.models.attention import of_family
from soul_exp.models.checkpoint import UNLEARNED, from_hub, from_pretrained
from soul_exp.options import leaves
from soul_exp.ranges import MOST, Typed, as_typed
from soul_exp.schema import nearest

CONFIGURATIONS = ("config.json", "tokenizer_config.json", "tokenizer.json")  # one of them is in each hub entry
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # files of the tokenizer too
SMALL = 20_000_000  # weights: a model of at most this size is built with random ones, in a moment, and run


def load_model(
    path: str,
    revision: str | None = None,
    dtype: str = "float32",
    attention: str = "sdpa",
    weights: bool = True,
    deepspeed: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The causal model in `path` (folder or hub name), from safetensors and without remote code.

    A folder that holds an adapter gives its base with the adapter attached. With `weights` false it is a `skeleton`.
    Raises UsageError where weights are missing, unexpected or of another shape.
    """
    if lora.is_adapter(path):
        base = load_model(*lora.base_of(Path(path)), dtype, attention, weights, deepspeed)
        with zero3.partitioned_loading(deepspeed):
            lora.grow(base, Path(path))
            with torch.device("cpu" if weights else "meta"):
                return lora.attached(base, Path(path), weights)
    config = config_of(path, revision, path)
    if not weights:
        return skeleton(config, path)
    with zero3.partitioned_loading(deepspeed):
        model, found = from_pretrained(
            AutoModelForCausalLM,
            path,
            revision,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=of_family(type(skeleton(config, path)), attention),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in `found`
            output_loading_info=True,
        )
    weight_files.check_report(found, type(model).__name__, path)
    return model


def check_hub(path: str, revision: str | None) -> None:
    """Raises UsageError if `path` is a hub name of which no configuration is available there or cached here."""

    def configuration() -> None:
        if not any(compat.cached_file_if_present(path, name, revision) for name in CONFIGURATIONS):
            raise FileNotFoundError(
                "no connection, and not in the local cache" if hub.is_offline() else "no config.json"
            )

    if not Path(path).is_dir():
        from_hub(path, configuration)


def config_of(path: str, revision: str | None, label: str) -> Any:
    """The configuration of the checkpoint `path`; raises UsageError unless its files hold the weights of that model.

    Tied matrices that have different values in the files count as two: so the library reads them, but not for ZeRO-3.
    """
    errors = (*weight_files.BUILD_ERRORS, OSError)
    with explained(errors, f"{label}: config.json cannot be read", "correct it or copy it again"):
        config = from_pretrained(AutoConfig, path, revision)
    check_causal_config(config, label)
    text = config.get_text_config()
    if (getattr(text, "pad_token_id", None) or 0) >= text.vocab_size:  # as some publish it: the tokenizer's counts
        text.pad_token_id = None
    if getattr(config, "quantization_config", None):
        raise UsageError(f"{label} has quantised weights, which cannot be trained: give the unquantised checkpoint")
    if Path(path).is_dir():
        files = weight_files.files_in(Path(path), label)
    else:
        files = from_hub(path, lambda: weight_files.downloaded(path, revision))
    if files:
        header, cls = weight_files.read_header(files, label), type(skeleton(config, label))
        weight_files.check(cls, config, header, label)
        if weight_files.contradicts_tying(cls, config, header, label):
            config.tie_word_embeddings = False
    return config


def check_causal_config(config: Any, label: str) -> None:
    """Raises UsageError unless the library has a causal language model for `config`."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise UsageError(f"{label} is a {config.model_type} model: expected a causal language model")


def skeleton(config: Any, label: str) -> PreTrainedModel:
    """A model whose weights have shapes but no storage; raises UsageError, about `label`, if `config` makes none."""
    found = f"{label}: no {config.model_type} model can be built from it"
    building = explained(weight_files.BUILD_ERRORS, found, "correct its configuration")
    with building, torch.device("meta"), compat.no_remembered_deepspeed():
        return AutoModelForCausalLM.from_config(config)


def move(model: nn.Module, device: str) -> None:
    """Put the weights on `device`, in place; weights that ZeRO-3 divides are on their rank's device already."""
    if not zero3.is_sharded(model):
        nn.Module.to(model, device)


def check_folder(folder: Path, option: str, own_tokenizer: bool = True) -> None:
    """Raises UsageError unless `folder` holds a checkpoint that can be read without unpickling anything.

    It must have a tokenizer too, unless `own_tokenizer` is false. The base of an adapter must pass the same checks and
    fit the adapter; a base on the hub is checked when it is loaded.
    """
    if lora.is_adapter(str(folder)):
        lora.check_files(folder, option)
        if not (folder / UNLEARNED).is_file():
            weight_files.check_finite([folder / lora.WEIGHTS], f"{option}={folder}")
        check_tokenizer(folder, option)
        base = Path(lora.base_of(folder)[0])
        if base.is_absolute() and not base.is_dir():
            found = f"{option}={folder} is an adapter of {base}, which does not exist"
            raise UsageError(f"{found}: put that checkpoint back or give its new path in {lora.SETTINGS}")
        if base.is_dir():
            check_folder(base, f"the base of {option}")
            load_model(str(folder), weights=False)
        return
    if not (folder / "config.json").is_file():
        raise UsageError(f"{option}={folder} has no config.json: give a checkpoint folder as save_pretrained writes it")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise UsageError(f"{option}={folder} has {found}: convert to *.safetensors with save_pretrained first")
    label = f"{option}={folder}"
    for name in ("config.json", GENERATION_CONFIG_NAME, weight_files.INDEX):
        weight_files.check_arrived(folder / name, label)
    check_architecture(config_of(str(folder), None, label), label)
    if not (folder / UNLEARNED).is_file():  # which may have diverged
        weight_files.check_finite(weight_files.files_in(folder, label), label)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        found = f"{label}: {GENERATION_CONFIG_NAME} is not valid"
        with explained((OSError, ValueError, TypeError), found, "correct or remove it"):
            ends = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
            if not all(isinstance(end, int | None) for end in (ends if isinstance(ends, list) else [ends])):
                raise TypeError(f"eos_token_id={ends}")
    if own_tokenizer:
        check_tokenizer(folder, option)


def check_tokenizer(folder: Path, option: str) -> None:
    """Raises UsageError unless `folder` has the files of a tokenizer, none of them empty."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(f"{option}={folder} has no tokenizer: save it there with tokenizer.save_pretrained")
    alone = (folder / TOKENIZER_FILES[0]).is_file()  # the library then reads none of the others
    for name in (*BESIDE, *(TOKENIZER_FILES[:1] if alone else (*TOKENIZER_FILES, "merges.txt"))):
        weight_files.check_arrived(folder / name, f"{option}={folder}")


def check_architecture(config: Any, label: str) -> None:
    """Raises UsageError unless `config` is of a causal model; one above SMALL weights is run once it is loaded."""
    check_causal_config(config, label)
    if skeleton(config, label).num_parameters() <= SMALL:
        errors, found = (*weight_files.BUILD_ERRORS, IndexError), f"{label}: no {config.model_type} model of it can run"
        running = explained(errors, found, "correct its configuration")
        with running, torch.random.fork_rng(devices=[]), compat.no_remembered_deepspeed():
            check_causal(AutoModelForCausalLM.from_config(config, dtype=torch.float32), label)


@torch.no_grad()
def check_causal(model: PreTrainedModel, label: str) -> None:
    """Raises UsageError if the logits at a token depend on later tokens, as an encoder's do."""
    rows = compat.full_shape(lora.embedding_of(model).weight)[0]
    ids = [i for i in range(rows) if i != model.config.pad_token_id][:12]
    both = torch.tensor([ids[:8], ids[:4] + ids[-4:]], device=next(model.parameters()).device)
    with zero3.evaluating(model):
        logits = model(input_ids=both).logits[:, :4].float()
    # exactly 0 in a causal model, except for the rounding of experts, which compute other tokens in the same batch
    rounding = max(1e-5, 4 * torch.finfo(next(model.parameters()).dtype).eps)
    if (logits[0] - logits[1]).abs().max() > rounding * logits.abs().max():
        raise UsageError(
            f"{label} is no causal language model: the predictions of {type(model).__name__} after a token depend on "
            f"the tokens that follow: give a decoder (of an encoder, is_decoder=true in its config.json)"
        )


def from_scratch(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A causal model with the architecture `config` (its `model_type` and fields); `seed` fixes its random weights."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(scratch_config(config, len(tokenizer), **ends))
    check_causal(model, "model.scratch.config")
    return model


def scratch_config(config: Mapping[str, Any], vocab_size: int, **ends: Any) -> Any:
    """The library's configuration of the option `model.scratch`. Raises UsageError if it has no such model."""
    fields = dict(config)
    for key, value in leaves(fields):
        if isinstance(value, int) and value > MOST:
            raise UsageError(f"model.scratch.config.{key}={value}: expected at most {MOST}")
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        unknown = f"model.scratch.config.model_type={as_typed(kind)} is unknown"
        raise UsageError(f"{unknown}{nearest(str(kind), CONFIG_MAPPING)}")
    try:
        found = AutoConfig.for_model(**fields, vocab_size=vocab_size, **ends)
    except (TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        bases = reversed(CONFIG_MAPPING[kind].__mro__)
        hints = {key: hint for base in bases for key, hint in vars(base).get("__annotations__", {}).items()}
        typed = (Typed(hints[key]).mismatch(key, value) for key, value in fields.items() if key in hints)
        why = next(filter(None, typed), first_line(error))
        raise UsageError(f"model.scratch.config describes no model ({why}): correct it") from error
    if found.get_text_config().num_hidden_layers < 1:
        raise UsageError("model.scratch.config.num_hidden_layers: expected 1 or more")
    return found


def check_scratch(config: Mapping[str, Any], vocab_size: int) -> None:
    """Raises UsageError unless the option `model.scratch` describes a causal model, with options that it has."""
    found = scratch_config(config, vocab_size)
    known = {"model_type", *vars(AutoConfig.for_model(found.model_type)), *found.attribute_map}
    for name in sorted(set(config) - known):
        advice = nearest(name, known, "model.scratch.config")
        raise UsageError(f"model.scratch.config.{name} is no option of a {found.model_type} model{advice}")
    check_architecture(found, "model.scratch.config")
