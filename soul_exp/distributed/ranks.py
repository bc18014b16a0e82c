"""What the ranks of a process group do together; a process without a group is rank 0 of 1, and does it alone."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def start_group(device: str, **options: Any) -> None:
    """Join the process group of this run: NCCL on GPUs, else Gloo. Nothing happens if this process has joined."""
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "nccl", **options)


def leave_group() -> None:
    """Leave the process group, if there is one: left to the interpreter's end, its threads may abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; the others do not call it."""
    made: list[Any] = [make() if is_first() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    return made[0]


def gather(value: T) -> list[T]:
    """`value` of every rank, by rank, on every rank."""
    values: list[Any] = [value] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """`tensor`, to which the other ranks' are added in place."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def divide_work(names: Sequence[str], work: Callable[[str], T]) -> dict[str, T]:
    """name -> `work(name)`, each done by one rank and known to all: no rank reads every file."""
    parts = gather({name: work(name) for name in names[rank() :: num_ranks()]})
    return {name: value for part in parts for name, value in part.items()}


def in_batches(
    lengths: Sequence[int], work: Callable[[list[int]], Sequence[T]], size: int, *, label: str = "", lockstep: bool
) -> list[T]:
    """What `work` returns for the rows 0 .. len(lengths) - 1, in their order, on all ranks; `size` rows in each call.

    Rows of similar length meet in a batch, and which ones do does not depend on the number of ranks. In `lockstep`
    every rank calls `work` equally often, as a model needs whose weights are divided over them; a surplus call repeats
    work.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")[::-1]  # longest first: memory runs out early if at all
    batches = [order[start : start + size].tolist() for start in range(0, len(order), size)]
    share = batches[rank() :: num_ranks()]
    if lockstep and len(share) < -(-len(batches) // num_ranks()):
        share.append(batches[0])
    done: dict[int, T] = {}
    hidden = {} if is_first() and label else {"disable": True}  # else as TQDM_DISABLE says
    for batch in tqdm(share, desc=label, unit="batch", leave=False, **hidden):
        done |= zip(batch, work(batch), strict=True)
    done = {index: result for part in gather(done) for index, result in part.items()}
    return [done[i] for i in range(len(lengths))]
