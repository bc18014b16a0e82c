"""Models, adapters too, saved and read back by all ranks together, none of which ever holds all of a divided model."""

import json
import tempfile
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from soul_exp import compat
from soul_exp.distributed import ranks, zero3
from soul_exp.errors import explained
from soul_exp.models import lora

MAX_SHARD_BYTES = 2 * 2**30  # of a saved file: one rank holds at most this, or one larger weight


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, first: bool = True) -> None:
    """Write weights (safetensors; of an adapter only its own), configuration and tokenizer; the `first` rank writes."""
    save_weights(model, folder, first, published=True)
    if first:
        tokenizer.save_pretrained(folder)


def check_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UsageError if `save` could not write the settings of `model`: to be known before training."""
    found = f"{type(model).__name__} could not be saved after training"
    advice = "correct config.json, generation_config.json or the tokenizer's files of the checkpoint"
    saving = explained((TypeError, ValueError, StrictDataclassError), found, advice)
    with saving, tempfile.TemporaryDirectory() as folder:
        _save_settings(lora.bare(model), Path(folder))
        tokenizer.save_pretrained(folder)


def save_weights(
    model: PreTrainedModel, folder: Path, first: bool, published: bool = False, max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """As `save`, without the tokenizer.

    With `published` the names are those of published checkpoints, else those in memory, which `read_weights` needs:
    transformers renames some weights when it loads a model, and fuses those of experts. Weights that ZeRO-3 divides
    keep their names in memory; they are gathered file by file, so that the first rank holds `max_bytes` at a time.
    """
    if lora.is_wrapped(model):
        if first:
            lora.save(model, folder)
        return
    if zero3.is_sharded(model):
        _save_divided(model, folder, first, max_bytes)
    elif first:
        given = model.generation_config
        model.generation_config = None if given is None else GenerationConfig()  # which save_pretrained accepts
        try:
            model.save_pretrained(folder, save_original_format=published)
        finally:
            model.generation_config = given
    if first:
        _save_settings(model, folder)


def _save_divided(model: nn.Module, folder: Path, first: bool, max_bytes: int) -> None:
    params = _saved_tensors(model)
    files = split_state_dict_into_shards_factory(
        params,
        get_storage_size=lambda p: compat.full_shape(p).numel() * p.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in files.filename_to_tensors.items():
        tensors: dict[str, Tensor] = {}
        for name in names:
            with zero3.gathered([params[name]]):
                if first:
                    tensors[name] = params[name].detach().to("cpu", copy=True).contiguous()
        if first:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if first and files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy what `save_weights` wrote, not `published`, into the parameters of `model`, which stay the same objects."""
    if lora.is_wrapped(model):
        lora.restore(model, folder)
        return
    params, unknown = model.state_dict(keep_vars=True), []
    unread = set(_saved_tensors(model))
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if name not in params:
                    unknown.append(name)
                    continue
                unread.discard(name)
                p = params[name]
                with zero3.gathered([p], writer=0):
                    if ranks.is_first() or not compat.is_partitioned(p):
                        p.copy_(file.get_tensor(name))
    if unknown or unread:
        differing = ", ".join([*unknown, *sorted(unread)][:3])
        raise RuntimeError(f"the weights in {folder} are not those of {type(model).__name__}: {differing}")


def _save_settings(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and generation_config.json, the latter with every setting that the checkpoint had.

    Its own `save_pretrained` rejects some of them (temperature without do_sample); none changes what is measured here.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = next(p.dtype for p in model.parameters())
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `model` that a checkpoint holds, by name: parameters and persistent buffers, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in tied}
