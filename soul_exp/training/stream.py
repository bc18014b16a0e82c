"""The order of rows: every pass visits each row once, in batches of similar length."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from soul_exp.data import Encoded, Part, pad, seed_of


def windows(sizes: Iterable[int], batch_size: int, num_steps: int, longest: int = 16) -> list[range]:
    """All steps in windows of at most `longest`, within which rows are sorted by length into batches.

    One ends after a step in which a pass over a set of rows (of `sizes`) ends, if it is not smaller than a batch.
    """
    num_visits, passed = num_steps * batch_size, [size for size in sizes if size >= batch_size]
    ends = {-(-end // batch_size) for size in passed for end in range(size, num_visits, size)}
    bounds = pairwise([0, *sorted(ends - {num_steps}), num_steps])
    return [range(first, min(first + longest, stop)) for start, stop in bounds for first in range(start, stop, longest)]


def visits(lengths: np.ndarray, batch_size: int, shared: Sequence[range], seed: int, name: str) -> np.ndarray:
    """The numbers of the rows, which have these `lengths`, in the order in which all steps of `shared` visit them.

    Each pass visits every row once, in an order drawn from `seed` and `name`. A step holds no row twice, also where it
    spans two passes; where a batch is larger than the set, the counts of its rows differ by one at most. Within a
    window batches hold rows of similar length. The order of the batches is random and, for all sets with the same
    `shared` and `seed`, the same, so that long batches meet long ones.
    """
    num_rows, num_visits = len(lengths), shared[-1].stop * batch_size
    order = np.empty(-(-num_visits // num_rows) * num_rows, dtype=np.int64)
    remaining = list(reversed(shared)) if num_rows >= batch_size else []
    for start in range(0, len(order), num_rows):
        rows = np.random.default_rng(seed_of("rows", seed, name, start // num_rows)).permutation(num_rows)
        if held := start % batch_size:  # rows of this step from the former pass: add others, of similar length
            before = order[start - held : start]
            counts = np.bincount(before, minlength=num_rows)[rows]
            unlike = np.abs(lengths[rows] - lengths[before].mean())
            first = rows[np.lexsort((unlike, counts))[: batch_size - held]]
            rows = np.concatenate([first, rows[~np.isin(rows, first)]])
        order[start : start + num_rows] = rows
        while remaining and remaining[-1].start * batch_size < start + num_rows:
            window = remaining.pop()
            stop = min(window.stop * batch_size, start + num_rows)
            _bucket(order[window.start * batch_size : stop], lengths, batch_size, window, seed)
    return order[:num_visits]


def _bucket(rows: np.ndarray, lengths: np.ndarray, batch_size: int, window: range, seed: int) -> None:
    """Divide `rows` by length among the steps of their window, in place; the last step gets the rest of a pass."""
    steps = np.random.default_rng(seed_of("batches", seed, window.start)).permutation(len(window))
    sizes = np.full(len(steps), batch_size)
    sizes[steps[-1]] -= sizes.sum() - len(rows)
    batches = np.split(rows[np.argsort(lengths[rows], kind="stable")], sizes.cumsum()[:-1])
    rows[:] = np.concatenate([batches[step] for step in steps])


class Stream(Dataset[dict[str, tuple[int, Encoded]]]):
    """All rows of a run in the order in which they are visited; global batch t is rows [t * batch_size, ...).

    An entry maps each part to (number of the wording, its tokens). The order depends on `seed`, `batch_size` and the
    rows of the parts, never on the number of processes or accumulation steps, and is known in advance: a restarted run
    continues where it was. Every pass over a part visits each of its rows once; `visits` defines the batches.
    """

    def __init__(
        self, parts: Mapping[str, tuple[Part, Sequence[Encoded]]], *, num_steps: int, batch_size: int, seed: int
    ) -> None:
        self.num_steps, self.batch_size = num_steps, batch_size
        self.start = 0  # steps to leave out: a training that continues from the weights of another begins there
        self.num_rows = {name: len(part.rows) for name, (part, _) in parts.items()}
        self.encoded = {name: encoded for name, (_, encoded) in parts.items()}
        self.order: dict[str, np.ndarray] = {}  # part -> numbers of wordings
        rows: dict[str, np.ndarray] = {}
        shared = windows(self.num_rows.values(), batch_size, num_steps)
        followed_first = sorted(parts.items(), key=lambda item: item[1][0].follows is not None)
        for name, (part, encoded) in followed_first:
            starts = np.cumsum([0] + [len(row) for row in part.rows])
            if part.follows is not None and part.follows in rows:
                rows[name] = rows[part.follows]
            else:  # a part that follows one that is not in this run has the order that one would have
                lengths = np.array([len(encoded[start].ids) for start in starts[:-1]])
                rows[name] = visits(lengths, batch_size, shared, seed, part.follows or name)
            draws = np.random.default_rng(seed_of("wordings", seed, name)).random(num_steps * batch_size)
            counts = np.diff(starts)[rows[name]]
            self.order[name] = starts[:-1][rows[name]] + (draws * counts).astype(int)

    @property
    def notes(self) -> list[str]:
        """A note on the parts that are smaller than a batch: a step repeats their rows."""
        smaller: dict[int, list[str]] = {}
        for name, rows in self.num_rows.items():
            if rows < self.batch_size:
                smaller.setdefault(rows, []).append(name)
        size = self.batch_size
        return [
            f"train.batch_size={size} is more than the {rows} rows of {' and '.join(names)}: a step holds each of them "
            f"{size // rows}{f' or {size // rows + 1}' if size % rows else ''} times"
            for rows, names in smaller.items()
        ]

    def __len__(self) -> int:
        return (self.num_steps - self.start) * self.batch_size

    def __getitem__(self, index: int) -> dict[str, tuple[int, Encoded]]:
        index += self.start * self.batch_size
        return {name: (int(order[index]), self.encoded[name][order[index]]) for name, order in self.order.items()}


def collated(entries: Sequence[dict[str, tuple[int, Encoded]]], pad_id: int) -> dict[str, Tensor]:
    """One padded batch from entries of a Stream: part after part along B; `rows` [B] are the wordings' numbers."""
    flat = [entry[name] for name in entries[0] for entry in entries]
    return {**pad([row for _, row in flat], pad_id), "rows": torch.tensor([number for number, _ in flat])}
