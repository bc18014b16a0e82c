"""TOFU: fictitious authors, some of whom are to be forgotten (Maini et al. 2024, arXiv 2401.06121).

20 questions an author, rows in author order. The forget authors are the last ones, the holdout authors (whom neither
model ever sees) the last of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from soul_exp.data import Item, Part
from soul_exp.errors import UsageError
from soul_exp.ranges import HALF_OR_NULL, INDEX, SOME
from soul_exp.tasks import refusals
from soul_exp.tasks.embedded import corpus
from soul_exp.tasks.sources import hub
from soul_exp.tasks.sources.hub import Row
from soul_exp.tasks.task import Probe, Task, check_disjoint, divided, forget_parts

HUB = "locuslab/TOFU"
ROWS_PER_AUTHOR = 20
PERCENT = {"forget01": 1, "forget05": 5, "forget10": 10}
NUM_PERTURBED_AUTHORS = 20  # real TOFU has perturbed answers for its first and last 20 authors only


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
    """The TOFU task from `source`: "embedded" (made by the project), "hub", or a folder in the hub's layout.

    `num_authors` keeps so many (default: all 200; embedded 24) from both ends, as only those have perturbed answers.
    `num_forget_authors` defaults to the percentage in `split` (embedded: 4), `num_holdout_authors` to 20 when all
    authors are kept, else 2. `validation_fraction` of the forget rows, and as many retain rows, are probed apart, for
    tuning (default: embedded 0.25, else 0). `train_general` puts the general questions into both models' training.
    """
    made = source == "embedded"
    full: Sequence[Row]
    perturbed_first: Sequence[Row]
    perturbed_last: Sequence[Row]
    general: Mapping[str, Sequence[Row]]
    if made:
        total = num_authors if num_authors is not None else 24
        full = corpus.authors(total)
        perturbed_first = perturbed_last = full
        general = {"authors": corpus.general_authors(), "facts": corpus.general_facts()}
    else:
        full = _read(source, "full", revision, ("question", "answer"))
        wanted = ("question", "answer", "paraphrased_answer", "perturbed_answer")
        perturbed_first = _read(source, "retain_perturbed", revision, wanted)
        perturbed_last = _read(source, "forget10_perturbed", revision, wanted)
        total = num_authors if num_authors is not None else len(full) // ROWS_PER_AUTHOR
        general = {
            name: _read(source, config, revision, ("question", "answer", "perturbed_answer"))
            for name, config in (("authors", "real_authors_perturbed"), ("facts", "world_facts_perturbed"))
        }
    if split not in PERCENT:
        raise UsageError(f"task.split={split} is unknown: choose one of {', '.join(PERCENT)}")
    if made and split != "forget10":
        raise UsageError(f"task.split={split} is a split of real TOFU: on embedded data give task.num_forget_authors")
    num_forget = num_forget_authors or (4 if made else max(1, total * PERCENT[split] // 100))
    num_holdout = num_holdout_authors
    if num_holdout is None:
        num_holdout = 2 if made or total < len(full) // ROWS_PER_AUTHOR else 20
    num_retain = total - num_forget - num_holdout
    if num_retain < 1 or total * ROWS_PER_AUTHOR > len(full):
        raise UsageError(
            f"task.num_authors={total} of {len(full) // ROWS_PER_AUTHOR} with {num_forget} to forget and {num_holdout} "
            f"held out leaves {num_retain} to retain: change task.num_authors or task.num_holdout_authors"
        )
    if not made and num_forget > NUM_PERTURBED_AUTHORS:
        raise UsageError(f"{num_forget} forget authors, but perturbed answers exist for {NUM_PERTURBED_AUTHORS} only")

    retain = full[: num_retain * ROWS_PER_AUTHOR]
    holdout = full[num_retain * ROWS_PER_AUTHOR : (num_retain + num_holdout) * ROWS_PER_AUTHOR]
    forget = perturbed_last[-num_forget * ROWS_PER_AUTHOR :]
    _check_aligned(source, "forget10_perturbed", forget, full[-num_forget * ROWS_PER_AUTHOR :])

    fraction = validation_fraction if validation_fraction is not None else (0.25 if made else 0.0)
    tune_forget, test_forget = divided(forget, fraction)
    probed = perturbed_first[: min(len(retain), NUM_PERTURBED_AUTHORS * ROWS_PER_AUTHOR)]
    _check_aligned(source, "retain_perturbed", probed, full[: len(probed)])
    tune_retain, test_retain = divided(probed, fraction)
    if made:  # enough rows for every metric, few enough for two cores
        tune_retain, test_retain = tune_retain[:: max(1, len(tune_retain) // 20)], test_retain[::3]

    probes = {
        "forget": _probe(test_forget),
        "retain": _probe(test_retain),
        "authors": _probe(general["authors"]),
        "facts": _probe(general["facts"]),
    }
    missing = {}
    if holdout:
        probes["holdout"] = Probe(_items(holdout))
    else:
        missing["holdout"] = "task.num_holdout_authors=0 leaves nobody unseen"
    if not tune_forget:
        missing |= dict.fromkeys(
            ("validation_forget", "validation_retain"), "task.validation_fraction=0 leaves no rows"
        )
    else:
        probes |= {"validation_forget": _probe(tune_forget), "validation_retain": _probe(tune_retain)}

    forget_items, retain_items = _items(forget), _items(retain)
    check_disjoint(forget_items, retain_items)
    questions = _items(general["authors"]) + _items(general["facts"]) if train_general else []
    common = retain_items + questions
    trained = f", which include {len(questions)} general questions" if questions else ""
    return Task(
        name="tofu",
        source=source,
        parts={
            **forget_parts(forget_items, refusals.QUESTIONS),
            "retain": Part.of(retain_items),
        },
        probes=probes,
        target_rows=forget_items + common,
        retrained_rows=common,
        caption=(
            f"TOFU ({Path(source).name}): {num_forget} of {total} authors forgotten, {num_retain} retained, "
            f"{num_holdout} held out of both trainings{trained}"
        ),
        missing=missing,
    )


def _items(rows: Sequence[Row]) -> list[Item]:
    return [Item(row["question"], row["answer"]) for row in rows]


def _probe(rows: Sequence[Row]) -> Probe:
    paraphrased = "paraphrased_answer" in rows[0]
    return Probe(
        items=_items(rows),
        paraphrases=[Item(row["question"], row["paraphrased_answer"]) for row in rows] if paraphrased else None,
        wrong=[[Item(row["question"], text) for text in row["perturbed_answer"]] for row in rows],
        generate=True,
    )


def _read(source: str, config: str, revision: str | None, columns: Sequence[str]) -> list[Row]:
    """The rows of one configuration, each column a string (perturbed_answer: a list of strings)."""
    if source != "hub" and not Path(source).is_dir():
        raise UsageError(f"task.source={source} is not a folder: give embedded, hub, or a folder in TOFU's layout")
    rows = hub.read(
        HUB if source == "hub" else source, config, columns, revision=revision,
        option="task.source=hub" if source == "hub" else "task.source",
        advice="give task.source=<folder with its files> or task.source=embedded",
    )  # fmt: skip
    if not rows:
        raise UsageError(f"task.source={source}: {config} has no rows")
    for number, row in enumerate(rows, start=1):
        for column in columns:
            texts = row[column] if column == "perturbed_answer" else [row[column]]
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                expected = "a list of texts" if column == "perturbed_answer" else "a text"
                raise UsageError(
                    f"task.source={source}: {config}, row {number}: {column} is {row[column]!r}, expected {expected}"
                )
        if "perturbed_answer" in columns and len(row["perturbed_answer"]) != len(rows[0]["perturbed_answer"]):
            raise UsageError(
                f"task.source={source}: {config}, row {number}: {len(row['perturbed_answer'])} perturbed answers, "
                f"expected {len(rows[0]['perturbed_answer'])} as in row 1"
            )
    return rows


def _check_aligned(source: str, name: str, perturbed: Sequence[Row], full: Sequence[Row]) -> None:
    for number, (a, b) in enumerate(zip(perturbed, full, strict=True), start=1):
        if a["question"] != b["question"]:
            raise UsageError(
                f"task.source={source}: row {number} of those used asks {a['question'][:50]!r} in {name} but "
                f"{b['question'][:50]!r} in full: expected the same rows in the same order"
            )
