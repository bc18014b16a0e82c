"""JSON lines, CSV, Parquet and hub datasets as records, each with its location: "line 7" of a text, "row 7" of a table.

Every error is a UsageError that begins with `where`, such as task.forget=a.csv.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from soul_exp.errors import UsageError, short
from soul_exp.tasks.sources import hub
from soul_exp.tasks.sources.text import read_text

Columns = Mapping[str, str | None]  # field -> its name in the file; None: not read
Records = Iterator[tuple[str, Mapping[str, Any]]]  # location, record

HUB = "hub:"
EXPECTED = "expected prompt and answer, or text"
ADVICE = "rename them or type task.columns={prompt: NAME, answer: NAME}"


def records(source: str, where: str, columns: Columns, revision: str | None) -> Records:
    """The records of a file, read by its suffix, or of `hub:owner/name[:split]` or of
    `hub:owner/name:configuration:split`."""
    if source.startswith(HUB):
        return _hub(source, where, columns, revision)
    readers = {".jsonl": _json_lines, ".json": _json_lines, ".csv": _csv, ".parquet": _parquet}
    path = Path(source).expanduser()
    if path.suffix.lower() not in readers:
        raise UsageError(
            f"{where}: found the suffix {path.suffix!r}, expected {', '.join(readers)}, or hub:owner/name for a "
            f"dataset of the hub"
        )
    if not path.is_file():
        raise UsageError(f"{where} does not exist: give a file, or hub:owner/name for a dataset of the hub")
    return readers[path.suffix.lower()](path, where, columns)


def csv_rows(path: Path, where: str, check: Callable[[Sequence[str]], None]) -> Records:
    """Each row below the header of a CSV file; its location is its first line, as a cell may span lines.

    An empty cell is None. `check` gets the header and raises if a column is missing.
    """
    before = csv.field_size_limit(sys.maxsize)  # of a cell: else 128 KiB
    try:
        reader = csv.reader(io.StringIO(_text(path, where), newline=""), strict=True)
        header: list[str] | None = None
        while True:
            location = f"line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UsageError(f"{where}, {location}: not CSV ({error}): quote its cells") from error
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
                raise UsageError(f"{where}, {location}: {len(cells)} cells, expected {len(header)} as in the header")
            yield location, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    finally:
        csv.field_size_limit(before)


def _csv(path: Path, where: str, columns: Columns) -> Records:
    return csv_rows(path, where, lambda header: _check_columns(header, columns, where))


def _json_lines(path: Path, where: str, columns: Columns) -> Records:
    for number, line in enumerate(_text(path, where).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UsageError(
                f"{where}, line {number}: not JSON ({reason}), expected one JSON object per line"
            ) from error
        if not isinstance(record, dict):
            raise UsageError(f"{where}, line {number}: found {short(record)}, expected one JSON object per line")
        yield f"line {number}", record


def _parquet(path: Path, where: str, columns: Columns) -> Records:
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(file.schema_arrow.names, columns, where)
        present = [name for name in columns.values() if name in file.schema_arrow.names]
        table = file.read(columns=present).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{where} is not a Parquet file ({str(error).splitlines()[0][:120]})") from error
    return _numbered(table)


def _hub(source: str, where: str, columns: Columns, revision: str | None) -> Records:
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise UsageError(
            f"{where}: expected hub:owner/name, hub:owner/name:split or hub:owner/name:configuration:split"
        )
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else None)
    table = hub.read(name, config, None, where=where, revision=revision, split=split, advice="give a file")
    if table:
        _check_columns(list(table[0]), columns, where)
    return _numbered(table)


def _numbered(table: Sequence[Mapping[str, Any]]) -> Records:
    return ((f"row {number}", record) for number, record in enumerate(table, start=1))


def _text(path: Path, where: str) -> str:
    """The text of a file, without the byte order mark that some programs put first."""
    return read_text(path, where).removeprefix("\ufeff")


def _check_columns(found: Sequence[str], columns: Columns, where: str) -> None:
    """Raises UsageError unless prompt and answer, or text, are among the columns `found`, each once."""
    twice = [name for name in columns.values() if list(found).count(name or "") > 1]
    if twice:
        raise UsageError(f"{where}: found the column {twice[0]} twice in the header, expected it once")
    kinds = ((columns["prompt"], columns["answer"]), (columns["text"],))
    if not any(all(name in found for name in kind) for kind in kinds):
        wanted = ", or ".join(" and ".join(str(name) for name in kind) for kind in kinds if None not in kind)
        raise UsageError(f"{where}: found the columns {', '.join(found)}, expected {wanted}: {ADVICE}")
