"""The shape of a task: rows to train on, probes to put to a model, and what it cannot offer, with the reason."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, TypeVar

from soul_exp.data import Item, Part, content_hash, seed_of
from soul_exp.errors import UsageError
from soul_exp.tasks.toxicity import Scorer

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """Questions put to a model: the likelihood of their answers and, where given, of paraphrased and wrong answers.

    `paraphrases` [N] and `wrong` [N][K] ask the original question. With `generate` the model also answers freely; its
    text is `cut` after as many words as the answer has, where that is a piece of a longer text.
    """

    items: Sequence[Item]
    paraphrases: Sequence[Item] | None = None
    wrong: Sequence[Sequence[Item]] | None = None
    generate: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Task:
    """One unlearning problem. `target_rows` and `retrained_rows` are what prepare trains the two models on.

    Where `trained_before` is true, model.path is the target as it is: nothing is trained, and a retrained model has to
    be given, else nothing is compared with one. Where there is a `scorer`, the free answers to the probes named in
    `scored` get their toxicity from it.
    """

    name: str
    source: str
    parts: Mapping[str, Part]
    probes: Mapping[str, Probe]
    target_rows: Sequence[Item]
    retrained_rows: Sequence[Item]
    caption: str  # one sentence for tables: what was forgotten, how many rows
    missing: Mapping[str, str] = field(default_factory=dict)  # probe, or probe.field of answers -> why there is none
    trained_before: bool = False
    scorer: Scorer | None = None
    scored: Sequence[str] = ()
    notes: Sequence[str] = ()  # what a user has to know before work starts, and a reader of the results after it
    learnt: Mapping[str, float] = field(default_factory=dict)  # metric -> what the target reaches that knows the rows

    def hashes(self) -> dict[str, str]:
        """A content hash of each part and probe: two runs on equal hashes saw the same data."""
        return dict(self._hashes)

    @functools.cached_property
    def _hashes(self) -> dict[str, str]:
        named: dict[str, Any] = {
            **{f"part.{name}": part.rows for name, part in self.parts.items()},
            **{f"probe.{name}": probe for name, probe in self.probes.items()},
            "rows.target": self.target_rows,
            "rows.retrained": self.retrained_rows,
        }
        if self.scorer is not None:
            named["scorer"] = [self.scorer.identity(), list(self.scored)]
        return {name: content_hash(_plain(value)) for name, value in named.items()}


def _plain(value: Any) -> Any:
    """What dataclasses.asdict gives, without a copy of each of 100,000 items."""
    if isinstance(value, Item):
        return vars(value)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return {name: _plain(inner) for name, inner in vars(value).items()} if is_dataclass(value) else value


NUM_WRONG_LABELS = 8  # answers of other items that a row of random_label offers
ALL_COMPARED = 400  # items up to which all others are put in order for each; of more a few are drawn
DRAWS = 64


def forget_parts(forget: Sequence[Item], refusals: Sequence[str]) -> dict[str, Part]:
    """The parts that every task makes of what is to be forgotten: forget; refusal and random_label, which follow it.

    A row of `refusal` offers all `refusals` to its question, one of `random_label` the answers of other items, chosen
    by the item alone.
    """

    def others(number: int) -> list[Item]:
        own = forget[number]
        seeds = functools.partial(seed_of, "random_label", own.prompt, own.answer)
        if len(forget) <= ALL_COMPARED:
            order: Iterable[int] = sorted(range(len(forget)), key=seeds)
        else:
            order = (seeds(draw) % len(forget) for draw in range(DRAWS))
        unlike = (forget[i].answer for i in order if forget[i].answer != own.answer)
        return [replace(own, answer=answer) for answer in itertools.islice(unlike, NUM_WRONG_LABELS)]

    parts = {
        "forget": Part.of(forget),
        "refusal": Part(
            [[replace(item, answer=" " + text if item.raw else text) for text in refusals] for item in forget],
            follows="forget",
        ),
    }
    labels = [others(number) for number in range(len(forget))]
    if all(labels):  # else all answers are the same
        parts["random_label"] = Part(labels, follows="forget")
    return parts


def spread(rows: Sequence[T], count: int) -> list[T]:
    """`count` of the rows, or all if there are fewer, from all over and in their order."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else list(rows)


def divided(rows: Sequence[T], fraction: float) -> tuple[list[T], list[T]]:
    """Validation and test rows: every (1/fraction)-th row of the former, spread evenly, the rest of the latter."""
    chosen = {int((i + 0.5) / fraction) for i in range(int(len(rows) * fraction))} if fraction else set()
    return [row for i, row in enumerate(rows) if i in chosen], [row for i, row in enumerate(rows) if i not in chosen]


def and_general(questions: Sequence[Item]) -> str:
    """What a caption adds to the rows that are kept: the general questions that are trained on beside them."""
    return f" and {len(questions)} general questions" if questions else ""


def check_disjoint(forget: Sequence[Item], retain: Sequence[Item]) -> None:
    """Raises UsageError if a row is to be forgotten and retained at once."""
    kept = {(item.prompt, item.answer) for item in retain}
    both = [item for item in forget if (item.prompt, item.answer) in kept]
    if both:
        raise UsageError(
            f"{len(both)} row(s) are in both the forget and the retain set, the first being {both[0].prompt[:60]!r}: "
            f"remove them from one of the two"
        )
