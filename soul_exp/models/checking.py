"""Whether a checkpoint or a configuration is a causal language model that can be read: known before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from soul_exp import compat
from soul_exp.distributed import zero3
from soul_exp.errors import UsageError
from soul_exp.models import lora
from soul_exp.models.loading import check_causal_config, config_of, load_model, skeleton_or_error
from soul_exp.models.weight_files import first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
SMALL = 20_000_000  # weights: a model of at most this size is built with random ones, in a moment, and run


def check_folder(folder: Path, option: str, own_tokenizer: bool = True) -> None:
    """Raises UsageError unless `folder` holds a checkpoint that can be read without unpickling anything.

    It must have a tokenizer too, unless `own_tokenizer` is false. The base of an adapter must pass the same checks and
    fit the adapter; a base on the hub is checked when it is loaded.
    """
    if lora.is_adapter(str(folder)):
        lora.check_files(folder, option)
        _check_tokenizer(folder, option)
        base = Path(lora.base_of(folder)[0])
        if base.is_absolute() and not base.is_dir():
            raise UsageError(
                f"{option}={folder} is an adapter of {base}, which does not exist: put that checkpoint back or "
                f"give its new path in {lora.SETTINGS}"
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
    config = config_of(str(folder), None, f"{option}={folder}")
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

    A model of more than SMALL weights is not run here, but after it is loaded.
    """
    check_causal_config(config, label)
    if zero3.num_weights(skeleton_or_error(config, label)) <= SMALL:
        with torch.random.fork_rng(devices=[]), compat.no_remembered_deepspeed():
            check_causal(AutoModelForCausalLM.from_config(config, dtype=torch.float32), label)


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
    # exactly 0 in a causal model, except for the rounding of experts, which compute other tokens in the same batch
    rounding = max(1e-5, 4 * torch.finfo(next(model.parameters()).dtype).eps)
    if (logits[0] - logits[1]).abs().max() > rounding * logits.abs().max():
        raise UsageError(
            f"{label} is no causal language model: the predictions of {type(model).__name__} after a token depend on "
            f"the tokens that follow: give a decoder (of an encoder, is_decoder=true in its config.json)"
        )


def check_finite(model: PreTrainedModel, label: str) -> None:
    """Raises UsageError if a weight is not a finite number."""
    if name := zero3.nonfinite_weight(model):
        raise UsageError(
            f"{label} has weights that are not finite numbers ({name}): copy or train the checkpoint again"
        )
