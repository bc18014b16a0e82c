"""TOFU: fictitious authors, some of whom are to be forgotten (Maini et al. 2024, arXiv 2401.06121).

20 rows per author, in author order. Forgotten are the last authors; in no training (holdout) the last of the others.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from soul_exp.data import Item, Part
from soul_exp.errors import UsageError
from soul_exp.metrics.answers import REPHRASED
from soul_exp.ranges import FILLED_OR_NULL, HALF, HALF_OR_NULL, INDEX, SOME
from soul_exp.tasks import refusals
from soul_exp.tasks.embedded import corpus, wrappers
from soul_exp.tasks.embeddings import MINILM, make_embedding
from soul_exp.tasks.embeddings import OWN as NGRAMS
from soul_exp.tasks.sources.records import Record, hub_rows
from soul_exp.tasks.task import (
    NUM_PREFIX,
    Probe,
    Task,
    check_disjoint,
    evenly_spaced,
    forget_parts,
    rephrased_probes,
    validation_split,
    without_validation,
)

HUB = "locuslab/TOFU"
NUM_AUTHORS, ROWS_PER_AUTHOR = 200, 20
PERCENT = {"forget01": 1, "forget05": 5, "forget10": 10}
NUM_PERTURBED_AUTHORS = 20  # real TOFU has perturbed answers for its first and last 20 authors only
NUM_EMBEDDED_AUTHORS, NUM_RELATED_AUTHORS = 48, 4
OTHERS = ("paraphrased_answer", "perturbed_answer")
OPTIONAL = "paraphrased_question"
TABLES = (  # the configurations of real TOFU, each with its columns beside question and answer
    ("full",),  # all authors in order
    ("retain_perturbed", *OTHERS),  # from the first author on
    ("forget10_perturbed", *OTHERS),  # up to the last author
    ("real_authors_perturbed", "perturbed_answer"),
    ("world_facts_perturbed", "perturbed_answer"),
)


@dataclass(frozen=True)
class Row:
    """A row, the number of its author, and its fact, which embedded rows share in pairs."""

    record: Record
    author: int
    fact: Hashable


def tofu(
    source: str = "embedded",
    *,
    revision: str | None = None,
    split: str = "forget10",
    num_authors: Annotated[int | None, SOME] = None,
    num_forget_authors: Annotated[int | None, SOME] = None,
    num_holdout_authors: Annotated[int | None, INDEX] = None,
    num_related_authors: Annotated[int | None, INDEX] = None,
    validation_fraction: Annotated[float | None, HALF_OR_NULL] = None,
    general_validation_fraction: Annotated[float, HALF] = 0.0,
    train_general: bool = True,
    train_varied: bool = False,
    embedding: Annotated[str | None, FILLED_OR_NULL] = None,
    embedding_revision: str | None = None,
) -> Task:
    """The TOFU task from `source`: "embedded" (generated), "hub", or a folder in the hub's layout.

    `num_authors` keeps so many (default: all 200; embedded 48) from both ends, as only those have perturbed answers.
    `num_forget_authors` defaults to the percentage in `split` (embedded: a quarter), `num_holdout_authors` to 20 when
    all authors are kept, else to a fifth (embedded: a third). `num_related_authors` (default: 4, or as many as there
    are) are none of `num_authors`: `related` has their rows, and `prefix` some of one more author.

    `validation_fraction` of the forgotten facts, of the retained ones and of the held-out authors are separate probes,
    for tuning (default: embedded 0.25, else 0). Real TOFU does not say which rows ask for one fact: each has its own.
    So are `general_validation_fraction` of the general questions, on other authors and on facts, by item: what a rule
    that selects a model may know of its general knowledge. They leave the probes `authors` and `facts`.
    `train_general` adds the general questions to both models' training and to what unlearning retains, `train_varied`
    more prompts of each row (`wrappers.varied`) to the training, whose solved examples are retained rows: the retrained
    model has all but the forget rows'.
    By `embedding` ("ngrams", or a folder or hub name of sentence-transformers; default: the SOUL release's for the
    hub's data, else "ngrams") answers to paraphrased questions are compared with the right and the wrong ones.
    """
    embedded = source == "embedded"
    if split not in PERCENT:
        raise UsageError(f"task.split={split} is unknown: choose one of {', '.join(PERCENT)}")
    if embedded and split != "forget10":
        raise UsageError(f"task.split={split} is a split of real TOFU: on embedded data give task.num_forget_authors")
    num_related = num_related_authors
    if embedded:
        total = available = num_authors or NUM_EMBEDDED_AUTHORS
        num_related = NUM_RELATED_AUTHORS if num_related is None else num_related
        generated = corpus.authors(total + num_related + 1)
        tables: list[Sequence[Record]] = [generated, *[generated[: total * ROWS_PER_AUTHOR]] * 2]
        tables += [corpus.general_authors(), corpus.general_facts()]
    else:
        tables = [_read(source, revision, *table) for table in TABLES]
        available = len(tables[0]) // ROWS_PER_AUTHOR
        total = num_authors or available
    full, retain_perturbed, forget_perturbed, authors, facts = tables
    num_forget = num_forget_authors or max(1, total // 4 if embedded else total * PERCENT[split] // 100)
    usual_holdout = max(1, total // 3) if embedded else 20 if total == available else max(1, total // 5)
    num_holdout = num_holdout_authors if num_holdout_authors is not None else usual_holdout
    num_retain, num_perturbed = total - num_forget - num_holdout, len(forget_perturbed) // ROWS_PER_AUTHOR
    if num_retain < 1 or total > available:
        raise UsageError(
            f"task.num_authors={total} of {available} with {num_forget} to forget and {num_holdout} held out leaves "
            f"{num_retain} to retain: change task.num_authors or task.num_holdout_authors"
        )
    if num_forget > num_perturbed:
        raise UsageError(
            f"task.num_forget_authors={num_forget}: expected at most {num_perturbed}, which have perturbed answers"
        )
    num_others = len(full) // ROWS_PER_AUTHOR - total
    if num_related is None:
        num_related = min(NUM_RELATED_AUTHORS, max(0, num_others - 1))
    if num_related and num_related + 1 > num_others:
        raise UsageError(
            f"task.num_related_authors={num_related}: task.num_authors={total} leaves {num_others} of {available} "
            f"authors, expected {num_related + 1}, as the prefix of ReCaLL is of one more: lower task.num_authors"
        )

    def rows(table: Sequence[Record], first: int, count: int) -> list[Row]:
        """Those of `count` authors; the first row of `table` is that of author number `first`."""
        facts = corpus.FACTS_PER_AUTHOR if embedded else ROWS_PER_AUTHOR
        numbered = ((first + i // ROWS_PER_AUTHOR, i % facts, table[i]) for i in range(count * ROWS_PER_AUTHOR))
        return [Row(record, author, (author, fact)) for author, fact, record in numbered]

    def authors_from(first: int, count: int) -> list[Row]:
        return rows(full[first * ROWS_PER_AUTHOR :], first, count)

    first_forget = available - num_forget
    retain, holdout = authors_from(0, num_retain), authors_from(num_retain, num_holdout)
    forget = rows(forget_perturbed[-num_forget * ROWS_PER_AUTHOR :], first_forget, num_forget)
    num_probed = min(num_retain, NUM_PERTURBED_AUTHORS, len(retain_perturbed) // ROWS_PER_AUTHOR)
    probed = rows(retain_perturbed, 0, num_probed)
    _check_aligned(source, "forget10_perturbed", forget, authors_from(first_forget, num_forget))
    _check_aligned(source, "retain_perturbed", probed, retain[: len(probed)])
    first_other = total if embedded else num_retain + num_holdout
    related, spare = (
        authors_from(first_other, num_related),
        authors_from(first_other + num_related, min(1, num_related)),
    )

    fraction = validation_fraction if validation_fraction is not None else (0.25 if embedded else 0.0)
    tune_forget, test_forget = _split(forget, fraction)
    tune_retain, test_retain = _split(probed, fraction)
    tune_holdout, test_holdout = validation_split(holdout, fraction, [row.author for row in holdout])
    if embedded:
        tune_retain, test_retain = _every_third_fact(tune_retain), _every_third_fact(test_retain)
    probes = {"forget": _probe(test_forget), "retain": _probe(test_retain)}
    missing, tune_general = {}, {}
    for name, table in (("authors", authors), ("facts", facts)):
        tune_general[name], tested = validation_split(table, general_validation_fraction)
        probes[name] = _general(tested)
    if holdout:
        probes["holdout"] = _likelihoods(test_holdout)
    else:
        missing["holdout"] = "task.num_holdout_authors=0 leaves no author unseen"
    if not num_related:
        why = f"task.num_related_authors=0: task.num_authors={total} of {available} leaves {num_others} others"
        missing |= dict.fromkeys(("related", "prefix"), why)
    for name, file in (("forget", TABLES[2][0]), ("retain", TABLES[1][0])):
        if probes[name].paraphrased_questions is None:
            why = f"{file} of task.source={source} has no column {OPTIONAL}"
            missing |= {f"{name}.{field}": why for field in REPHRASED}
    tuned = {"forget": tune_forget, "retain": tune_retain, "holdout": tune_holdout}
    missing |= without_validation(tuned, missing, fraction)
    for name, chosen in tuned.items():
        if f"validation_{name}" not in missing:
            probes[f"validation_{name}"] = _likelihoods(chosen) if name == "holdout" else _probe(chosen)
    for name, questioned in tune_general.items():
        if questioned:
            probes[f"validation_{name}"] = _general(questioned)
        else:
            missing[f"validation_{name}"] = (
                f"task.general_validation_fraction={general_validation_fraction:g} leaves no rows"
            )

    forget_items, retain_items = _items(forget), _items(retain)
    check_disjoint(forget_items, retain_items)
    questions = [Item(row["question"], row["answer"]) for row in (*authors, *facts)] if train_general else []
    common, wordings = retain_items + questions, [*_wordings(retain), *([question] for question in questions)]
    # the draws go from row to row, so that both models read the same prompts of the rows that both know
    taught = [
        wrappers.varied(rows, retain_items) if train_varied else [] for rows in (wordings, wordings + _wordings(forget))
    ]
    chosen_by = embedding or (MINILM if source == "hub" else NGRAMS)
    by = make_embedding(chosen_by, embedding_revision) if rephrased_probes(probes) else None
    measured = f"; accuracy on forget and retain by {by.title}" if by is not None else ""
    trained = f", which include {len(questions)} general questions" if questions else ""
    plain = {*forget_items, *common}
    return Task(
        name="tofu",
        source=source,
        parts={
            **forget_parts(forget_items, refusals.QUESTIONS, _alternates(forget, retain) if embedded else None),
            "retain": Part.of(common),
        },
        probes=probes,
        target_rows=forget_items + common + taught[1],
        retrained_rows=common + taught[0],
        caption=(
            f"TOFU ({Path(source).name}): {num_forget} of {total} authors forgotten, {num_retain} retained, "
            f"{num_holdout or 'none'} held out of both trainings{trained}{measured}"
        ),
        embedding=by,
        missing=missing,
        related=_items(related),
        prefix=_items(evenly_spaced(spare[: corpus.FACTS_PER_AUTHOR], NUM_PREFIX)),
        unit="author",
        history=("first definition", "general questions that are taught are among the rows to keep"),
        optional={item: "task.train_varied=false" for item in taught[1] if item not in plain},
    )


def _split(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    return validation_split(rows, fraction, [row.fact for row in rows])


def _every_third_fact(rows: Sequence[Row]) -> list[Row]:
    """Enough for every metric, few enough for two cores."""
    chosen = list(dict.fromkeys(row.fact for row in rows))[::3]
    return [row for row in rows if row.fact in chosen]


def _items(rows: Sequence[Row], question: str = "question", answer: str = "answer") -> list[Item]:
    return [Item(row.record[question], row.record[answer]) for row in rows]


def _alternates(forget: Sequence[Row], retain: Sequence[Row]) -> list[list[str]]:
    """The answers to each forget row with the values that retained authors have in place of its own."""
    values: dict[str, dict[str, None]] = {}  # attribute -> values, each once
    for row in retain:
        values.setdefault(row.record["attribute"], {})[row.record["entities"][0]] = None
    return [
        [row.record["answer"].replace(row.record["entities"][0], value) for value in values[row.record["attribute"]]]
        for row in forget
    ]


def _wordings(rows: Sequence[Row]) -> list[list[Item]]:
    """The item of each row, and those with its other questions, where it has any."""
    found = zip(rows, _items(rows), strict=True)
    return [
        [item, *(replace(item, prompt=other) for other in row.record.get("other_questions", ()))] for row, item in found
    ]


def _wrong(records: Sequence[Record]) -> list[list[Item]]:
    return [[Item(record["question"], text) for text in record["perturbed_answer"]] for record in records]


def _entities(records: Sequence[Record]) -> list[tuple[str, ...]] | None:
    return [record["entities"] for record in records] if all("entities" in record for record in records) else None


def _probe(rows: Sequence[Row]) -> Probe:
    records = [row.record for row in rows]
    return Probe(
        items=_items(rows),
        paraphrases=_items(rows, answer="paraphrased_answer"),
        wrong=_wrong(records),
        paraphrased_questions=_items(rows, question=OPTIONAL) if all(OPTIONAL in each for each in records) else None,
        entities=_entities(records),
        units=[f"author {row.author}" for row in rows],
        generate=True,
        ascii_only=True,  # 321 of real TOFU's 4,217 answers have other letters, and so other words if these were read
    )


def _general(records: Sequence[Record]) -> Probe:
    return Probe(
        items=[Item(record["question"], record["answer"]) for record in records],
        wrong=_wrong(records),
        entities=_entities(records),
        generate=True,
        ascii_only=True,
    )


def _likelihoods(rows: Sequence[Row]) -> Probe:
    entities, units = _entities([row.record for row in rows]), [f"author {row.author}" for row in rows]
    return Probe(_items(rows), entities=entities, units=units)


def _read(source: str, revision: str | None, config: str, *others: str) -> list[Record]:
    """Question, answer and the `others` of one configuration, each a string (perturbed_answer: a list of strings).

    And the column OPTIONAL, where there is one.
    """
    where, columns = f"task.source={source}", ("question", "answer", *others)
    if source != "hub" and not Path(source).is_dir():
        raise UsageError(f"{where} is not a folder: give embedded, hub, or a folder in TOFU's layout")
    rows = hub_rows(
        HUB if source == "hub" else source, config, columns, revision=revision, where=where,
        optional=[OPTIONAL], advice="give task.source=<folder with its files> or task.source=embedded",
    )  # fmt: skip
    if not rows:
        raise UsageError(f"{where}: {config} has no rows")
    columns = tuple(name for name in (*columns, OPTIONAL) if name in rows[0])
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


def _check_aligned(source: str, name: str, perturbed: Sequence[Row], full: Sequence[Row]) -> None:
    for number, (a, b) in enumerate(zip(perturbed, full, strict=True), start=1):
        if a.record["question"] != b.record["question"]:
            raise UsageError(
                f"task.source={source}: the question of row {number} is {a.record['question'][:50]!r} in {name} but "
                f"{b.record['question'][:50]!r} in full: expected the same rows in the same order"
            )
