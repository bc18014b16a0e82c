"""The tables of the report page: the rows, means and notes of `comparison.Group`, and a row for each run."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from soul_exp.report import notes, paper, requests, table
from soul_exp.report.comparison import groups_of
from soul_exp.report.group import Group
from soul_exp.report.labels import ARROWS, DELTA, MIA, NULL, forget_quality_note
from soul_exp.report.rows import Method, text_of
from soul_exp.report.runs import frame_of, is_measured, is_unlearned, tuned_on, varied
from soul_exp.results import REQUEST, UNMERGED, Results

SETTINGS, STATUS, TUNED, SEED = "settings", "status", "tuned", "seeds.seed"
# The columns that are shown before others are asked for; of a group of metrics without any of these, its first `FEW`
SHOWN = {
    *("log10_forget_quality", "forget_accuracy", "forget_rouge", MIA, DELTA),
    *("utility", "retain_accuracy", "authors_accuracy", "facts_accuracy"),
    *("relearn_excess", "rtt_recovery", "uds"),
    *("seconds.unlearn", "peak_memory_gib"),
}
FEW = 3


@dataclass(frozen=True)
class Column(table.Column):
    """A column of the page; its group is one of `table.GROUPS`, or SETTINGS."""

    arrow: str = ""
    version: int | None = None  # of the metric's definition
    read: str = ""  # from results.json; {model} stands for the model
    is_metric: bool = False
    shown: bool = False


@dataclass(frozen=True)
class Cell:
    """A value in a table: its text, what it is sorted by (None: last), and what stands below it."""

    text: str
    value: float | str | None
    under: str = ""
    source: Mapping[str, str] = field(default_factory=dict)  # data-run and data-model, or data-method
    is_bad: bool = False


@dataclass(frozen=True)
class _Requests(Group):
    """The requests of a run that is a sequence of them: each is a row, and has compared models of its own."""

    @functools.cached_property
    def methods(self) -> list[Method]:
        return [self.alone(name) for name in self.runs]


def tables(folder: Path, runs: Mapping[str, Results]) -> list[dict[str, Any]]:
    """The tables of each group of comparable runs: "columns", "rows" of runs, "means" of methods, "references", notes,
    and "published" numbers beside ours.

    What shares a row, means, intervals, references and notes are those of `soul_exp.tables`.
    """
    if all(name.startswith(REQUEST) for name in runs):
        return [_tables(_Requests(runs, {}, folder, varied(frame_of(runs)), ""))]
    return [_tables(group) for group in groups_of(folder, runs)]


def _tables(group: Group) -> dict[str, Any]:
    columns = _columns(group)
    measured = [column for column in columns if column.group != SETTINGS]
    titles = dict(zip(_titles(group), group.methods, strict=True))
    numbers = {t: {c.key: group.cell(method.runs, c) for c in measured} for t, method in titles.items()}
    method_of: dict[str, str] = {name: title for title, method in titles.items() for name in method.runs}
    place = {name: number for number, name in enumerate(method_of)}
    first_of = {name: first for first, others in group.repeats.items() for name in others if name not in method_of}
    method_of |= {name: method_of[first] for name, first in first_of.items()}
    place |= {name: place[first] for name, first in first_of.items()}
    names = sorted(group.runs, key=lambda name: place[name])
    labels = _labels(group, names)
    keys = list(dict.fromkeys(method.key for method in group.methods))
    num, first = len(group.runs), next(iter(group.runs))
    usual = group.columns_of(group.usual)
    return {
        "caption": group.first.caption,
        "title": f"{first if num == 1 else f'{num} runs'}: {group.first.caption}",
        "labels": labels,
        "runs": names,
        "columns": columns,
        "rows": [
            (name, *row)
            for name in names
            for row in _rows(group, columns, group.alone(name), labels[name], {"data-run": name})
        ],
        "means": [
            (title, method.runs, *row)
            for title, method in titles.items()
            for row in _rows(group, columns, method, title, {"data-method": title}, numbers[title])
        ],
        "numbers": [
            {"label": t, "runs": method.runs, "place": keys.index(method.key), "numbers": _ends(numbers[t])}
            for t, method in titles.items()
        ],
        "references": list(_references(group, [column for column in columns if column.is_metric])),
        "published": [] if isinstance(group, _Requests) else group.published(),
        "targets": {} if isinstance(group, _Requests) else _targets(group, measured),
        "notes": [
            *([requests.SEQUENCE] if isinstance(group, _Requests) else []),
            group.about,
            forget_quality_note(group.first.dialect),
            notes.of_cost(group.runs),
            *group.notes_on(usual, [column for column in usual if is_measured(group.runs.values(), column.key)]),
        ],
    }


# --- names --------------------------------------------------------------------------------------------------------


def _title(group: Group, method: Method) -> str:
    """What tells a row from the others: "adam, gamma 10". Of a request or a single checkpoint it is the run.

    Of a single row it is the loss and the optimizer.
    """
    name, run = method.runs[0], group.runs[method.runs[0]]
    if isinstance(group, _Requests):
        return name
    parts = []
    for column, text in ((group.keys[place], method.key[place]) for place in group.places):
        is_choice = f"choices.{column.key}" in group.frame or text == "checkpoint"
        parts += [text if is_choice else f"{column.label.rpartition('.')[2]} {text}"] * (text != NULL)
    if parts:
        return ", ".join(parts)
    if not is_unlearned(run):
        return name if len(method.runs) == 1 else "checkpoint"
    return " ".join(run.choices[key] for key in ("loss", "optimizer") if run.choices.get(key)) or name


def _titles(group: Group) -> Iterator[str]:
    """The names of the methods, each once; the diverged seeds of a method say so."""
    seen: dict[str, int] = {}
    for method in group.methods:
        is_diverged = group.runs[method.runs[0]].status == "diverged"
        title = f"{_title(group, method)}{' (diverged)' if is_diverged else ''}"
        seen[title] = seen.get(title, 0) + 1
        yield title if seen[title] == 1 else f"{title} ({seen[title]})"


def _labels(group: Group, names: Sequence[str]) -> dict[str, str]:
    """The names of the runs: that of their row, with the seed where it has several; where two agree, the folder's."""
    several = {name for members in group.members.values() if len(members) > 1 for name in members}
    several -= {*names} if isinstance(group, _Requests) else set()
    found = {}
    for name in names:
        title = _title(group, group.alone(name))
        found[name] = f"{title}, seed {group.runs[name].seeds.get('seed')}" if name in several else title
    return {name: name if [*found.values()].count(label) > 1 else label for name, label in found.items()}


# --- columns and cells --------------------------------------------------------------------------------------------


def _columns(group: Group) -> list[Column]:
    """All columns, by group; the status is shown where a run did not simply finish."""
    keys = dict.fromkeys(["choices.loss", "choices.optimizer", *group.choices, *group.by, *group.chosen])
    found = [Column(STATUS, "status", SETTINGS, read=STATUS, shown={m.status for m in group.methods} != {"finished"})]
    found += [Column(key, key.partition(".")[2], SETTINGS, read=key) for key in (*keys, SEED)]
    found += [Column(TUNED, "tuned on", SETTINGS, read=TUNED)] if group.has_tuned_on else []
    versions = {name: version for run in group.runs.values() for name, version in run.metric_versions.items()}
    metrics = group.columns_of(dict.fromkeys([*group.usual, *group.measured]))
    known = [of for of in metrics if is_measured(group.runs.values(), of.key)]
    shown = {of.key for of in known} & {*SHOWN, *paper.columns(group)}
    for name in table.GROUPS:
        usual = [of.key for of in known if of.group == name and of.key in group.usual]
        shown |= set() if shown & {*usual} else {*usual[:FEW]}
    for of in metrics:
        read = f"metrics.{{model}}.{of.key}"
        found.append(
            Column(
                of.key,
                of.label,
                of.group,
                of.direction,
                arrow=ARROWS[of.direction],
                version=versions.get(MIA if of.key == DELTA else of.key),
                read=f"metrics.retrained.{MIA} - metrics.{{model}}.{MIA}" if of.key == DELTA else read,
                is_metric=True,
                shown=of.key in shown,
            )
        )
    found += [Column(of.key, of.label, of.group, read=of.key, shown=of.key in SHOWN) for of in group.costs]
    return sorted(found, key=lambda column: (SETTINGS, *table.GROUPS).index(column.group))


def _rows(
    group: Group,
    columns: Sequence[Column],
    method: Method,
    label: str,
    source: Mapping[str, str],
    numbers: Mapping[str, table.Cell] | None = None,
) -> Iterator[tuple[str, dict[str, Cell]]]:
    """Label and cells, by column, of a row of runs (`numbers` where they are known), and of their unmerged adapters."""
    found = {}
    for column in columns:
        if column.key == STATUS:
            cell = Cell(method.status, method.status, is_bad=not method.is_sound)
        elif column.group == SETTINGS:
            cell = _setting(group, method.runs, column.key)
        else:
            cell = _shown(numbers[column.key] if numbers else group.cell(method.runs, column))
        found[column.key] = replace(cell, source=source)
    yield label, found
    if apart := group.unmerged(method.runs, columns):
        source = {**source, "data-model": UNMERGED}
        yield f"{label}, unmerged", {key: replace(_shown(cell), source=source) for key, cell in apart.items()}


def _setting(group: Group, names: Sequence[str], key: str) -> Cell:
    """The value of an option, or the values of several runs."""
    values = [tuned_on(group.runs[name]) if key == TUNED else group.values[name].get(key) for name in names]
    texts = dict.fromkeys(map(text_of, values))
    is_number = len(texts) == 1 and isinstance(values[0], int | float) and not isinstance(values[0], bool)
    text = ", ".join(texts)
    return Cell(text, None if text == NULL else float(str(values[0])) if is_number else text)


def _shown(cell: table.Cell) -> Cell:
    if cell.text is not None:  # a number of steps, or two
        return Cell(cell.text, float(cell.text) if cell.text.isdigit() else cell.text or None)
    text, _, under = cell.written.partition(" ")
    return Cell(text, cell.value, under)


def _ends(numbers: Mapping[str, table.Cell]) -> dict[str, list[float | None]]:
    """Key -> value, low and high of each cell that has a value."""
    return {key: [cell.value, cell.low, cell.high] for key, cell in numbers.items() if cell.value is not None}


def _targets(group: Group, columns: Sequence[Column]) -> dict[str, dict[str, list[float | None]]]:
    """Compared model -> metric -> value, low, high."""
    metrics = [column for column in columns if column.is_metric]
    keys = [column.key for column in metrics]
    references = {model.key: group.reference(model.key, metrics) for model in group.references}
    return {model: _ends(dict(zip(keys, cells, strict=True))) for model, cells in references.items()}


def _references(group: Group, columns: Sequence[Column]) -> Iterator[tuple[str, dict[str, Cell]]]:
    """A row for each compared model, or of a sequence for that of each request."""
    for model in group.references:
        for request in group.runs if isinstance(group, _Requests) else [None]:
            cells = {}
            for column in columns:
                name = request or group.run_of_reference(model.key, column.key)
                if name is not None:
                    cell = _shown(group.cell([name], column, model.key))
                    cells[column.key] = replace(cell, source={"data-run": name, "data-model": model.key})
            yield f"{model.title}{f', {request}' if request else ''}", cells
