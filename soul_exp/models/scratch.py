"""Models that start from random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from soul_exp.errors import UsageError
from soul_exp.models.checking import check_causal
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


def scratch_config(config: Mapping[str, Any], vocab_size: int) -> Any:
    """The library's configuration of the option `model.scratch`. Raises UsageError if it has no such model."""
    try:
        return AutoConfig.for_model(**config, vocab_size=vocab_size)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model.scratch.config describes no model ({first_line(error)})") from error
