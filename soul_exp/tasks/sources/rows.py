"""A user's rows, checked one by one: a prompt with its answer and perhaps other answers, or a text to be divided."""

import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soul_exp.data import Item
from soul_exp.errors import UsageError, short
from soul_exp.metrics.text import spans
from soul_exp.tasks.sources.records import (
    Records,
    check_file,
    csv_rows,
    hub_rows,
    json_rows,
    listed,
    numbered,
    parquet_rows,
)

OTHERS = ("paraphrased_answer", "perturbed_answer", "alternate_answer")  # which every row has, or none
FIELDS = ("prompt", "answer", "text", *OTHERS)
KINDS = (("prompt", "answer"), ("text",))  # the fields of a row, one kind or the other
HUB, SUFFIXES = "hub:", (".jsonl", ".json", ".csv", ".tsv", ".parquet")
FILE = "give a file, or hub:NAME for a dataset of the hub or a folder in its layout"

Names = Mapping[str, str | None]  # field -> its name in a file; None: not read


@dataclass(frozen=True)
class Columns:
    """Where a file has each field; `option` is what the user types to say so for this file alone."""

    names: Names
    option: str

    @property
    def expected(self) -> str:
        """The columns that a row needs, in the file's own names."""
        kinds = [[self.names[field] for field in kind] for kind in KINDS]
        return "expected " + ", or ".join(listed(kind, " and ") for kind in kinds if None not in kind)

    @property
    def advice(self) -> str:
        return f"rename them or type '{self.option}={{prompt: NAME, answer: NAME}}'"


def columns_of(option: str, common: Any, own: Any) -> Columns:
    """The columns of the file that `option` names (task.forget): the `common` ones of all files, but for its `own`.

    Raises UsageError for what is no mapping of FIELDS to different names, or leaves no kind of row to be read.
    """
    names: dict[str, str | None] = {field: field for field in FIELDS}
    for key, given in (("task.columns", common), (f"{option}_columns", own)):
        if not isinstance(given, Mapping | None):
            raise UsageError(f"{key}={given}: expected names of columns, such as {key}={{prompt: question}}")
        for field, name in (given or {}).items():
            if field not in FIELDS:
                raise UsageError(f"{key}.{field} is unknown: choose {', '.join(FIELDS)}")
            if name is not None and (not isinstance(name, str) or not name):
                raise UsageError(f"{key}.{field}={name!r}: expected the name of a column, or null")
            names[field] = name
    key = f"{option}_columns" if own else "task.columns"
    for one, other in itertools.combinations(FIELDS, 2):
        if names[one] is not None and names[one] == names[other]:
            raise UsageError(
                f"{key}: {one} and {other} are both the column {names[one]}: name another, or map one of them to null"
            )
    if all(any(names[field] is None for field in kind) for kind in KINDS):
        raise UsageError(f"{key}: no row can be read, expected the names of prompt and answer, or of text, not null")
    return Columns(names, f"{option}_columns")


@dataclass(frozen=True)
class Row:
    """One row and its location in its file."""

    item: Item
    location: str  # "line 7" of a text file, "row 7" of a table
    paraphrase: str | None = None
    wrong: tuple[str, ...] | None = None  # K wrong answers, to be measured
    alternates: tuple[str, ...] | None = None  # any number of other plausible answers, to be learnt in its place

    @property
    def texts(self) -> list[Item]:
        """The row itself, and its other answers."""
        others = [
            *(() if self.paraphrase is None else (self.paraphrase,)),
            *(self.wrong or ()),
            *(self.alternates or ()),
        ]
        return [self.item, *(Item(self.item.prompt, answer) for answer in others)]


@dataclass(frozen=True)
class Rows:
    """All rows of one file or dataset, in its order; `name` is what the user typed: task.forget=a.jsonl."""

    name: str
    rows: Sequence[Row]

    @property
    def items(self) -> list[Item]:
        return [row.item for row in self.rows]

    def without(self, locations: set[str]) -> "Rows":
        return Rows(self.name, [row for row in self.rows if row.location not in locations])


def read(source: str, option: str, *, columns: Columns, revision: str | None, lead_words: int | None) -> Rows:
    """The rows of a file, or of `hub:owner/name[:split]` or `hub:owner/name:configuration:split`.

    The first `lead_words` words of a text are its prompt (None: a third). Every row or none has a paraphrased answer,
    likewise K wrong ones, and alternate ones. Raises UsageError, which begins with `option`, if there are no rows or
    one is malformed.
    """
    where = f"{option}={source}"
    rows = [
        _row(record, columns, f"{where}, {location}", location, lead_words)
        for location, record in _records(source, where, columns, revision)
    ]
    if not rows:
        raise UsageError(f"{where} has no rows: {columns.expected} in each")
    _check_uniform(rows, where)
    return Rows(where, rows)


def _records(source: str, where: str, columns: Columns, revision: str | None) -> Records:
    check = functools.partial(_check_columns, columns=columns, where=where)
    if source.startswith(HUB):
        name, *rest = source.removeprefix(HUB).split(":")
        if not name or len(rest) > 2 or not all(rest):
            raise UsageError(f"{where}: expected hub:owner/name[:split] or hub:owner/name:configuration:split")
        name = os.path.expanduser(name)
        config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else None)
        advice = f"give a file, or choose with {HUB}{name}:CONFIGURATION:SPLIT"
        table = hub_rows(name, config, None, where=where, revision=revision, split=split, advice=advice)
        if table:
            check(list(table[0]))
        return numbered(table)
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES and not path.is_dir():
        raise UsageError(
            f"{where}: found the suffix {path.suffix!r}, expected {', '.join(SUFFIXES)}, or hub:owner/name"
        )
    check_file(path, where, FILE)
    if suffix in (".csv", ".tsv"):
        return csv_rows(path, where, check)
    return parquet_rows(path, where, check, columns.names.values()) if suffix == ".parquet" else json_rows(path, where)


def _check_columns(found: Sequence[str], columns: Columns, where: str) -> None:
    twice = [name for name in columns.names.values() if name is not None and list(found).count(name) > 1]
    if twice:
        raise UsageError(f"{where}: found the column {twice[0]} twice in the header, expected it once")
    if not any(all(columns.names[field] in found for field in kind) for kind in KINDS):
        raise UsageError(f"{where}: found the columns {listed(found)}, {columns.expected}: {columns.advice}")


def distinct(table: Rows, notes: list[str]) -> Rows:
    """`table` without rows that repeat an earlier one exactly, which is noted."""
    first: dict[object, str] = {}
    repeats = {}
    for row in table.rows:
        before = first.setdefault((row.item, row.paraphrase, row.wrong, row.alternates), row.location)
        if before != row.location:
            repeats[row.location] = before
    if not repeats:
        return table
    repeat, verb = ("1 row repeats", "is") if len(repeats) == 1 else (f"{len(repeats)} rows repeat", "are")
    location, before = next(iter(repeats.items()))
    notes.append(
        f"{table.name}: {repeat} another one exactly and {verb} left out, the first being {location}, which repeats "
        f"{before}"
    )
    return table.without(set(repeats))


def shared(first: Rows, second: Rows) -> list[tuple[Row, Row]]:
    """The rows of `second` that `first` has too, each as (its match, itself); case and white space do not matter."""
    known = {_key(row): row for row in reversed(first.rows)}
    return [(known[_key(row)], row) for row in second.rows if _key(row) in known]


def _key(row: Row) -> str:
    return normalised(f"{row.item.prompt} {row.item.answer}")


def normalised(text: str) -> str:
    """`text` without differences in case, and each run of white space as one blank."""
    return " ".join(text.split()).casefold()


def _row(record: Mapping[str, Any], columns: Columns, where: str, location: str, lead_words: int | None) -> Row:
    names = {field: name or field for field, name in columns.names.items()}
    values = {field: record[name] for field, name in columns.names.items() if name and record.get(name) is not None}
    kinds = [[field for field in kind if field in values] for kind in KINDS]
    if all(kinds):
        found = listed((names[field] for kind in kinds for field in kind), " and ")
        raise UsageError(f"{where}: found {found}, {columns.expected}: remove one kind, or type task.columns.text=null")
    if not any(kinds):
        found = listed(name for name in record if record[name] is not None)
        raise UsageError(f"{where}: found {found}, {columns.expected}: {columns.advice}")
    for field in KINDS[1] if "text" in values else KINDS[0]:
        if names[field] not in record:
            found = listed(name for name in record if record[name] is not None)
            raise UsageError(f"{where}: {names[field]} is missing, found {found}, {columns.expected}: {columns.advice}")
        _check_text(record[names[field]], names[field], where)
    paraphrase, wrong, alternates = (values.get(field) for field in OTHERS)
    if "text" in values:
        if any(other is not None for other in (paraphrase, wrong, alternates)):
            raise UsageError(f"{where}: found other answers to a text, expected them with a prompt and an answer")
        return Row(_divided_text(values["text"], where, lead_words), location)
    if paraphrase is not None:
        _check_text(paraphrase, names["paraphrased_answer"], where)
    if wrong is not None:
        wrong = _listed(wrong, names["perturbed_answer"], where)
    if alternates is not None:
        alternates = _listed(alternates, names["alternate_answer"], where)
        if values["answer"] in alternates:
            raise UsageError(f"{where}: {names['alternate_answer']} repeats the answer, expected other ones: remove it")
    return Row(Item(values["prompt"], values["answer"]), location, paraphrase, wrong, alternates)


def _check_text(value: Any, name: str, where: str) -> None:
    if value is None:
        problem = "is missing or empty"
    elif not isinstance(value, str):
        problem = f"is {short(value)}"
    elif not value.strip():
        problem = "is empty"
    elif any("\ud800" <= character <= "\udfff" for character in value):  # legal in JSON, but no tokenizer can read it
        problem = "has half of a surrogate pair"
    else:
        return
    raise UsageError(f"{where}: {name} {problem}, expected a text")


def _listed(value: Any, name: str, where: str) -> tuple[str, ...]:
    """The K texts of a list; in a CSV file the list is written as JSON."""
    try:
        texts = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not texts:
        raise UsageError(f'{where}: {name} is {short(value)}, expected a list such as ["a", "b"]')
    for number, text in enumerate(texts, start=1):
        _check_text(text, f"text {number} of {name}", where)
    return tuple(texts)


def _divided_text(text: str, where: str, lead_words: int | None) -> Item:
    """Running text, divided after its first `lead_words` words (None: a third) or soon after, no character changed."""
    words = list(spans(text))
    wanted = lead_words if lead_words is not None else max(1, len(words) // 3)
    if len(words) <= wanted:
        raise UsageError(
            f"{where}: a text of {len(words)} word(s), expected more than the {wanted} of its prompt: make it longer, "
            f"lower task.lead_words, or give prompt and answer"
        )
    # before a single blank, if there is one: only there every tokenizer begins a token; or where there is no blank
    pairs = zip(words[wanted - 1 :], words[wanted:], strict=False)
    boundaries = (end for (_, end), (start, _) in pairs if text[end:start] in (" ", ""))
    boundary = next(boundaries, words[wanted - 1][1])
    return Item(text[:boundary], text[boundary:], raw=True)


def _check_uniform(rows: Sequence[Row], where: str) -> None:
    first = rows[0]
    for row in rows:
        for field, name in zip(("paraphrase", "wrong", "alternates"), OTHERS, strict=True):
            if (getattr(row, field) is None) != (getattr(first, field) is None):
                without, other = (row, first) if getattr(row, field) is None else (first, row)
                raise UsageError(
                    f"{where}, {without.location}: no {name}, but {other.location} has one: give it in all rows or none"
                )
        if row.wrong is not None and first.wrong is not None and len(row.wrong) != len(first.wrong):
            raise UsageError(
                f"{where}, {row.location}: {len(row.wrong)} perturbed answers, expected {len(first.wrong)} as in "
                f"{first.location}"
            )
