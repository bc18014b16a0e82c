"""Rows of a hub dataset, or of a folder in the hub's layout; every failure is a UsageError."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from soul_exp.errors import UsageError
from soul_exp.tasks.sources.formats import json_lines

Row = Mapping[str, Any]


def read(
    name: str,
    config: str | None,
    columns: Sequence[str] | None,
    *,
    where: str,
    revision: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    advice: str = "give a folder with its files",
) -> list[Row]:
    """The `columns` (None: all) of configuration `config` of `name`, a folder or hub name; default: its first split.

    With a `limit` the rows are streamed: no more are fetched than are used. Raises UsageError, which begins with
    `where` (such as task.source=hub) and, where the hub cannot be reached, ends in `advice`.
    """
    local, what = Path(name).is_dir(), config or split or "the dataset"
    if not local and name.startswith((".", "/", "~")):
        raise UsageError(f"{where} is not a folder: {advice}")
    datasets.disable_progress_bars()
    # a fresh cache for a folder: the library's own finds files by the folder's name, and so old ones after an edit
    with tempfile.TemporaryDirectory() as fresh, _usage_errors(name, config, where, what, advice):
        splits: Any = datasets.load_dataset(
            name,
            config,
            revision=None if local else revision,
            cache_dir=fresh if local else None,
            streaming=limit is not None,
        )
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
    """Turns what the library raises within it into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (ConnectionError, OSError) as error:
        if Path(name).is_dir():
            raise UsageError(f"{where}: cannot read {what}: {error}") from error
        raise UsageError(
            f"{where}: {name} cannot be reached ({type(error).__name__}): connect to the network, or {advice}"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: a file of {what} is not UTF-8 text: convert it") from error
    except ValueError as error:  # an unknown configuration, or a folder without data files
        raise UsageError(f"{where}: cannot find {what!r}: {str(error).splitlines()[0]}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        for path in sorted(Path(name).rglob(f"{config or '*'}.json*")):
            list(json_lines(path, f"{where}: {path}"))  # raises, with its line, where one is not a JSON object
        raise UsageError(f"{where}: {error}") from error
