"""A user's rows, checked one by one: a prompt with its answer and perhaps other answers, or a text to be divided."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soul_exp.data import Item
from soul_exp.errors import UsageError, short
from soul_exp.tasks.sources.records import Records, csv_rows, hub_rows, json_lines, numbered, parquet_rows

FIELDS = ("prompt", "answer", "text", "paraphrased_answer", "perturbed_answer")
HUB, SUFFIXES = "hub:", (".jsonl", ".json", ".csv", ".parquet")
EXPECTED = "expected prompt and answer, or text"
ADVICE = "rename them or type task.columns={prompt: NAME, answer: NAME}"

Columns = Mapping[str, str | None]  # field -> its name in the file; None: not read


@dataclass(frozen=True)
class Row:
    """One row and its location in its file."""

    item: Item
    location: str  # "line 7" of a text file, "row 7" of a table
    paraphrase: str | None = None
    wrong: tuple[str, ...] | None = None  # K wrong answers

    @property
    def texts(self) -> list[Item]:
        """The row itself, and its paraphrased and wrong answers."""
        others = [*(() if self.paraphrase is None else (self.paraphrase,)), *(self.wrong or ())]
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
    likewise K wrong ones. Raises UsageError, which begins with `option`, if there are no rows or one is malformed.
    """
    where = f"{option}={source}"
    rows = [
        _row(record, columns, f"{where}, {location}", location, lead_words)
        for location, record in _records(source, where, columns, revision)
    ]
    if not rows:
        raise UsageError(f"{where} has no rows: {EXPECTED} in each")
    _check_uniform(rows, where)
    return Rows(where, rows)


def _records(source: str, where: str, columns: Columns, revision: str | None) -> Records:
    check = functools.partial(_check_columns, columns=columns, where=where)
    if source.startswith(HUB):
        name, *rest = source.removeprefix(HUB).split(":")
        if not name or len(rest) > 2 or not all(rest):
            raise UsageError(f"{where}: expected hub:owner/name[:split] or hub:owner/name:configuration:split")
        config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else None)
        table = hub_rows(name, config, None, where=where, revision=revision, split=split, advice="give a file")
        if table:
            check(list(table[0]))
        return numbered(table)
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"{where}: found the suffix {path.suffix!r}, expected {', '.join(SUFFIXES)}, or hub:owner/name"
        )
    if not path.is_file():
        raise UsageError(f"{where} does not exist: give a file, or hub:owner/name for a dataset of the hub")
    if suffix == ".csv":
        return csv_rows(path, where, check)
    return parquet_rows(path, where, check, columns.values()) if suffix == ".parquet" else json_lines(path, where)


def _check_columns(found: Sequence[str], columns: Columns, where: str) -> None:
    twice = [name for name in columns.values() if list(found).count(name or "") > 1]
    if twice:
        raise UsageError(f"{where}: found the column {twice[0]} twice in the header, expected it once")
    kinds = ((columns["prompt"], columns["answer"]), (columns["text"],))
    if not any(all(name in found for name in kind) for kind in kinds):
        wanted = ", or ".join(" and ".join(str(name) for name in kind) for kind in kinds if None not in kind)
        raise UsageError(f"{where}: found the columns {', '.join(found)}, expected {wanted}: {ADVICE}")


def distinct(table: Rows, notes: list[str]) -> Rows:
    """`table` without rows that repeat an earlier one exactly, which is noted."""
    first: dict[object, str] = {}
    repeats = {}
    for row in table.rows:
        before = first.setdefault((row.item, row.paraphrase, row.wrong), row.location)
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
    return " ".join(f"{row.item.prompt} {row.item.answer}".split()).casefold()


def _row(record: Mapping[str, Any], columns: Columns, where: str, location: str, lead_words: int | None) -> Row:
    values = {field: record[name] for field, name in columns.items() if name and record.get(name) is not None}
    is_text = "text" in values
    if is_text and ("prompt" in values or "answer" in values):
        raise UsageError(
            f"{where}: found {' and '.join(field for field in FIELDS[:3] if field in values)}, {EXPECTED}: remove one "
            f"kind, or type task.columns.text=null"
        )
    if not is_text and "prompt" not in values and "answer" not in values:
        found = ", ".join(name for name in record if record[name] is not None) or "nothing"
        raise UsageError(f"{where}: found {found}, {EXPECTED}: {ADVICE}")
    for field in ("text",) if is_text else ("prompt", "answer"):
        _check_text(values.get(field), columns[field] or field, where)
    if is_text:
        if "paraphrased_answer" in values or "perturbed_answer" in values:
            raise UsageError(f"{where}: found other answers to a text, expected them with a prompt and an answer")
        return Row(_divided_text(values["text"], where, lead_words), location)
    paraphrase, wrong = values.get("paraphrased_answer"), values.get("perturbed_answer")
    if paraphrase is not None:
        _check_text(paraphrase, columns["paraphrased_answer"] or "", where)
    if wrong is not None:
        wrong = _wrong_answers(wrong, columns["perturbed_answer"] or "", where)
    return Row(Item(values["prompt"], values["answer"]), location, paraphrase, wrong)


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


def _wrong_answers(value: Any, name: str, where: str) -> tuple[str, ...]:
    """The K texts of a list; in a CSV file the list is written as JSON."""
    try:
        texts = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        texts = None
    if not isinstance(texts, list) or not texts:
        raise UsageError(f'{where}: {name} is {short(value)}, expected a list such as ["a", "b"]')
    for number, text in enumerate(texts, start=1):
        _check_text(text, f"text {number} of {name}", where)
    return tuple(texts)


def _divided_text(text: str, where: str, lead_words: int | None) -> Item:
    """Running text, divided after its first `lead_words` words (None: a third) or soon after, no character changed."""
    words = list(re.finditer(r"\S+", text))
    wanted = lead_words if lead_words is not None else max(1, len(words) // 3)
    if len(words) <= wanted:
        raise UsageError(
            f"{where}: a text of {len(words)} word(s), expected more than the {wanted} of its prompt: make it longer, "
            f"lower task.lead_words, or give prompt and answer"
        )
    # before a single blank, if there is one: only there every tokenizer begins a token
    pairs = zip(words[wanted - 1 :], words[wanted:], strict=False)
    boundaries = (this.end() for this, following in pairs if text[this.end() : following.start()] == " ")
    boundary = next(boundaries, words[wanted - 1].end())
    return Item(text[:boundary], text[boundary:], raw=True)


def _check_uniform(rows: Sequence[Row], where: str) -> None:
    first = rows[0]
    for row in rows:
        for field, name in (("paraphrase", "paraphrased_answer"), ("wrong", "perturbed_answer")):
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
