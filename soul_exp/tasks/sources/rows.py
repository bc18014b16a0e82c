"""Rows that a user brings, from JSON lines, CSV, Parquet or the hub; what is wrong is named by its file and line.

A row is a prompt and its answer, or a text of which the beginning is the prompt; perhaps with a paraphrased answer and
wrong ones.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from soul_exp.data import Item
from soul_exp.errors import UsageError
from soul_exp.tasks.sources import hub

FIELDS = ("prompt", "answer", "text", "paraphrased_answer", "perturbed_answer")
HUB = "hub:"
EXPECTED = "expected prompt and answer, or text"
ADVICE = "rename them or type task.columns={prompt: NAME, answer: NAME}"


@dataclass(frozen=True)
class Row:
    """A text to forget, to retain or to hold out, and the place in its file where it begins."""

    item: Item
    place: str  # "line 7" of a text file, "row 7" of a table
    paraphrase: str | None = None
    wrong: tuple[str, ...] | None = None  # K wrong answers


@dataclass(frozen=True)
class Rows:
    """All rows of one file or dataset, in its order; `name` is what the user typed: task.forget=a.jsonl."""

    name: str
    rows: Sequence[Row]

    @property
    def items(self) -> list[Item]:
        return [row.item for row in self.rows]


def read(
    place: str, option: str, *, columns: Mapping[str, str | None], revision: str | None, lead_words: int | None
) -> Rows:
    """The rows of the file `place`, by its suffix, or of `hub:owner/name[:split]` or `hub:owner/name:config:split`.

    `columns` says what each field is called there (null: not read), `lead_words` how long the prompt of a text is
    (null: a third of its words). Either all rows have a paraphrased answer or none; likewise wrong answers, then K
    each. Raises UsageError, which begins with `option`, if there are no rows or one is malformed.
    """
    where = f"{option}={place}"
    readers: dict[str, Callable[[Path, str, Mapping[str, str | None]], Iterator[tuple[str, Mapping[str, Any]]]]] = {
        ".jsonl": _json_lines,
        ".json": _json_lines,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    if place.startswith(HUB):
        found = _hub(place, option, columns, revision)
    else:
        path = Path(place).expanduser()
        if path.suffix.lower() not in readers:
            raise UsageError(
                f"{where}: found the suffix {path.suffix!r}, expected {', '.join(readers)}, or hub:owner/name for a "
                f"dataset of the hub"
            )
        if not path.is_file():
            raise UsageError(f"{where} does not exist: give a file, or hub:owner/name for a dataset of the hub")
        found = readers[path.suffix.lower()](path, where, columns)
    rows = [_row(record, columns, f"{where}, {spot}", spot, lead_words) for spot, record in found]
    if not rows:
        raise UsageError(f"{where} has no rows: {EXPECTED} in each")
    _check_alike(rows, where)
    return Rows(where, rows)


def distinct(table: Rows) -> tuple[Rows, str | None]:
    """`table` without rows that repeat an earlier one exactly, and one sentence on them; None if there are none."""
    first: dict[object, str] = {}
    repeats = []
    for row in table.rows:
        before = first.setdefault((row.item, row.paraphrase, row.wrong), row.place)
        if before != row.place:
            repeats.append((row.place, before))
    if not repeats:
        return table, None
    gone = {place for place, _ in repeats}
    said = "1 row repeats" if len(repeats) == 1 else f"{len(repeats)} rows repeat"
    return (
        Rows(table.name, [row for row in table.rows if row.place not in gone]),
        f"{table.name}: {said} another one exactly and {'is' if len(repeats) == 1 else 'are'} left out, the first "
        f"being {repeats[0][0]}, which repeats {repeats[0][1]}",
    )


def shared(first: Rows, second: Rows) -> list[tuple[Row, Row]]:
    """The rows of `second` that `first` has too, each beside its like; case and white space do not matter."""
    known = {_key(row): row for row in reversed(first.rows)}
    return [(known[_key(row)], row) for row in second.rows if _key(row) in known]


def _key(row: Row) -> str:
    return " ".join(f"{row.item.prompt} {row.item.answer}".split()).casefold()


# ---- One record to one row.


def _row(
    record: Mapping[str, Any], columns: Mapping[str, str | None], where: str, place: str, lead_words: int | None
) -> Row:
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
        return Row(_cut(values["text"], where, lead_words), place)
    paraphrase, wrong = values.get("paraphrased_answer"), values.get("perturbed_answer")
    if paraphrase is not None:
        _check_text(paraphrase, columns["paraphrased_answer"] or "", where)
    if wrong is not None:
        wrong = _texts(wrong, columns["perturbed_answer"] or "", where)
    return Row(Item(values["prompt"], values["answer"]), place, paraphrase, wrong)


def _check_text(value: Any, name: str, where: str) -> None:
    if value is None:
        raise UsageError(f"{where}: {name} is missing or empty, expected a text")
    if not isinstance(value, str):
        raise UsageError(f"{where}: {name} is {_short(value)}, expected a text")
    if not value.strip():
        raise UsageError(f"{where}: {name} is empty, expected a text")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON may say it, no tokenizer can read it
        raise UsageError(f"{where}: {name} holds half of a surrogate pair, expected a text: write the whole character")


def _texts(value: Any, name: str, where: str) -> tuple[str, ...]:
    """A list of wrong answers; in a CSV it is written as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UsageError(f'{where}: {name} is {_short(value)}, expected a list such as ["a", "b"]') from error
    if not isinstance(value, list) or not value:
        raise UsageError(f'{where}: {name} is {_short(value)}, expected a list such as ["a", "b"]')
    for number, text in enumerate(value, start=1):
        _check_text(text, f"text {number} of {name}", where)
    return tuple(value)


def _cut(text: str, where: str, lead_words: int | None) -> Item:
    """Running text, cut behind its first `lead_words` words (null: a third) or soon after, not a character changed.

    Soon after, because only before a single blank every tokenizer has a seam.
    """
    words = list(re.finditer(r"\S+", text))
    wanted = lead_words if lead_words is not None else max(1, len(words) // 3)
    if len(words) <= wanted:
        raise UsageError(
            f"{where}: a text of {len(words)} word(s), expected more than the {wanted} of its prompt: make it longer, "
            f"lower task.lead_words, or give prompt and answer"
        )
    pairs = zip(words[wanted - 1 :], words[wanted:], strict=False)
    seams = (this.end() for this, following in pairs if text[this.end() : following.start()] == " ")
    at = next(seams, words[wanted - 1].end())
    return Item(text[:at], text[at:], raw=True)


def _check_alike(rows: Sequence[Row], where: str) -> None:
    """Raises UsageError unless all rows have paraphrased answers or none, and the same number of wrong ones."""
    first = rows[0]
    for row in rows:
        for has, had, name in (
            (row.paraphrase, first.paraphrase, "paraphrased_answer"),
            (row.wrong, first.wrong, "perturbed_answer"),
        ):
            if (has is None) != (had is None):
                lacks, other = (row, first) if has is None else (first, row)
                raise UsageError(
                    f"{where}, {lacks.place}: no {name}, but {other.place} has one: give it in every row or in none"
                )
        if row.wrong is not None and first.wrong is not None and len(row.wrong) != len(first.wrong):
            raise UsageError(
                f"{where}, {row.place}: {len(row.wrong)} perturbed answers, expected {len(first.wrong)} as in "
                f"{first.place}"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- Files and datasets to records, each with its place.


def _json_lines(path: Path, where: str, columns: Mapping[str, str | None]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(_text(path, where).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UsageError(f"{where}, line {number}: not JSON ({said}), expected one JSON object a line") from error
        if not isinstance(record, dict):
            raise UsageError(f"{where}, line {number}: found {_short(record)}, expected one JSON object a line")
        yield f"line {number}", record


def _csv(path: Path, where: str, columns: Mapping[str, str | None]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return csv_rows(path, where, lambda header: _check_columns(header, columns, where))


def csv_rows(
    path: Path, where: str, check: Callable[[Sequence[str]], None]
) -> Iterator[tuple[str, Mapping[str, str | None]]]:
    """Each row below the header of a CSV file, and its place: the line on which it begins, as its cells may span lines.

    An empty cell is None. `check` is given the header. Raises UsageError, which begins with `where`.
    """
    before = csv.field_size_limit(sys.maxsize)  # of a cell: else 128 KiB
    try:
        reader = csv.reader(io.StringIO(_text(path, where), newline=""), strict=True)
        header: list[str] | None = None
        while True:
            begins = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UsageError(f"{where}, line {begins}: not CSV ({error}): quote its cells") from error
            if cells is None and header is None:
                raise UsageError(f"{where} is empty: expected a header and rows below it")
            if cells is None:
                return
            if not cells:  # an empty line
                continue
            if header is None:
                header = cells
                check(header)
                continue
            if len(cells) != len(header):
                raise UsageError(f"{where}, line {begins}: {len(cells)} cells, expected {len(header)} as in the header")
            yield f"line {begins}", {name: cell or None for name, cell in zip(header, cells, strict=True)}
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, where: str, columns: Mapping[str, str | None]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(file.schema_arrow.names, columns, where)
        wanted = [name for name in columns.values() if name in file.schema_arrow.names]
        records = file.read(columns=wanted).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{where} is not a Parquet file ({str(error).splitlines()[0][:120]})") from error
    for number, record in enumerate(records, start=1):
        yield f"row {number}", record


def _hub(
    place: str, option: str, columns: Mapping[str, str | None], revision: str | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name, *rest = place.removeprefix(HUB).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise UsageError(
            f"{option}={place}: expected hub:owner/name, hub:owner/name:split or hub:owner/name:configuration:split"
        )
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else None)
    found = hub.read(name, config, None, option=option, revision=revision, split=split, advice="give a file")
    if found:
        _check_columns(list(found[0]), columns, f"{option}={place}")
    for number, record in enumerate(found, start=1):
        yield f"row {number}", record


def _text(path: Path, where: str) -> str:
    """The text of a UTF-8 file, without the mark that some programs put first."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(f"{where}, line {line}: not UTF-8 text: convert the file") from error
    except OSError as error:
        raise UsageError(f"{where} cannot be read ({error.strerror})") from error


def _check_columns(found: Sequence[str], columns: Mapping[str, str | None], where: str) -> None:
    """Raises UsageError unless the fields of one kind are among the columns that were found, each once."""
    twice = [name for name in columns.values() if list(found).count(name or "") > 1]
    if twice:
        raise UsageError(f"{where}: the column {twice[0]} stands twice in the header, expected it once")
    kinds = ((columns["prompt"], columns["answer"]), (columns["text"],))
    if not any(all(name in found for name in kind) for kind in kinds):
        wanted = ", or ".join(" and ".join(str(name) for name in kind) for kind in kinds if None not in kind)
        raise UsageError(f"{where}: found the columns {', '.join(found)}, expected {wanted}: {ADVICE}")
