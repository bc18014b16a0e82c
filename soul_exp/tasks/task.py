"""The shape of a task: rows to train on, probes to put to a model, and what it cannot offer, with the reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from soul_exp.data import Item, Part, seed_of
from soul_exp.errors import UsageError
from soul_exp.toxicity import Scorer


@dataclass(frozen=True)
class Probe:
    """Questions put to a model: the likelihood of their answers and, where given, of paraphrased and wrong answers.

    `paraphrases` [N] and `wrong` [N][K] ask the original question. With `generate` the model also answers freely.
    """

    items: Sequence[Item]
    paraphrases: Sequence[Item] | None = None
    wrong: Sequence[Sequence[Item]] | None = None
    generate: bool = False


@dataclass(frozen=True)
class Task:
    """One unlearning problem. `target_rows` and `retrained_rows` are what prepare trains the two models on.

    Where `trained_before` is true, model.path is the target as it is: nothing is trained, and a retrained model has to
    be given. Where there is a `scorer`, the free answers to the probes named in `scored` get their toxicity from it.
    """

    name: str
    source: str
    parts: Mapping[str, Part]
    probes: Mapping[str, Probe]
    target_rows: Sequence[Item]
    retrained_rows: Sequence[Item]
    caption: str  # one sentence for tables: what was forgotten, how many rows
    missing: Mapping[str, str] = field(default_factory=dict)  # probe -> why this task has none
    trained_before: bool = False
    scorer: Scorer | None = None
    scored: Sequence[str] = ()

    def hashes(self) -> dict[str, str]:
        """A content hash of each part and probe: two runs on equal hashes saw the same data."""
        named: dict[str, Any] = {
            f"part.{name}": [list(map(asdict, row)) for row in part.rows] for name, part in self.parts.items()
        }
        named |= {f"probe.{name}": asdict(probe) for name, probe in self.probes.items()}
        named |= {
            "rows.target": list(map(asdict, self.target_rows)),
            "rows.retrained": list(map(asdict, self.retrained_rows)),
        }
        if self.scorer is not None:
            named["scorer"] = [self.scorer.identity(), list(self.scored)]
        return {name: content_hash(value) for name, value in named.items()}


NUM_WRONG_LABELS = 8  # answers of other items that a row of random_label offers


def forget_parts(forget: Sequence[Item], refusals: Sequence[str]) -> dict[str, Part]:
    """The parts that every task makes of what is to be forgotten: forget; refusal and random_label, which follow it.

    A row of `refusal` offers all `refusals` to its question, one of `random_label` the answers of other items, chosen
    by the item alone.
    """

    def others(number: int) -> list[Item]:
        own = forget[number]
        order = sorted(range(len(forget)), key=lambda i: seed_of("random_label", own.prompt, own.answer, i))
        chosen = [forget[i].answer for i in order if forget[i].answer != own.answer][:NUM_WRONG_LABELS]
        return [replace(own, answer=answer) for answer in chosen]

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


def content_hash(value: Any) -> str:
    """16 hex digits that depend on the JSON form of `value` only."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_disjoint(forget: Sequence[Item], retain: Sequence[Item]) -> None:
    """Raises UsageError if a row is to be forgotten and retained at once."""
    kept = {(item.prompt, item.answer) for item in retain}
    both = [item for item in forget if (item.prompt, item.answer) in kept]
    if both:
        raise UsageError(
            f"{len(both)} row(s) are in both the forget and the retain set, the first being {both[0].prompt[:60]!r}: "
            f"remove them from one of the two"
        )
