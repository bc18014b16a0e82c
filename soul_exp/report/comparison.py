"""The runs of a folder as tables: one comparison for each set of comparable runs, a row for each combination."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from soul_exp.errors import UsageError
from soul_exp.report import notes, requests
from soul_exp.report.group import Group
from soul_exp.report.labels import quoted
from soul_exp.report.order import in_job_order, typed_order
from soul_exp.report.runs import comparable, find, frame_of, varied, why_apart
from soul_exp.report.table import Comparison
from soul_exp.results import REQUEST, UNMERGED, Results

MOST_REASONS = 4  # that a note lists


def comparisons(
    folder: Path | str, metrics: Sequence[str] | None = None, few: Sequence[str] | None = None
) -> list[Comparison]:
    """The tables of the runs below `folder`; the requests of a run that is a sequence of them are one table.

    `metrics` are the columns, named as in results.json, of one table, costs too (`seconds.unlearn`); by default each
    group of GROUPS has its own, after that of the paper's columns where runs have paper=true. `few` are `metrics` where
    no run has that. Raises UsageError as `load` does, and for an unknown metric.
    """
    runs, missing = find(folder)
    are_requests = all(name.startswith(REQUEST) for name in runs)
    groups = [] if are_requests else groups_of(folder, runs)
    known = dict.fromkeys(name for run in runs.values() for name in run.metrics["unlearned"])
    known |= dict.fromkeys(column.key for group in groups for column in group.costs)
    unknown = [name for name in metrics or () if name not in known]
    if unknown:
        raise UsageError(f"--metrics: no run has {unknown[0]!r}, choose from {', '.join(known)}")
    found = [group.comparison(metrics, few) for group in groups]
    if are_requests:
        found = [requests.comparison(runs, few if metrics is None else metrics)]
    of_why = notes.by(missing, str).items()
    without = tuple(f"without results: {', '.join(names)} ({why})" for why, names in of_why)
    return [*found, Comparison("", "", (), without)] if without else found


def aggregated(folder: Path | str) -> pd.DataFrame:
    """One row per combination, over its seeds, with every metric and cost.

    Of each the mean, `.low` and `.high` of the 95 % interval, and `.n`, the runs that have a value; `table` is the
    number of its comparison, as in `load`.
    """
    runs, _ = find(folder)
    rows = []
    for place, group in enumerate(groups_of(folder, runs), 1):
        columns = [*group.columns_of(group.measured), *group.costs]
        for method in group.methods:
            row: dict[str, Any] = {"table": place}
            row |= {column.label: text for column, text in zip(group.keys, method.key, strict=True)}
            row |= {"n": len(method.runs), "status": method.status}
            cells = {column.key: group.cell(method.runs, column) for column in columns}
            cells |= {f"{UNMERGED}.{key}": cell for key, cell in group.unmerged(method.runs, columns).items()}
            for key, cell in cells.items():
                row[key] = cell.value if cell.text is None else cell.text
                if cell.text is None:
                    row |= {f"{key}.{end}": getattr(cell, end) for end in ("low", "high", "n")}
            rows.append(row)
    return pd.DataFrame(rows)


def groups_of(folder: Path | str, runs: Mapping[str, Results]) -> list[Group]:
    """The runs below `folder` in groups that one table may hold, in the order of the tables."""
    keys, order = varied(frame_of(runs)), typed_order(folder)
    found = [in_job_order(folder, group) for group in comparable(runs)]
    return [Group(group, order, Path(folder), keys, _apart(group, found[:place])) for place, group in enumerate(found)]


def _apart(group: Mapping[str, Results], earlier: Iterable[Mapping[str, Results]]) -> str:
    """Why a group is no part of the first of the `earlier` ones with the same caption; "" without such a one."""
    run = next(iter(group.values()))
    for others in earlier:
        for name, other in others.items():
            if other.caption == run.caption and (why := why_apart(run, other)):
                more = f"; and {len(why) - MOST_REASONS} more" if len(why) > MOST_REASONS else ""
                return f"NOT COMPARABLE with the table of {quoted(name)}: {'; '.join(why[:MOST_REASONS])}{more}"
    return ""
