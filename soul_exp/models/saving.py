"""Models saved and read back: complete ones, adapters, and those whose weights ZeRO-3 divides over the ranks.

All ranks call every function together; no rank ever holds all of a divided model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from soul_exp import compat
from soul_exp.distributed import zero3
from soul_exp.errors import UsageError
from soul_exp.models import lora
from soul_exp.models.weight_files import first_line

MAX_SHARD_BYTES = 2 * 2**30  # of a saved file: one rank holds at most this, or one larger weight


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, first: bool = True) -> None:
    """Write weights (safetensors; of an adapter only its own), configuration and tokenizer, as libraries read them.

    The `first` rank writes.
    """
    save_weights(model, folder, first, published=True)
    if first:
        tokenizer.save_pretrained(folder)


def check_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UsageError if `save` could not write the settings of `model`: to be known before training."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save_settings(lora.bare(model), Path(folder))
            tokenizer.save_pretrained(folder)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UsageError(
            f"{type(model).__name__} could not be saved after training ({first_line(error)}): correct config.json, "
            f"generation_config.json or the tokenizer's files of the checkpoint"
        ) from error


def save_weights(model: PreTrainedModel, folder: Path, first: bool, published: bool = False) -> None:
    """As `save`, without the tokenizer, and with the names that `read_weights` needs unless `published`."""
    if not isinstance(model, PeftModel):
        save_model(model, folder, first=first, published=published)
    elif first:
        lora.save(model, folder)


def read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy the weights that `save_weights` wrote into the parameters of `model`, which stay the same objects."""
    if isinstance(model, PeftModel):
        lora.restore(model, folder)
    else:
        _read(model, folder)


def save_model(
    model: PreTrainedModel, folder: Path, *, first: bool, published: bool = True, max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write configuration and weights (safetensors) as `from_pretrained` reads them; the `first` rank writes.

    With `published` the names are those of published checkpoints, else those in memory, which `read_weights` needs:
    transformers renames some weights when it loads a model, and fuses those of experts. Weights that ZeRO-3 divides
    keep their names in memory; they are gathered file by file, so that the first rank holds `max_bytes` at a time.
    """
    if not zero3.is_sharded(model):
        if first:
            with _default_generation(model):
                model.save_pretrained(folder, save_original_format=published)
            _save_settings(model, folder)
        return
    names = list(_saved_tensors(model).items())
    files = _in_portions(names, max_bytes)
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name, p in entries:
            with zero3.gathered([p]):
                if first:
                    tensors[name] = p.detach().to("cpu", copy=True).contiguous()
            weight_map[name] = file
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if first:
        if len(files) > 1:
            size = sum(compat.full_shape(p).numel() * p.element_size() for _, p in names)
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        _save_settings(model, folder)


def _save_settings(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and generation_config.json, the latter with every setting that the checkpoint had.

    Its own `save_pretrained` rejects settings that it reads, such as a temperature without do_sample, which published
    models have. None of them changes what is measured here.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = next(p.dtype for p in model.parameters())
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


@contextmanager
def _default_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within it the generation settings of `model` are the library's defaults, which `save_pretrained` accepts."""
    given = model.generation_config
    model.generation_config = None if given is None else GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = given


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `model` that a checkpoint holds, by name: parameters and persistent buffers, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in tied}


def _read(model: nn.Module, folder: Path) -> None:
    """Copy the weights that `save_model` wrote to `folder`, with `published` false, into `model`, one at a time."""
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
                with zero3.to_be_written(p) as writes:
                    if writes:
                        p.copy_(file.get_tensor(name))
    if unknown or unread:
        differing = ", ".join([*unknown, *sorted(unread)][:3])
        raise RuntimeError(f"the weights in {folder} are not those of {type(model).__name__}: {differing}")


def _in_portions(entries: Sequence[tuple[str, Tensor]], max_bytes: int) -> list[list[tuple[str, Tensor]]]:
    """The entries in order, in portions of at most `max_bytes`, each with at least one entry."""
    portions: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, p in entries:
        added = compat.full_shape(p).numel() * p.element_size()
        if portions[-1] and size + added > max_bytes:
            portions.append([])
            size = 0
        portions[-1].append((name, p))
        size += added
    return portions
