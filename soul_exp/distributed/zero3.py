"""Models, divided over the ranks by ZeRO-3 or not, loaded, run and inspected by all ranks; no rank holds all of one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from soul_exp import compat
from soul_exp.distributed import ranks


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has divided the weights of `model`."""
    return any(map(compat.is_partitioned, model.parameters()))


@contextmanager
def partitioned_loading(deepspeed: Mapping[str, Any] | None) -> Iterator[None]:
    """In the block, `from_pretrained` divides each weight over the ranks as it is read, if `deepspeed` says ZeRO-3."""
    if not deepspeed or deepspeed["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    known = {"zero_optimization": deepspeed["zero_optimization"], "train_micro_batch_size_per_gpu": 1}
    alive = HfDeepSpeedConfig(known)  # transformers keeps a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def gathered(params: Sequence[Tensor], writer: int | None = None) -> AbstractContextManager[Any]:
    """In the block, every rank has all values of `params`; what rank `writer` writes to them, all have at the end."""
    divided = [p for p in params if compat.is_partitioned(p)]
    if not divided:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided, modifier_rank=writer)


_RUN_BY_ENGINE: WeakSet[nn.Module] = WeakSet()


@contextmanager
def run_by_engine(model: nn.Module) -> Iterator[None]:
    """In the block, DeepSpeed's engine gathers the weights of `model` when it runs, and `evaluating` does not."""
    _RUN_BY_ENGINE.add(model)
    try:
        yield
    finally:
        _RUN_BY_ENGINE.discard(model)


@contextmanager
def evaluating(model: nn.Module, by_layer: bool = True) -> Iterator[None]:
    """In the block, `model` evaluates, without an engine too: a layer's weights are gathered only while it runs.

    Without `by_layer` the caller gathers them.
    """
    is_gathered_here = by_layer and is_sharded(model) and model not in _RUN_BY_ENGINE
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for module, params in _units(model) if is_gathered_here else ():
            _gather_while_running(module, params, stack)
        model.eval()
        yield


def _gather_while_running(module: nn.Module, params: Sequence[Tensor], stack: ExitStack) -> None:
    """Gather `params` before each forward pass of `module` and divide them after it, until `stack` ends."""
    opened: list[AbstractContextManager[Any]] = []

    def enter(module: nn.Module, args: Any) -> None:
        opened.append(gathered(params))
        opened[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        opened.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules, and the weights to gather when each runs: of a decoder layer all, of other modules their own."""
    if isinstance(module, GradientCheckpointingLayer):
        yield module, list(module.parameters())
        return
    if own := list(module.parameters(recurse=False)):
        yield module, own
    for child in module.children():
        yield from _units(child)


def is_finite(model: nn.Module) -> bool:
    """Whether every weight is a finite number: only then can the model be evaluated."""
    return nonfinite_weight(model) is None


def nonfinite_weight(model: nn.Module) -> str | None:
    """The name of a weight with a value that is not finite; None if there is none."""
    shares = {name: compat.local_share(p) for name, p in model.named_parameters()}
    found = next((name for name, share in shares.items() if not torch.isfinite(share).all()), None)
    if is_sharded(model):
        found = next(filter(None, ranks.gather(found)), None)
    return found


def weight_sums(model: nn.Module) -> list[int]:
    """For each trained weight the sum over its bits as integers, of this rank's share: a change of a weight shows."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    shares = [compat.local_share(p).detach() for p in model.parameters() if p.requires_grad]
    return [int(share.view(integers[share.element_size()]).sum(dtype=torch.int64)) for share in shares]
