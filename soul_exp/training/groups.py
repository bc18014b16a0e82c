"""The parameter groups of an optimizer: trained weights by their role in the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def parameter_groups(model: Any, decayed: Collection[str]) -> list[dict[str, Any]]:
    """The trained parameters of `model` in groups by role; weight decay is 0 for all but those named in `decayed`.

    The role is "embedding" for every embedding, positions included, and the output head; "hidden" for the matrices of
    other linear layers; "other" for the rest, such as norms, biases, fused experts, and what a module holds by itself.
    """
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    embeddings = _ids(p for part in (*ends, *_embeddings(model)) for p in part.parameters())
    matrices = _ids(part.weight for part in model.modules() if isinstance(part, nn.Linear | Conv1D))
    groups: dict[str, dict[str, Any]] = {
        "hidden": {"params": [], "role": "hidden"},
        "embedding": {"params": [], "role": "embedding"},
        "decayed": {"params": [], "role": "other"},
        "other": {"params": [], "role": "other", "weight_decay": 0.0},
    }
    for name, p in model.named_parameters():
        if p.requires_grad:
            role = "embedding" if id(p) in embeddings else "hidden" if id(p) in matrices else "decayed"
            groups[role if name in decayed else "other"]["params"].append(p)
    return [group for group in groups.values() if group["params"]]


def _embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """Every embedding in `model`; of one with an adapter, the adapter's module around it."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) or isinstance(getattr(module, "base_layer", None), nn.Embedding):
            yield module


def _ids(params: Iterable[Any]) -> set[int]:
    return {id(p) for p in params}
