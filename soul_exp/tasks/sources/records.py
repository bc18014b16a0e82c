"""The records of files and hub datasets; every error is a UsageError that begins with `where`: task.forget=a.csv."""

import csv
import io
import itertools
import json
import logging
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from soul_exp import hub
from soul_exp.errors import UnreachableError, UsageError, first_line, short

Record = Mapping[str, Any]
Records = Iterator[tuple[str, Record]]  # location ("line 7", in a table "row 7"), record
Check = Callable[[Sequence[str]], None]  # gets the names of the columns; raises if one is missing
SEPARATORS = (",", ";", "\t", "|")  # of the cells of a CSV
LISTED = 20  # names of columns in a message
OBJECTS = "expected one JSON object per line, or one array of objects"


def listed(names: Iterable[object], separator: str = ", ") -> str:
    """The first LISTED names of columns, in quotes where they hold more than words; "nothing" for none."""
    texts = [text if re.fullmatch(r"\w+([ .-]\w+)*", text) else repr(text) for text in map(str, names)]
    more = [f"and {len(texts) - LISTED} more"] if len(texts) > LISTED else []
    return separator.join(texts[:LISTED] + more) or "nothing"


def check_file(path: Path, where: str, advice: str) -> None:
    """Raises UsageError, which ends in `advice`, if `path` is not a file that can be read."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError as error:
        link = f" (it is a link to {path.readlink()})" if path.is_symlink() else ""
        raise UsageError(f"{where} does not exist{link}: {advice}") from error
    except OSError as error:
        raise UsageError(f"{where} cannot be read ({error.strerror}): {advice}") from error
    if is_folder:
        raise UsageError(f"{where} is a folder: {advice}")


def read_text(path: Path, where: str, advice: str = "give embedded or a text file") -> str:
    """The text of a UTF-8 file, line ends as they are, without the byte order mark that some programs put first."""
    check_file(path, where, advice)
    try:
        content = path.read_bytes()
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(f"{where}, line {line}: not UTF-8 text: convert the file") from error
    except OSError as error:
        raise UsageError(f"{where} cannot be read ({error.strerror}): give a readable file") from error


def json_rows(path: Path, where: str) -> Records:
    """Each object of a file that holds one JSON object per line, or one array of objects."""
    text = read_text(path, where)
    located: Iterable[tuple[str, Any]]
    if text.lstrip().startswith("["):
        located = numbered(_parsed(text, where))
    else:
        lines = enumerate(re.split("\r\n|\r|\n", text), start=1)  # none of them is inside a text of JSON
        located = ((f"line {i}", _parsed(line, f"{where}, line {i}")) for i, line in lines if line.strip())
    for location, record in located:
        if not isinstance(record, dict):
            raise UsageError(f"{where}, {location}: found {short(record)}, {OBJECTS}")
        yield location, record


def _parsed(text: str, where: str) -> Any:
    """The value that `text` holds in JSON; UsageError if it holds none, or an object with a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        if isinstance(error, json.JSONDecodeError):
            reason = error.msg if error.lineno == 1 else f"{error.msg}, line {error.lineno}"
        elif isinstance(error, RecursionError):
            reason = "nested too deeply"
        raise UsageError(f"{where}: not JSON ({reason}), {OBJECTS}") from error


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def csv_rows(path: Path, where: str, check: Check, advice: str = "give a CSV file") -> Records:
    """Each row below the header; its location is its first line, as a cell may span lines. An empty cell is None.

    Cells are separated by the first of SEPARATORS with which `check` finds the columns that it expects.
    """
    text = read_text(path, where, advice)
    separator, header = _separator(text, where, check), None
    for location, cells in _csv_cells(text, where, separator):
        if header is None:
            header = cells
            check(header)
        elif len(cells) != len(header):
            raise UsageError(f"{where}, {location}: {len(cells)} cells, expected {len(header)} as in the header")
        else:
            yield location, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    if header is None:
        raise UsageError(f"{where} is empty: expected a header and rows below it")


def _separator(text: str, where: str, check: Check) -> str:
    """The first of SEPARATORS with which `check` accepts the header; else that which divides it into most columns."""
    columns = dict.fromkeys(SEPARATORS, 0)
    for separator in SEPARATORS:
        with suppress(UsageError, StopIteration):
            header = next(_csv_cells(text, where, separator))[1]
            columns[separator] = len(header)
            check(header)
            return separator
    return max(columns, key=columns.__getitem__)


def _csv_cells(text: str, where: str, separator: str) -> Iterator[tuple[str, list[str]]]:
    """The location and the cells of each row that is not an empty line."""
    csv.field_size_limit(sys.maxsize)  # of a cell: else 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    while True:
        location = f"line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UsageError(f"{where}, {location}: not CSV ({error}): quote its cells") from error
        if cells and not (location == "line 1" and cells[0] == "sep="):  # how some programs state their separator
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
        raise UsageError(f"{where} is not a Parquet file ({first_line(error)})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: a text is not UTF-8 ({error}): write the file anew") from error
    return numbered(table)


def numbered(table: Sequence[Record]) -> Records:
    return ((f"row {number}", record) for number, record in enumerate(table, start=1))


def hub_rows(
    name: str, config: str | None, columns: Sequence[str] | None, *, where: str, advice: str,
    revision: str | None, split: str | None = None, limit: int | None = None, optional: Sequence[str] = (),
) -> list[Record]:  # fmt: skip
    """The `columns` (None: all) of `config` and `split` (None: the first) of a hub name or folder in the hub's layout.

    And those of `optional` that it has.
    With a `limit` no more rows are fetched than are used. The UsageError, where the hub fails, ends in `advice`.
    """
    import datasets

    local, what = Path(name).is_dir(), config or split or "the dataset"
    if not local and name.startswith((".", "/", "~")):
        raise UsageError(f"{where} is not a folder: {advice}")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what fails is in the error
    if not local:
        hub.connect()
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
        columns = None if columns is None else [*columns, *(name for name in optional if name in found)]
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
            f"{where}: {name} cannot be reached ({type(error).__name__}: {_cause(error)}): connect to the network, or "
            f"{advice}"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: a file of {what} is not UTF-8 text: convert it") from error
    except (ValueError, DatasetGenerationError) as error:  # an unknown configuration; files that cannot be read
        if isinstance(error, DatasetGenerationError):
            for path in sorted(Path(name).rglob(f"{config or '*'}.json*")):
                list(json_rows(path, f"{where}: {path}"))  # raises, with its line, where one is not JSON objects
        raise UsageError(f"{where}: cannot read {what}: {_cause(error)}: {advice}") from error


def _cause(error: BaseException) -> str:
    """The message of the first cause of `error` in one line, without the example of a call that may follow it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).partition("Example of usage")[0].split())[:400]
