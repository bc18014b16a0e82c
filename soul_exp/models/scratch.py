"""Models that start from random weights, and the architecture that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from soul_exp.errors import UsageError
from soul_exp.models.checking import check_causal
from soul_exp.models.loading import load_model, skeleton
from soul_exp.models.weight_files import first_line


def from_scratch(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A causal model with the architecture `config` (its `model_type` and fields); `seed` fixes its random weights."""
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


def scratch_config(scratch: Mapping[str, Any]) -> Any:
    """The library's configuration for the option `model.scratch`. Raises UsageError if it has no such model."""
    try:
        return AutoConfig.for_model(**scratch["config"], vocab_size=scratch["vocab_size"])
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.scratch.config describes no model ({first_line(error)})") from error


def start_skeleton(model: Mapping[str, Any]) -> PreTrainedModel | None:
    """The `skeleton` of the model that a run with the options `model` starts from; None if it needs a download."""
    path = model["path"]
    if path and Path(path).is_dir():
        return load_model(path, weights=False)
    if path:
        return None
    return skeleton(scratch_config(model["scratch"]))
