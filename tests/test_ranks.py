"""What ranks do together: the same with two processes as alone, each piece of work done by one rank."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from soul_exp.distributed import ranks
from soul_exp.distributed.processes import launch

LENGTHS = [3, 9, 1, 7, 5]


def together(group: bool) -> dict[str, Any]:
    """Everything that ranks.py does, and the calls of this rank; in a group of all processes, or without one."""
    if group:
        ranks.start_group("cpu")
        ranks.start_group("cpu")  # which changes nothing
    calls: list[Any] = []

    def work(rows: list[int]) -> Sequence[int]:
        calls.append(rows)
        return [10 * row for row in rows]

    def squared(name: str) -> int:
        calls.append(name)
        return len(name) ** 2

    mine = ranks.rank()
    ranks.barrier()
    found = {
        "rank": mine,
        "num_ranks": ranks.num_ranks(),
        "is_first": ranks.is_first(),
        "broadcast": ranks.broadcast(lambda: f"of rank {mine}"),
        "gather": ranks.gather({"rank": mine}),
        "sum": ranks.sum_over_ranks(torch.tensor([mine + 1.0])).item(),
        "work": ranks.divide_work(["a", "bb", "ccc"], squared),
        "batches": ranks.in_batches(LENGTHS, work, 2, lockstep=False),
        "calls": list(calls),
    }
    calls.clear()
    found["lockstep"] = ranks.in_batches(LENGTHS, work, 2, lockstep=True)
    found["num_lockstep_calls"] = len(calls)
    ranks.leave_group()
    ranks.leave_group()
    found["num_ranks_after"] = ranks.num_ranks()
    return found


def of_rank(rank: int, folder: str) -> None:
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(together(group=True)))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(of_rank, str(folder), processes=2, threads=1, logs=folder)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


def test_a_process_without_a_group_is_rank_0_of_1_and_does_all_of_the_work() -> None:
    found = together(group=False)
    assert (found["rank"], found["num_ranks"], found["is_first"]) == (0, 1, True)
    assert found["broadcast"] == "of rank 0" and found["gather"] == [{"rank": 0}] and found["sum"] == 1.0
    # the longest rows first, two of similar length in a batch
    assert found["calls"] == ["a", "bb", "ccc", [1, 3], [4, 0], [2]] and found["num_lockstep_calls"] == 3


def test_both_ranks_get_the_results_that_one_process_gets(both: list[dict[str, Any]]) -> None:
    alone = together(group=False)
    for found in both:
        assert found["work"] == alone["work"] == {"a": 1, "bb": 4, "ccc": 9}
        assert found["batches"] == found["lockstep"] == alone["batches"] == [0, 10, 20, 30, 40]


def test_a_value_comes_from_rank_0_or_from_all(both: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(both):
        assert (found["rank"], found["num_ranks"], found["is_first"]) == (rank, 2, rank == 0)
        assert found["broadcast"] == "of rank 0" and found["gather"] == [{"rank": 0}, {"rank": 1}]
        assert found["sum"] == 1.0 + 2.0 and found["num_ranks_after"] == 1


def test_each_piece_of_work_is_done_once_but_in_lockstep_every_rank_calls_equally_often(
    both: list[dict[str, Any]],
) -> None:
    first, second = (found["calls"] for found in both)
    assert first == ["a", "ccc", [1, 3], [2]] and second == ["bb", [4, 0]]
    assert [found["num_lockstep_calls"] for found in both] == [2, 2]


def test_no_other_module_uses_the_process_group() -> None:
    package = Path(ranks.__file__).parents[1]
    functions = (
        "is_initialized",
        "get_rank",
        "get_world_size",
        "init_process_group",
        "all_reduce",
        "all_gather_object",
    )
    for file in package.rglob("*.py"):
        found = [name for name in functions if f"dist.{name}(" in file.read_text()]
        assert not found or file == Path(ranks.__file__), f"{file.name} calls {found}: put it into distributed/ranks.py"
