"""Rows of a dataset on the hub, or of a folder in the hub's own layout; whatever fails is one sentence."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from soul_exp.errors import UsageError

Row = Mapping[str, Any]


def read(
    place: str,
    config: str | None,
    columns: Sequence[str] | None,
    *,
    option: str,
    revision: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    advice: str = "give a folder with its files",
) -> list[Row]:
    """The `columns` (None: all) of configuration `config` of `place`, a folder or hub name; default: its first split.

    With a `limit` rows are streamed: no more are fetched than are used. Raises UsageError, which begins with `option`
    and, where the hub cannot be reached, ends in `advice`.
    """
    datasets.disable_progress_bars()
    local = Path(place).is_dir()
    where = f"{option}={place}" if local else option
    what = f"{config or split or 'it'}"
    if not local and place.startswith((".", "/", "~")):
        raise UsageError(f"{option}={place} is no folder: {advice}")
    # a fresh cache for a folder: the library's own finds files by the folder's name, and so old ones after an edit
    with tempfile.TemporaryDirectory() as fresh:
        try:
            loaded: Any = datasets.load_dataset(
                place,
                config,
                revision=None if local else revision,
                cache_dir=fresh if local else None,
                streaming=limit is not None,
            )
            if split is not None and split not in loaded:
                raise UsageError(f"{where}: {place} has no split {split!r}, it has {', '.join(loaded)}")
            chosen = loaded[split] if split is not None else next(iter(loaded.values()))
            rows = list(itertools.islice(chosen, limit)) if limit is not None else chosen
            known = list(rows[0]) if isinstance(rows, list) and rows else chosen.column_names or []
        except (ConnectionError, OSError) as error:
            if local:
                raise UsageError(f"{where}: cannot read {what}: {error}") from error
            raise UsageError(
                f"{where}: {place} cannot be reached ({type(error).__name__}): connect to the network, or {advice}"
            ) from error
        except ValueError as error:  # an unknown configuration, or a folder without data files
            if isinstance(error, UnicodeDecodeError):
                raise UsageError(f"{where}: a file of {what} is not UTF-8 text: convert it") from error
            raise UsageError(f"{where} does not offer {what!r}: {str(error).splitlines()[0]}") from error
        except datasets.exceptions.DatasetGenerationError as error:
            raise UsageError(f"{where}: {_malformed(Path(place), config) or error}") from error
        if columns is None:
            return list(rows if isinstance(rows, list) else rows.to_list())
        absent = [column for column in columns if column not in known]
        if absent:
            raise UsageError(f"{where}: {what} lacks the column(s) {', '.join(absent)}")
        if isinstance(rows, list):
            return [{column: row[column] for column in columns} for row in rows]
        return list(rows.select_columns(list(columns)).to_list())


def _malformed(source: Path, config: str | None) -> str | None:
    """The first line of a JSON-lines file that is no JSON object, in words."""
    for path in sorted(source.rglob(f"{config or '*'}.json*")):
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    return f"{path}, line {number}: {error.msg}, expected one JSON object a line"
                if not isinstance(value, dict):
                    return f"{path}, line {number}: found {type(value).__name__}, expected one JSON object a line"
    return None
