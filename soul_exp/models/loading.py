"""Causal language models read from a folder or the hub, after their files were compared with their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from soul_exp import compat
from soul_exp.distributed import zero3
from soul_exp.errors import UsageError
from soul_exp.models import lora, weight_files
from soul_exp.models.attention import KERNELS
from soul_exp.models.hub import from_hub, from_pretrained
from soul_exp.models.vocabulary import fit_vocabulary, load_tokenizer
from soul_exp.models.weight_files import first_line


def load_model(
    path: str,
    revision: str | None = None,
    dtype: str = "float32",
    attention: str = "sdpa",
    weights: bool = True,
    deepspeed: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The causal model in `path` (folder or hub name), from safetensors and without remote code.

    A folder that holds an adapter gives its base with the adapter attached. With `weights` false it is the `skeleton`
    of a folder. Raises UsageError where weights are missing, unexpected or of another shape.
    """
    if lora.is_adapter(path):
        base = load_model(*lora.base_of(Path(path)), dtype, attention, weights, deepspeed)
        with zero3.partitioned_loading(deepspeed):
            lora.grow(base, Path(path))
            fit_vocabulary(base, load_tokenizer(path))
            with torch.device("cpu" if weights else "meta"):
                return lora.attached(base, Path(path), weights)
    config = config_of(path, revision, path)
    if not weights:
        return skeleton(config)
    with zero3.partitioned_loading(deepspeed):
        model, found = from_pretrained(
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
    weight_files.check_report(found, type(model).__name__, path)
    return model


def config_of(path: str, revision: str | None, label: str) -> Any:
    """The configuration of the checkpoint `path`; raises UsageError unless its files hold the weights of that model.

    Tied matrices that have different values in the files count as two: so the library reads them, but not for ZeRO-3.
    """
    try:
        config = from_pretrained(AutoConfig, path, revision)
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{label}: config.json cannot be read ({first_line(error)}): copy it again") from error
    check_causal_config(config, label)
    if getattr(config, "quantization_config", None):
        raise UsageError(
            f"{label} has quantised weights, which cannot be trained: give the checkpoint before quantisation"
        )
    if Path(path).is_dir():
        files = weight_files.files_in(Path(path), label)
    else:
        files = from_hub(path, lambda: weight_files.downloaded(path, revision))
    if files:
        header, cls = weight_files.read_header(files, label), type(skeleton_or_error(config, label))
        weight_files.check(cls, config, header, label)
        if weight_files.contradicts_tying(cls, config, header, label):
            config.tie_word_embeddings = False
    return config


def check_causal_config(config: Any, label: str) -> None:
    """Raises UsageError unless the library has a causal language model for `config`."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise UsageError(f"{label} is a {config.model_type} model: expected a causal language model")


def skeleton_or_error(config: Any, label: str) -> PreTrainedModel:
    """The `skeleton` of `config`; raises UsageError, which begins with `label`, if no model can be built from it."""
    try:
        return skeleton(config)
    except weight_files.BUILD_ERRORS as error:
        reason = first_line(error)
        raise UsageError(
            f"{label}: no {config.model_type} model can be built from it ({reason}): correct its configuration"
        ) from error


def skeleton(config: Any) -> PreTrainedModel:
    """A model with the architecture `config` whose weights have shapes but no storage; it computes nothing."""
    with torch.device("meta"), compat.no_remembered_deepspeed():
        return AutoModelForCausalLM.from_config(config)


def move(model: nn.Module, device: str) -> None:
    """Put the weights on `device`, in place; weights that ZeRO-3 divides are on their rank's device already."""
    if not zero3.is_sharded(model):
        nn.Module.to(model, device)
