"""TOFU: fictitious authors, some of whom are to be forgotten (Maini et al. 2024, arXiv 2401.06121).

20 rows per author, in author order. Forgotten are the last authors; in no training (holdout) the last of the others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from soul_exp.data import Item, Part
from soul_exp.errors import UsageError
from soul_exp.ranges import HALF_OR_NULL, INDEX, SOME
from soul_exp.tasks import refusals
from soul_exp.tasks.embedded import corpus
from soul_exp.tasks.sources.records import Record, hub_rows
from soul_exp.tasks.task import (
    Probe,
    Task,
    check_disjoint,
    evenly_spaced,
    forget_parts,
    no_validation,
    validation_split,
)

HUB = "locuslab/TOFU"
NUM_AUTHORS, ROWS_PER_AUTHOR = 200, 20
PERCENT = {"forget01": 1, "forget05": 5, "forget10": 10}
NUM_PERTURBED_AUTHORS = 20  # real TOFU has perturbed answers for its first and last 20 authors only
TABLES = (  # the configurations of real TOFU, each with its columns beside question and answer
    ("full",),  # all authors in order
    ("retain_perturbed", "paraphrased_answer", "perturbed_answer"),  # from the first author on
    ("forget10_perturbed", "paraphrased_answer", "perturbed_answer"),  # up to the last author
    ("real_authors_perturbed", "perturbed_answer"),
    ("world_facts_perturbed", "perturbed_answer"),
)


def tofu(
    source: str = "embedded",
    *,
    revision: str | None = None,
    split: str = "forget10",
    num_authors: Annotated[int | None, SOME] = None,
    num_forget_authors: Annotated[int | None, SOME] = None,
    num_holdout_authors: Annotated[int | None, INDEX] = None,
    validation_fraction: Annotated[float | None, HALF_OR_NULL] = None,
    train_general: bool = True,
) -> Task:
    """The TOFU task from `source`: "embedded" (generated), "hub", or a folder in the hub's layout.

    `num_authors` keeps so many (default: all 200; embedded 24) from both ends, as only those have perturbed answers.
    `num_forget_authors` defaults to the percentage in `split` (embedded: 4), `num_holdout_authors` to 20 when all
    authors are kept, else 2. `validation_fraction` of the forget rows, and as many retain rows, are separate probes,
    for tuning (default: embedded 0.25, else 0); embedded, they ask for no fact that a test row asks for too.
    `train_general` adds the general questions to both models' training.
    """
    embedded = source == "embedded"
    if split not in PERCENT:
        raise UsageError(f"task.split={split} is unknown: choose one of {', '.join(PERCENT)}")
    if embedded and split != "forget10":
        raise UsageError(f"task.split={split} is a split of real TOFU: on embedded data give task.num_forget_authors")
    if embedded:
        generated = corpus.authors(num_authors or 24)
        tables: list[Sequence[Record]] = [*[generated] * 3, corpus.general_authors(), corpus.general_facts()]
    else:
        tables = [_read(source, revision, *table) for table in TABLES]
    full, retain_perturbed, forget_perturbed, authors, facts = tables
    available = len(full) // ROWS_PER_AUTHOR
    total = num_authors or available
    num_forget = num_forget_authors or (4 if embedded else max(1, total * PERCENT[split] // 100))
    usual_holdout = 2 if embedded or total < available else 20
    num_holdout = num_holdout_authors if num_holdout_authors is not None else usual_holdout
    num_retain, num_perturbed = total - num_forget - num_holdout, available if embedded else NUM_PERTURBED_AUTHORS
    if num_retain < 1 or total > available:
        raise UsageError(
            f"task.num_authors={total} of {available} with {num_forget} to forget and {num_holdout} held out leaves "
            f"{num_retain} to retain: change task.num_authors or task.num_holdout_authors"
        )
    if num_forget > num_perturbed:
        raise UsageError(
            f"task.num_forget_authors={num_forget}: expected at most {num_perturbed}, which have perturbed answers"
        )

    retain = full[: num_retain * ROWS_PER_AUTHOR]
    holdout = _numbered(full[len(retain) : len(retain) + num_holdout * ROWS_PER_AUTHOR])
    forget = _numbered(forget_perturbed[-num_forget * ROWS_PER_AUTHOR :])
    probed = _numbered(retain_perturbed[: min(len(retain), NUM_PERTURBED_AUTHORS * ROWS_PER_AUTHOR)])
    _check_aligned(source, "forget10_perturbed", forget, full[-num_forget * ROWS_PER_AUTHOR :])
    _check_aligned(source, "retain_perturbed", probed, full[: len(probed)])
    fraction = validation_fraction if validation_fraction is not None else (0.25 if embedded else 0.0)
    if embedded:
        tune_forget, test_forget = validation_split(forget, fraction, list(map(corpus.fact_of, range(len(forget)))))
        tune_retain, test_retain = _embedded_retain(probed, fraction)
    else:
        tune_forget, test_forget = validation_split(forget, fraction)
        tune_retain, test_retain = validation_split(probed, fraction)

    tested = {"forget": test_forget, "retain": test_retain, "authors": authors, "facts": facts}
    probes = {name: _probe(rows) for name, rows in tested.items()}
    missing = {}
    if holdout:
        probes["holdout"] = Probe(_items(holdout), units=_authors(holdout))
    else:
        missing["holdout"] = "task.num_holdout_authors=0 leaves no author unseen"
    if tune_forget and tune_retain:
        probes |= {"validation_forget": _probe(tune_forget), "validation_retain": _probe(tune_retain)}
    else:
        missing |= no_validation(fraction)

    forget_items, retain_items = _items(forget), _items(retain)
    check_disjoint(forget_items, retain_items)
    questions = _items([*authors, *facts]) if train_general else []
    common = retain_items + questions
    trained = f", which include {len(questions)} general questions" if questions else ""
    return Task(
        name="tofu",
        source=source,
        parts={**forget_parts(forget_items, refusals.QUESTIONS), "retain": Part.of(retain_items)},
        probes=probes,
        target_rows=forget_items + common,
        retrained_rows=common,
        caption=(
            f"TOFU ({Path(source).name}): {num_forget} of {total} authors forgotten, {num_retain} retained, "
            f"{num_holdout or 'none'} held out of both trainings{trained}"
        ),
        missing=missing,
        unit="author",
    )


def _numbered(rows: Sequence[Record]) -> list[Record]:
    """The rows of whole authors, each with the number of its author, from 1."""
    return [{**row, "author": 1 + number // ROWS_PER_AUTHOR} for number, row in enumerate(rows)]


def _authors(rows: Sequence[Record]) -> list[str] | None:
    return [f"author {row['author']}" for row in rows] if "author" in rows[0] else None


def _embedded_retain(rows: Sequence[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Validation rows and test rows without a common fact: enough for every metric, few enough for two cores."""
    tune, test = (part[::3] for part in validation_split(range(len(rows)), fraction))
    tested = set(map(corpus.fact_of, test))
    untested = [row for row in range(len(rows)) if corpus.fact_of(row) not in tested]
    return [rows[row] for row in evenly_spaced(untested, min(20, len(tune)))], [rows[row] for row in test]


def _items(rows: Sequence[Record]) -> list[Item]:
    return [Item(row["question"], row["answer"]) for row in rows]


def _probe(rows: Sequence[Record]) -> Probe:
    paraphrased = "paraphrased_answer" in rows[0]
    return Probe(
        items=_items(rows),
        paraphrases=[Item(row["question"], row["paraphrased_answer"]) for row in rows] if paraphrased else None,
        wrong=[[Item(row["question"], text) for text in row["perturbed_answer"]] for row in rows],
        generate=True,
        ascii_only=True,  # 321 of real TOFU's 4,217 answers have other letters, and so other words if these were read
        units=_authors(rows),
    )


def _read(source: str, revision: str | None, config: str, *others: str) -> list[Record]:
    """Question, answer and the `others` of one configuration, each a string (perturbed_answer: a list of strings)."""
    where, columns = f"task.source={source}", ("question", "answer", *others)
    if source != "hub" and not Path(source).is_dir():
        raise UsageError(f"{where} is not a folder: give embedded, hub, or a folder in TOFU's layout")
    rows = hub_rows(
        HUB if source == "hub" else source, config, columns, revision=revision, where=where,
        advice="give task.source=<folder with its files> or task.source=embedded",
    )  # fmt: skip
    if not rows:
        raise UsageError(f"{where}: {config} has no rows")
    for number, row in enumerate(rows, start=1):
        for column in columns:
            several = column == "perturbed_answer"
            texts = row[column] if several else [row[column]]
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise UsageError(
                    f"{where}: {config}, row {number}: {column} is {row[column]!r}, expected "
                    f"{'a list of texts' if several else 'a text'}"
                )
            if several and len(texts) != len(rows[0][column]):
                raise UsageError(
                    f"{where}: {config}, row {number}: {len(texts)} perturbed answers, expected "
                    f"{len(rows[0][column])} as in row 1"
                )
    return rows


def _check_aligned(source: str, name: str, perturbed: Sequence[Record], full: Sequence[Record]) -> None:
    for number, (a, b) in enumerate(zip(perturbed, full, strict=True), start=1):
        if a["question"] != b["question"]:
            raise UsageError(
                f"task.source={source}: the question of row {number} is {a['question'][:50]!r} in {name} but "
                f"{b['question'][:50]!r} in full: expected the same rows in the same order"
            )
