"""Models whose weights DeepSpeed's ZeRO-3 has divided over the ranks: loaded, run and saved with no rank holding all.

Every function serves whole models too, for which it does the plain thing. All ranks have to call it together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import GENERATION_CONFIG_NAME

from soul_exp import compat

MAX_SHARD_BYTES = 2 * 2**30  # of a saved file: what one rank holds while it saves, but for the largest single weight


def is_divided(deepspeed: Mapping[str, Any] | None) -> bool:
    """Whether a compute entry's `deepspeed` divides the weights."""
    return bool(deepspeed) and deepspeed["zero_optimization"]["stage"] == 3  # type: ignore[index]


def is_sharded(model: nn.Module) -> bool:
    return any(map(compat.is_partitioned, model.parameters()))


@contextmanager
def loading(deepspeed: Mapping[str, Any] | None) -> Iterator[None]:
    """Within it `from_pretrained` hands each weight out to the ranks as it is read."""
    if not is_divided(deepspeed):
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    assert deepspeed is not None
    known = {"zero_optimization": deepspeed["zero_optimization"], "train_micro_batch_size_per_gpu": 1}
    alive = HfDeepSpeedConfig(known)  # transformers keeps a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def whole(params: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """Within it `params` are whole on every rank, to be read."""
    divided = [p for p in params if compat.is_partitioned(p)]
    if not divided:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided)


_DRIVEN: WeakSet[nn.Module] = WeakSet()


@contextmanager
def driven(model: nn.Module) -> Iterator[None]:
    """Within it an engine gathers the weights of `model` whenever it runs: `gathering` leaves it to that."""
    _DRIVEN.add(model)
    try:
        yield
    finally:
        _DRIVEN.discard(model)


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Within it the model can be run without an engine: a layer's weights are whole while it runs, no longer."""
    removes: list[Callable[[], None]] = []
    if is_sharded(model) and model not in _DRIVEN:
        for module, params in _units(model):
            opened: list[AbstractContextManager[Any]] = []

            def enter(
                module: nn.Module,
                args: Any,
                params: Sequence[Tensor] = params,
                opened: list[AbstractContextManager[Any]] = opened,
            ) -> None:
                opened.append(whole(params))
                opened[-1].__enter__()

            def leave(
                module: nn.Module, args: Any, out: Any, opened: list[AbstractContextManager[Any]] = opened
            ) -> None:
                opened.pop().__exit__(None, None, None)

            removes.append(module.register_forward_pre_hook(enter, prepend=True).remove)
            removes.append(module.register_forward_hook(leave).remove)
    try:
        yield
    finally:
        for remove in removes:
            remove()


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules and the weights to gather at once when they run: a decoder layer's all, elsewhere a module's own."""
    if isinstance(module, GradientCheckpointingLayer):
        yield module, list(module.parameters())
        return
    if own := list(module.parameters(recurse=False)):
        yield module, own
    for child in module.children():
        yield from _units(child)


def is_finite(model: nn.Module) -> bool:
    """Whether every weight is a finite number: only then can a question be put to the model."""
    return not_finite(model) is None


def not_finite(model: nn.Module) -> str | None:
    """The name of a weight that is not a finite number."""
    shares = {name: compat.local_share(p) for name, p in model.named_parameters()}
    found = next((name for name, share in shares.items() if not torch.isfinite(share).all()), None)
    if is_sharded(model):
        votes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(votes, found)
        found = next(filter(None, votes), None)
    return found


def digest(model: nn.Module) -> list[int]:
    """A sum over the bits of each trained weight, or of this rank's share: another one once a weight has changed."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    shares = [compat.local_share(p).detach() for p in model.parameters() if p.requires_grad]
    return [int(share.view(integers[share.element_size()]).sum(dtype=torch.int64)) for share in shares]


def num_weights(model: nn.Module) -> int:
    return sum(compat.full_shape(p).numel() for p in model.parameters())


def save(
    model: PreTrainedModel, folder: Path, *, first: bool, published: bool = True, max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write configuration and weights (safetensors) as `from_pretrained` reads them; the `first` rank writes.

    Weights have the names that they have in published checkpoints or, with `published` false, those that they have in
    memory, as `read` needs them: transformers renames some when it loads a model, and fuses those of experts. Divided
    weights, which have their names in memory always, are gathered file by file: the first rank holds `max_bytes` at a
    time.
    """
    if not is_sharded(model):
        if first:
            with _default_generation(model):
                model.save_pretrained(folder, save_original_format=published)
            save_settings(model, folder)
        return
    names = list(_saved(model).items())
    files = _dealt(names, max_bytes)
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name, p in entries:
            with whole([p]):
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
        save_settings(model, folder)


def save_settings(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json and generation_config.json, the latter with every setting that the checkpoint came with.

    Not with its `save_pretrained`, which refuses settings that it reads: published models have a temperature without
    do_sample. They decide nothing that is measured here.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = next(p.dtype for p in model.parameters())
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


@contextmanager
def _default_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model's generation settings are the library's, which its `save_pretrained` accepts."""
    given = model.generation_config
    model.generation_config = None if given is None else GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = given


def _saved(model: nn.Module) -> dict[str, Tensor]:
    """All that a checkpoint holds of `model`, by name in memory: parameters and persistent buffers, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in tied}


def read(model: nn.Module, folder: Path) -> None:
    """Put the weights that `save`, with `published` false, wrote to `folder` into `model`, one at a time."""
    params, unknown = model.state_dict(keep_vars=True), []
    unread = set(_saved(model))
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if name not in params:
                    unknown.append(name)
                    continue
                unread.discard(name)
                p = params[name]
                with _to_change(p) as writes:
                    if writes:
                        p.copy_(file.get_tensor(name))
    if unknown or unread:
        differing = ", ".join([*unknown, *sorted(unread)][:3])
        raise RuntimeError(f"the weights in {folder} are not those of {type(model).__name__}: {differing}")


@contextmanager
def _to_change(p: Tensor) -> Iterator[bool]:
    """Within it `p` is whole; what the rank that gets True writes to it, all have."""
    if not compat.is_partitioned(p):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
        yield dist.get_rank() == 0


def _dealt(entries: Sequence[tuple[str, Tensor]], max_bytes: int) -> list[list[tuple[str, Tensor]]]:
    """The entries in order, in portions of at most `max_bytes`, but never an empty one."""
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
