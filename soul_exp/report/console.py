"""On a console: the models that one run compares, side by side, and the rows of a folder of runs."""

import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from soul_exp.errors import counted
from soul_exp.metrics.dialects import OURS
from soul_exp.metrics.suite import MEASURES
from soul_exp.report import paper
from soul_exp.report.comparison import comparisons
from soul_exp.report.labels import (
    ARROWS,
    DETAILS,
    HEADLINE,
    NULL,
    ceiling_of,
    declared,
    dialect_note,
    finite,
    headline_first,
    label_of,
    number,
    units_of,
    with_interval,
)
from soul_exp.report.runs import find, is_measured, is_unlearned
from soul_exp.report.table import CHOSEN_GROUP, TIED, Table
from soul_exp.results import COMPARED, UNMERGED, Results, metric_entries
from soul_exp.results import HEADLINE as results_headline

WIDTH = 100  # columns of a console
LEAST_LABEL, WITH_INTERVAL = 28, 21  # columns of it: of a label, and of a value with its interval
HINTS: Mapping[str | None, str] = {
    "higher": "higher is better",
    "lower": "lower is better",
    "nearest": "retrained = target value",
    None: "",
}
FEW = ("log10_forget_quality", "utility", "relearn_excess", "mia_auc")  # metrics of the summary of a folder
WARNINGS = ("NOT COMPARABLE", "DIFFERENT", "DIVERGED", "COLLAPSED", "the same configuration", "without results")
LONGEST = 28  # characters of a cell that says which row it is
Row = tuple[str, Sequence[str], str]  # label, one cell per model, hint


def comparison(results: Results, said: Collection[str] = ()) -> str:
    """The metrics of one run, its models side by side, in at most 100 columns; a null has its reason below.

    A metric that no model has is only named, with its reason. Below that are the notes of the results, but for those
    that were `said` before.
    """
    titles = _titles(results)
    measured = headline_first(name for model in titles for name in results.metrics[model])
    names = [name for name in measured if not DETAILS.match(name)]
    shown = [name for name in names if is_measured([results], name)]
    wide = any(results.intervals.get("unlearned", {}).values())
    widths = [WITH_INTERVAL if wide and model == "unlearned" else max(11, len(titles[model]) + 1) for model in titles]
    hints = HINTS if LEAST_LABEL + sum(widths) + 2 + max(map(len, HINTS.values())) <= WIDTH else ARROWS
    rows = [*_metric_rows(results, titles, shown, hints), *_suite_rows(results, titles, hints)]
    legend = [", ".join(f"{ARROWS[key]} {HINTS[key]}" for key in HINTS if key)] if hints is ARROWS else []
    more = [f"{len(measured) - len(names)} more metrics are in results.json"] if len(measured) > len(names) else []
    below = [*legend, *ceiling_of(results), *_intervals(results), *_null_reasons(results, titles, names), *more]
    if results.collapsed is None and (why := results.reasons.get("collapsed")):
        below.append(f"{NULL} whether it collapsed: {why}")
    below += [*_unmerged(results), _cost(results), *_evaluation(results)]
    below += [note for note in results.notes if note not in said]
    table = _aligned(list(titles.values()), rows, widths, max(map(len, hints.values())))
    return "\n".join([*wrapped(_above(results)), "", *table, "", *wrapped(below)])


def headline(results: Results) -> str:
    """The headline metrics of the unlearned model, and whether it diverged or collapsed, on one line."""
    given = {name: finite(getattr(results, name)) for name in results_headline}
    shown = [f"{label_of(name)} {number(value)}" for name, value in given.items() if value is not None]
    labels = [*(["DIVERGED"] if results.status == "diverged" else []), *(["COLLAPSED"] if results.collapsed else [])]
    return ", ".join([*labels, *shown]) or "no headline metric"


def summary(folder: Path | str, metrics: Sequence[str] | None = None) -> str:
    """The rows of the runs below `folder`: of FEW as many columns as fit into 100, or those of `metrics`; warnings.

    Of runs with paper=true: all of the paper's columns, and published numbers beside ours. Raises UsageError as
    `comparisons` does.
    """
    runs = find(folder)[0].values()
    few = [name for name in FEW if is_measured(runs, name)]
    lines = []
    for found in comparisons(folder, metrics, few):
        lines += wrapped([found.title])
        own = [table for table in found.tables if table.title in (paper.OWN, paper.BESIDE)]
        for table in own:
            lines += ["", *wrapped([f"{table.title}. {table.about}".rstrip()]), ""]
            lines += [*_table(table, None), ""] if table.columns else []
        if found.tables and not own:
            lines += ["", *_table(found.tables[0], WIDTH if metrics is None else None), ""]
        lines += wrapped(note for note in found.notes if note.startswith(WARNINGS))
    legend = f"* best, {TIED} within noise of it; [low, high]: 95 % interval; all columns, notes and tests: table.md"
    return "\n".join([*lines, *wrapped([f"{legend} and others in {folder}"])]) + "\n"


def _table(table: Table, width: int | None) -> list[str]:
    """The lines of a table; what does not fit into `width` is left out: what trials chose, then the last metrics."""
    columns = [
        [column.title, *(f"{row.cells[place].written}{marks[row.cells[place].mark]}" for row in table.rows)]
        for marks in [{"": "", "best": " *", "tied": f" {TIED}"}]
        for place, column in enumerate(table.columns)
    ]
    if width is not None:
        columns = [[c if len(c) <= LONGEST else f"{c[: LONGEST - 1]}…" for c in column] for column in columns]
    widths = [max(map(len, column)) for column in columns]
    kept = [*range(len(columns))]
    while width is not None and sum(widths[place] + 2 for place in kept) > width + 2:
        chosen = [place for place in kept if table.columns[place].group == CHOSEN_GROUP]
        metrics = [place for place in kept if table.columns[place].group]
        if not metrics:
            break
        kept.remove((chosen or metrics)[-1])
    return [
        "  ".join(f"{columns[place][row]:<{widths[place]}}" for place in kept).rstrip()
        for row in range(len(columns[0]))
    ]


def wrapped(texts: Iterable[str], width: int = WIDTH) -> list[str]:
    """The lines of the texts, each at most `width` columns wide; an empty text has none."""
    return [line for text in texts for line in textwrap.wrap(text, width)]


def _titles(results: Results) -> dict[str, str]:
    """Model -> title of its column, of the models that were measured."""
    is_pair = is_unlearned(results) and "original" in results.metrics
    before, after = ("before", "after") if is_pair else ("original", "model")
    titles = {each.key: each.title for each in COMPARED} | {"original": before, "unlearned": after}
    return {model: title for model, title in titles.items() if model in results.metrics}


def _above(results: Results) -> Iterator[str]:
    yield results.caption
    yield ", ".join(f"{group} {choice}" for group, choice in results.choices.items() if choice != "none")
    if (dialect := results.config.get("dialect", OURS)) != OURS:
        yield dialect_note(dialect)
    if results.status == "diverged":
        yield f"*** DIVERGED: {results.reason} *** The numbers are those of the model where it stopped."
    if results.collapsed:
        found = "; ".join(f"{probe}: {why}" for probe, why in results.collapsed.items())
        yield f"*** COLLAPSED: the model's free answers are those of a ruined one *** {found}"
    if is_unlearned(results):
        yield f"tuned on: {results.tuned}" if results.tuned else "untuned: no entry of conf/tuned/ chose these numbers"


def _metric_rows(
    results: Results, titles: Mapping[str, str], names: Sequence[str], hints: Mapping[str | None, str]
) -> Iterator[Row]:
    """A row per metric; metrics with the same first word stand under it, the headline ones alone."""
    words = {name: name if name in HEADLINE else name.partition("_")[0] for name in names}
    in_group = list(words.values())
    metrics, dialect, heading = metric_entries(results), results.config.get("dialect", OURS), ""
    # a group stands where its first metric does
    for name in sorted(names, key=lambda name: in_group.index(words[name])):
        first, _, rest = name.partition("_")
        is_grouped = name not in HEADLINE and rest != "" and in_group.count(first) > 1
        if is_grouped and first != heading:
            yield label_of(first), [""] * len(titles), ""
        heading = first if is_grouped else ""
        unit, direction = declared(metrics, name, dialect)
        label = f"  {label_of(rest, unit)}" if is_grouped else label_of(name, unit)
        values = {model: finite(results.metrics[model].get(name)) for model in titles}
        has_target = direction != "nearest" or "retrained" in titles
        ends = results.intervals.get("unlearned", {}).get(name)
        cells = [_cell(value, ends if model == "unlearned" else None) for model, value in values.items()]
        yield f"{label}{_sample_size(results, name)}", cells, hints[direction] if has_target else ""
        start = values.get("original")
        if name == "utility" and start:
            shares = [NULL if value is None else f"{100 * value / start:.1f} %" for value in values.values()]
            yield f"  kept, as a share of {titles['original']}", shares, ""


def _cell(value: float | None, ends: Sequence[float] | None) -> str:
    text = with_interval(value, ends)
    return text if len(text) < WITH_INTERVAL else number(value)


def _sample_size(results: Results, name: str) -> str:
    """The number of examples of a test's sample."""
    probe = "validation_forget" if name.startswith("validation_") else "forget"
    size = results.samples.get(probe, {}).get("examples") if name.endswith("forget_quality") else None
    return f", n={size}" if size else ""


def _intervals(results: Results) -> Iterator[str]:
    """What the intervals are over, and which metrics of the unlearned model have none."""
    if units := units_of(results):
        yield units
        metrics: dict[str, list[str]] = {}  # reason -> labels
        for name, reason in results.no_interval.items():
            if name in results.metrics["unlearned"]:
                metrics.setdefault(reason, []).append(label_of(name))
        yield from (f"no interval: {', '.join(labels)}: {reason}" for reason, labels in metrics.items())


def _unmerged(results: Results) -> Iterator[str]:
    """What attacks came to where the adapter stays beside its base."""
    given = results.metrics.get(UNMERGED, {})
    shown = [f"{label_of(name)} {number(finite(value))}" for name, value in given.items()]
    if shown:
        yield f"attacked with the adapter unmerged: {', '.join(shown)}"


def _suite_rows(results: Results, titles: Mapping[str, str], hints: Mapping[str | None, str]) -> list[Row]:
    suites = [results.suite.get(model, {}) for model in titles]
    rows: list[Row] = []
    for task in dict.fromkeys(task for suite in suites for task in suite):
        for measure, scale in MEASURES.items():
            values = [suite.get(task, {}).get(measure) for suite in suites]
            if any(value is not None for value in values):
                cells = [number(finite(value)) for value in values]
                rows.append((f"  {task} {measure}".replace("_", " "), cells, hints[scale.better]))
    return [(f"utility suite {results.config['utility_suite']}", [""] * len(titles), ""), *rows] if rows else []


def _aligned(titles: Sequence[str], rows: Sequence[Row], widths: Sequence[int], hint_width: int) -> list[str]:
    room = WIDTH - sum(widths) - 2 - hint_width
    label_width = max(LEAST_LABEL, min(room, 36, max((len(label) for label, _, _ in rows), default=0)))

    def line(label: str, cells: Sequence[str], hint: str) -> str:
        numbers = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return f"{label[:label_width]:<{label_width}}{numbers}  {hint}".rstrip()

    return [line("", titles, ""), *(line(*row) for row in rows)]


def _null_reasons(results: Results, titles: Mapping[str, str], names: Iterable[str]) -> list[str]:
    metrics: dict[tuple[str, str], list[str]] = {}  # (titles of models, reason) -> labels
    for name in names:
        if empty := [model for model in titles if finite(results.metrics[model].get(name)) is None]:
            known = [results.reasons.get(key) for key in (*(f"{model}.{name}" for model in empty), name)]
            reason = "; ".join(dict.fromkeys(filter(None, known))) or "no reason is given"
            metrics.setdefault((", ".join(titles[model] for model in empty), reason), []).append(label_of(name))
    everywhere = ", ".join(titles.values())
    return [
        f"not measured: {', '.join(labels)}: {reason}"
        if models == everywhere
        else f"{NULL} {', '.join(labels)} ({models}): {reason}"
        for (models, reason), labels in metrics.items()
    ]


def _evaluation(results: Results) -> list[str]:
    """What each stage of the evaluation of each model took, and whether in this run or before."""
    titles = {model: model.replace("_", " ") for model in results.evaluation_seconds} | _titles(results)
    of_models = [
        f"{titles[model]}{' (cached)' if model in results.cached else ''} "
        + ", ".join(f"{stage} {number(value)}" for stage, value in stages.items())
        for model, stages in results.evaluation_seconds.items()
        if stages
    ]
    return [f"seconds of evaluation: {'; '.join(of_models)}"] if of_models else []


def _cost(results: Results) -> str:
    seconds = ", ".join(f"{stage} {number(value)} s" for stage, value in results.seconds.items())
    last = [f"{name} {number(finite(results.training.get(name)))}" for name in ("win_rate", "effective_update")]
    return f"{seconds}; {counted(results.num_steps, 'step')}; {', '.join(last)}"
