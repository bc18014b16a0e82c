"""Work on many rows, in batches of similar length, divided over the ranks; every rank gets every result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from tqdm.auto import tqdm

T = TypeVar("T")


def in_batches(
    lengths: Sequence[int], work: Callable[[list[int]], Sequence[T]], size: int, *, label: str = "", lockstep: bool
) -> list[T]:
    """What `work` returns for the rows 0 .. len(lengths) - 1, `size` of them a call, on all ranks and in their order.

    Which rows meet in a batch does not depend on the number of ranks. In `lockstep` every rank calls `work` equally
    often, as a model needs whose weights are divided over them; a call too many is repeated work.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")[::-1]  # longest first: memory runs out early if at all
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = [order[start : start + size].tolist() for start in range(0, len(order), size)]
    share = batches[rank::world]
    if lockstep and len(share) < -(-len(batches) // world):
        share.append(batches[0])
    done: dict[int, T] = {}
    for batch in tqdm(share, desc=label, unit="batch", leave=False, disable=rank > 0 or not label):
        done |= zip(batch, work(batch), strict=True)
    if world > 1:
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, done)
        done = {index: result for share in shares for index, result in share.items()}
    return [done[i] for i in range(len(lengths))]


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def agreed(decide: Callable[[], Any]) -> Any:
    """What rank 0 decides."""
    said = [decide() if is_first() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    return said[0]


def shared(names: Sequence[str], work: Callable[[str], Any]) -> dict[str, Any]:
    """name -> `work(name)`, each done by one rank and known to all: no rank reads every file."""
    if not dist.is_initialized():
        return {name: work(name) for name in names}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {name: work(name) for name in names[dist.get_rank() :: dist.get_world_size()]})
    return {name: value for part in parts for name, value in part.items()}
