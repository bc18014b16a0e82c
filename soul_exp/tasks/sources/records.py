"""The records of files and hub datasets; every error is a UsageError that begins with `where`: task.forget=a.csv."""

import csv
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soul_exp.errors import UnreachableError, UsageError, short

Record = Mapping[str, Any]
Records = Iterator[tuple[str, Record]]  # location ("line 7", in a table "row 7"), record
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


def _csv_cells(path: Path, where: str) -> Iterator[tuple[str, list[str]]]:
    """The location and the cells of each row that is not an empty line."""
    csv.field_size_limit(sys.maxsize)  # of a cell: else 128 KiB
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
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        found = file.schema_arrow.names
        check(found)
        table = file.read(columns=[name for name in columns if name in found]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{where} is not a Parquet file ({str(error).splitlines()[0][:120]})") from error
    return numbered(table)


def numbered(table: Sequence[Record]) -> Records:
    return ((f"row {number}", record) for number, record in enumerate(table, start=1))


def hub_rows(
    name: str, config: str | None, columns: Sequence[str] | None, *, where: str, advice: str,
    revision: str | None, split: str | None = None, limit: int | None = None,
) -> list[Record]:  # fmt: skip
    """The `columns` (None: all) of `config` and `split` (None: the first) of a hub name or folder in the hub's layout.

    With a `limit` no more rows are fetched than are used. The UsageError, where the hub fails, ends in `advice`.
    """
    import datasets

    local, what = Path(name).is_dir(), config or split or "the dataset"
    if not local and name.startswith((".", "/", "~")):
        raise UsageError(f"{where} is not a folder: {advice}")
    datasets.disable_progress_bars()
    # a fresh cache for a folder: the library's own finds files by the folder's name, and so old ones after an edit
    with tempfile.TemporaryDirectory() as fresh, _usage_errors(name, config, where, what, advice):
        options = {"cache_dir": fresh} if local else {"revision": revision}
        splits: Any = datasets.load_dataset(name, config, streaming=limit is not None, **options)
        if split is not None and split not in splits:
            raise UsageError(f"{where}: {name} has no split {split!r}, it has {', '.join(splits)}")
        chosen = splits[split] if split is not None else next(iter(splits.values()))
        rows = list(itertools.islice(chosen, limit)) if limit is not None else []
        found = list(rows[0]) if rows else chosen.column_names or []
        if absent := [column for column in columns or () if column not in found]:
            raise UsageError(f"{where}: {what} has no column {', '.join(absent)}: expected {', '.join(columns or ())}")
        if limit is None:
            return list((chosen if columns is None else chosen.select_columns(list(columns))).to_list())
        return [{column: row[column] for column in columns or row} for row in rows]


@contextmanager
def _usage_errors(name: str, config: str | None, where: str, what: str, advice: str) -> Iterator[None]:
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except UsageError:
        raise
    except OSError as error:
        if Path(name).is_dir():
            raise UsageError(f"{where}: cannot read {what}: {error}") from error
        raise UnreachableError(
            f"{where}: {name} cannot be reached ({type(error).__name__}): connect to the network, or {advice}"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: a file of {what} is not UTF-8 text: convert it") from error
    except ValueError as error:  # an unknown configuration, or a folder without data files
        raise UsageError(f"{where}: cannot find {what!r}: {str(error).splitlines()[0]}") from error
    except DatasetGenerationError as error:
        for path in sorted(Path(name).rglob(f"{config or '*'}.json*")):
            list(json_lines(path, f"{where}: {path}"))  # raises, with its line, where one is not a JSON object
        raise UsageError(f"{where}: {error}") from error
