"""The shape of a task: rows to train on, probes to evaluate on, and what is missing, with the reason."""

import functools
import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from soul_exp.data import Item, Part, content_hash, seed_of
from soul_exp.errors import UsageError
from soul_exp.metrics.text import words
from soul_exp.tasks.embeddings import Embedding
from soul_exp.tasks.scorers import Scorer

T = TypeVar("T")

ATTACKED = ("forget", "holdout")  # the probes that membership attacks read: members, and rows in no training


def _content(value: Any) -> dict[str, Any]:
    """What decides the answers to a probe, which its units do not."""
    return {name: inner for name, inner in vars(value).items() if name != "units"}


@dataclass(frozen=True)
class Probe:
    """N prompts to evaluate a model on: the likelihood of their answers, and of paraphrased and wrong ones if given."""

    items: Sequence[Item]
    paraphrases: Sequence[Item] | None = None  # [N], with the prompts of `items`
    wrong: Sequence[Sequence[Item]] | None = None  # [N][K], with the prompts of `items`
    paraphrased_questions: Sequence[Item] | None = None  # [N], other prompts with the answers of `items`
    entities: Sequence[tuple[str, ...]] | None = None  # [N], what a right answer contains; None: not known
    units: Sequence[str] | None = None  # [N], the independent unit of each item; None: each is one of its own
    generate: bool = False  # whether the model also answers freely
    cut: bool = False  # after as many words as the answer has, because the answer is a piece of a longer text
    ascii_only: bool = False  # ROUGE reads a-z and 0-9 only, as the code of TOFU's authors

    @property
    def rephrased(self) -> "Probe | None":
        """The probe whose prompts are the paraphrased questions, with the same answers; None without them."""
        asked = self.paraphrased_questions
        if asked is None:
            return None

        def again(items: Sequence[Item]) -> list[Item]:
            return [replace(item, prompt=other.prompt) for item, other in zip(items, asked, strict=True)]

        columns = zip(*self.wrong, strict=True) if self.wrong else ()  # as many wrong answers to each
        return replace(
            self,
            items=again(self.items),
            paraphrases=self.paraphrases and again(self.paraphrases),
            wrong=self.wrong and [*zip(*map(again, columns), strict=True)],
            paraphrased_questions=None,
        )

    @property
    def choices(self) -> list[list[str]]:
        """[N][1 + K], the paraphrased answer to each question and the wrong ones; empty without both."""
        pairs = zip(self.paraphrases, self.wrong, strict=True) if self.paraphrases and self.wrong else ()
        return [[right.answer, *(item.answer for item in wrong)] for right, wrong in pairs]

    def __post_init__(self) -> None:
        for name in ("paraphrases", "wrong", "paraphrased_questions", "entities", "units"):
            found = getattr(self, name)
            if found is not None and len(found) != len(self.items):
                raise ValueError(f"Probe: found {len(found)} {name}, expected {len(self.items)}, one for each item")
        for item in self.items if self.generate else ():
            if not words(item.answer, ascii_only=self.ascii_only):
                what = f"the answer {item.answer[:60]!r} to {item.prompt[:60]!r} has no"
                wanted, advice = ("letter and no digit", "remove the row")
                if self.ascii_only:
                    wanted, advice = "letter a-z and no digit", "type task=custom, which reads every script"
                raise UsageError(f"{what} {wanted}, which ROUGE needs: {advice}")


@dataclass(frozen=True)
class Task:
    """One unlearning problem: parts to unlearn with, probes to evaluate on, and the rows that the models know."""

    name: str
    source: str
    parts: Mapping[str, Part]
    probes: Mapping[str, Probe]
    target_rows: Sequence[Item]  # prepare trains the target on them
    retrained_rows: Sequence[Item]  # and on these the retrained model
    caption: str  # one sentence for tables: what was forgotten, how many rows
    # probe, probe.field of its answers, "related" or "prefix" -> why there is none
    missing: Mapping[str, str] = field(default_factory=dict)
    related: Sequence[Item] = ()  # rows of the same source as the forgotten ones, in neither training nor any probe
    prefix: Sequence[Item] = ()  # NUM_PREFIX such rows that precede a text in ReCaLL, none of them in `related`
    trained_before: bool = False  # model.path is the target as it is: nothing is trained, not even the retrained model
    scorer: Scorer | None = None  # of the toxicity of free answers
    scored: Sequence[str] = ()  # the probes whose answers it scores
    embedding: Embedding | None = None  # by which answers to paraphrased questions are compared with `Probe.choices`
    unit: str = "item"  # what the units of probes are that have them, in the singular; their names begin with it
    notes: Sequence[str] = ()  # what a user has to know before the work, and a reader of its results
    # metric -> least value of a target that knows the rows; of a metric that the run does not report nothing is said
    learnt: Mapping[str, float] = field(default_factory=lambda: {"forget_probability": 0.5})
    locations: Mapping[Item, str] = field(default_factory=dict)  # of rows that came from files: file and line
    optional: Mapping[Item, str] = field(default_factory=dict)  # of rows that an option adds: what leaves them out
    history: tuple[str, ...] = ("first definition",)  # a line per version of the task: of what its rows and probes are

    def __post_init__(self) -> None:
        for name in (name for probe in self.probes.values() for name in probe.units or ()):
            if not name.startswith(f"{self.unit} "):
                raise ValueError(f"Task: found the unit {name!r}, expected a name that begins with {self.unit!r}")

    @functools.cached_property
    def hashes(self) -> Mapping[str, str]:
        """A content hash of each part and probe: two runs with equal hashes had the same data."""
        named: dict[str, Any] = {
            **{f"part.{name}": part.rows for name, part in self.parts.items()},
            **{f"probe.{name}": probe for name, probe in self.probes.items()},
            "rows.target": self.target_rows,
            "rows.retrained": self.retrained_rows,
        }
        named |= {f"rows.{name}": rows for name, rows in (("related", self.related), ("prefix", self.prefix)) if rows}
        if self.scorer is not None:
            named["scorer"] = [self.scorer.identity(), list(self.scored)]
        if self.embedding is not None:
            named["embedding"] = self.embedding.identity()
        return {name: content_hash(value, default=_content) for name, value in named.items()}

    @property
    def refusals(self) -> list[str]:
        """The sentences that unlearning may teach in place of answers."""
        part = self.parts.get("refusal")
        return list(dict.fromkeys(item.answer for row in part.rows for item in row)) if part else []

    @functools.cached_property
    def _of_prompts(self) -> Mapping[str, str]:
        return {item.prompt: location for item, location in self.locations.items()}

    def location_of(self, item: Item) -> str:
        """How an error message about `item` begins: the file and line of the row that it was made of, if known."""
        location = self.locations.get(item) or self._of_prompts.get(item.prompt)
        return f"{location}: " if location else ""


def is_attacked(probe: str) -> bool:
    """Whether membership attacks read the answers to `probe`: one of ATTACKED, or its rows kept apart for tuning."""
    return probe.removeprefix("validation_") in ATTACKED


def attacked_probes(probes: Iterable[str]) -> list[str]:
    """Those of `probes` whose answers get gradient norms, a backward pass each: members where there are others too."""
    found = [name for name in probes if name in ATTACKED]
    return found if len(found) > 1 else []


def rephrased_probes(probes: Mapping[str, Probe]) -> dict[str, Probe]:
    """Those of `probes` that are asked in other words too, with these questions: no metric reads it of validation."""
    found = {name: probe.rephrased for name, probe in probes.items() if not name.startswith("validation_")}
    return {name: probe for name, probe in found.items() if probe is not None}


NUM_PREFIX = 4  # rows of `Task.prefix`
NUM_WRONG_LABELS = 8  # answers of other items in a row of random_label
MAX_SORTED = 400  # items up to which every row sorts all items by a seed; with more, it draws some
DRAWS = 64


def forget_parts(
    forget: Sequence[Item], refusals: Sequence[str], alternates: Sequence[Sequence[str]] | None = None
) -> dict[str, Part]:
    """The parts that every task makes of the forget rows, with random_label if two answers differ.

    `alternates` are other plausible answers to each of the rows, at least one, of which `alternate` is made.

    A row of `refusal` holds all `refusals`, one of `fixed_refusal` one of them, with the attention mask of the original
    answer, and one of `random_label` answers of other items; both are chosen by the item alone.
    """
    refused = [[replace(item, answer=" " + text if item.raw else text) for text in refusals] for item in forget]
    fixed = [
        [replace(row[seed_of("refusal", item.prompt, item.answer) % len(row)], mask_of=item.answer)]
        for item, row in zip(forget, refused, strict=True)
    ]
    parts = {
        "forget": Part.of(forget),
        "refusal": Part(refused, follows="forget"),
        "fixed_refusal": Part(fixed, follows="forget"),
    }
    labels = [_other_answers(forget, own) for own in forget]
    if all(labels):
        parts["random_label"] = Part(labels, follows="forget")
    if alternates is not None:
        others = [
            [replace(item, answer=text) for text in texts] for item, texts in zip(forget, alternates, strict=True)
        ]
        parts["alternate"] = Part(others, follows="forget")
    return parts


def _other_answers(items: Sequence[Item], own: Item) -> list[Item]:
    """`own` with up to NUM_WRONG_LABELS answers of other items that differ from its own; none if all are the same."""
    seeds = functools.partial(seed_of, "random_label", own.prompt, own.answer)
    if len(items) <= MAX_SORTED:
        order: Iterable[int] = sorted(range(len(items)), key=seeds)
    else:
        order = (seeds(draw) % len(items) for draw in range(DRAWS))
    different = (items[i].answer for i in order if items[i].answer != own.answer)
    return [replace(own, answer=answer) for answer in itertools.islice(different, NUM_WRONG_LABELS)]


def evenly_spaced(rows: Sequence[T], count: int) -> list[T]:
    """`count` of the rows, or all if there are fewer, evenly spaced and in their order."""
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else list(rows)


def validation_split(
    rows: Sequence[T], fraction: float, facts: Sequence[Hashable] | None = None
) -> tuple[list[T], list[T]]:
    """Validation rows and test rows: every (1/fraction)-th fact, evenly spaced, is a validation fact with all its rows.

    `facts` has the fact of each row, which other rows may share; None: every row is one of its own.
    """
    facts = range(len(rows)) if facts is None else facts
    different = list(dict.fromkeys(facts))
    chosen = {different[int((i + 0.5) / fraction)] for i in range(int(len(different) * fraction))} if fraction else ()
    parts: tuple[list[T], list[T]] = ([], [])
    for row, fact in zip(rows, facts, strict=True):
        parts[fact not in chosen].append(row)
    return parts


def without_validation(
    rows: Mapping[str, Sequence[object]], missing: Mapping[str, str], fraction: float
) -> dict[str, str]:
    """The entries of `Task.missing` for validation probes; `rows` has those of forget, retain and holdout.

    There is no such probe unless both forget and retain have validation rows. `missing` may say why no holdout exists.
    """
    none = not (rows["forget"] and rows["retain"])
    reason = f"task.validation_fraction={fraction:g} leaves no rows"
    return {f"validation_{name}": missing.get(name, reason) for name, some in rows.items() if none or not some}


def and_general(questions: Sequence[Item]) -> str:
    """What a caption adds to the retained rows: the general questions that are trained on beside them."""
    return f" and {len(questions)} general questions" if questions else ""


def check_disjoint(forget: Sequence[Item], retain: Sequence[Item]) -> None:
    """Raises UsageError if a row is in both."""
    retained = {(item.prompt, item.answer) for item in retain}
    both = [item for item in forget if (item.prompt, item.answer) in retained]
    if both:
        raise UsageError(
            f"{len(both)} row(s) are in both the forget and the retain set, the first being {both[0].prompt[:60]!r}: "
            f"remove them from one of the two"
        )
