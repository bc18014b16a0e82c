"""Text, JSON lines, CSV and Parquet: the records of a file, each with its location ("line 7", in a table "row 7").

Every error is a UsageError that begins with `where`, such as task.forget=a.csv.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from soul_exp.errors import UsageError, short

Records = Iterator[tuple[str, Mapping[str, Any]]]  # location, record
Check = Callable[[Sequence[str]], None]  # gets the names of the columns; raises if one is missing


def read_text(path: Path, where: str) -> str:
    """The text of a UTF-8 file, line ends as they are."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{where} does not exist: give embedded or a text file") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(f"{where}, line {line}: not UTF-8 text: convert the file") from error
    except OSError as error:
        raise UsageError(f"{where} cannot be read ({error.strerror}): give a readable file") from error


def _without_mark(path: Path, where: str) -> str:
    """The text of a file, without the byte order mark that some programs put first."""
    return read_text(path, where).removeprefix("\ufeff")


def json_lines(path: Path, where: str) -> Records:
    for number, line in enumerate(_without_mark(path, where).split("\n"), start=1):
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


def csv_rows(path: Path, where: str, check: Check) -> Records:
    """Each row below the header; its location is its first line, as a cell may span lines. An empty cell is None."""
    before = csv.field_size_limit(sys.maxsize)  # of a cell: else 128 KiB
    try:
        header: list[str] | None = None
        for location, cells in _csv_cells(path, where):
            if header is None:
                header = cells
                check(header)
            elif len(cells) != len(header):
                raise UsageError(f"{where}, {location}: {len(cells)} cells, expected {len(header)} as in the header")
            else:
                yield location, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        if header is None:
            raise UsageError(f"{where} is empty: expected a header and rows below it")
    finally:
        csv.field_size_limit(before)


def _csv_cells(path: Path, where: str) -> Iterator[tuple[str, list[str]]]:
    """The location and the cells of each row that is not an empty line."""
    reader = csv.reader(io.StringIO(_without_mark(path, where), newline=""), strict=True)
    while True:
        location = f"line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"{where}, {location}: not CSV ({error}): quote its cells") from error
        if cells:
            yield location, cells


def parquet_rows(path: Path, where: str, check: Check, columns: Collection[str | None]) -> Records:
    """Each row of the table, only those of `columns` that it has."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
        found = file.schema_arrow.names
        check(found)
        table = file.read(columns=[name for name in columns if name in found]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{where} is not a Parquet file ({str(error).splitlines()[0][:120]})") from error
    return numbered(table)


def numbered(table: Sequence[Mapping[str, Any]]) -> Records:
    return ((f"row {number}", record) for number, record in enumerate(table, start=1))
