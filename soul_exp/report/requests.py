"""The requests of a run that is a sequence of them, as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from soul_exp.report import notes
from soul_exp.report.labels import HEADLINE, finite, headline_first, label_of, quoted, units_of
from soul_exp.report.runs import is_measured
from soul_exp.report.statistics import mean_of
from soul_exp.report.table import Cell, Column, Comparison, Row, Table
from soul_exp.results import COMPARED, UNMERGED, Results

SEQUENCE = (
    "Each request starts from the model that the one before left. Forget is that request, earlier all before it; "
    "the original model is that before the first request, the retrained one has seen none of the requests so far."
)

MODELS = {**{model.key: model.title for model in COMPARED if not model.with_system_prompt}, UNMERGED: UNMERGED}


def comparison(runs: Mapping[str, Results], requested: Sequence[str] | None) -> Comparison:
    """A sequence of requests: each model's metrics on each request, and on those before it."""
    measured = dict.fromkeys(name for run in runs.values() for name in run.metrics["unlearned"])
    usual = [name for name in headline_first(measured) if name in HEADLINE or name.endswith(("_probability", "_rouge"))]
    listed = [name for name in usual if not name.startswith("validation_")] if requested is None else list(requested)
    names = [name for name in listed if requested is not None or is_measured(runs.values(), name)]
    rows = []
    for request, run in runs.items():
        for model, title in MODELS.items():
            values, ends = run.metrics.get(model, {}), run.intervals.get(model, {})
            if not values.keys().isdisjoint(names):
                numbers = (mean_of([finite(values.get(name))], [ends.get(name)]) for name in names)
                rows.append(Row((Cell(request if model == "unlearned" else ""), Cell(title), *numbers)))
    columns = [
        Column("request", "request"),
        Column("model", "model"),
        *(Column(name, label_of(name)) for name in names),
    ]
    found = [*filter(None, map(units_of, runs.values()))]
    found += notes.of_runs({name: replace(run, notes=()) for name, run in runs.items()})
    found += [f"{quoted(request)}: {note}" for request, run in runs.items() for note in run.notes]
    found += notes.of_nulls(list(runs.values()), names, listed)
    table = Table("", tuple(columns), tuple(rows))
    return Comparison(f"{len(runs)} requests in sequence", SEQUENCE, (table,), tuple(dict.fromkeys(found)))
