"""One self-contained HTML page about the runs of a folder: what they measured, and what their models answered."""

import base64
import gzip
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from soul_exp.files import json_lines
from soul_exp.report.answers import answers_of
from soul_exp.report.frames import AT_STEP
from soul_exp.report.labels import finite, on_one_line, spans
from soul_exp.report.page_table import tables
from soul_exp.report.runs import find, folder_of, number_of, with_delta
from soul_exp.results import COMPARED, TASK, Results, attack_points, typed

OWN = ("page.css", "page.js", "page_figures.js")  # beside this file, with the template page.html
MOST_STEPS = 300  # of a run in a curve; of more, every k-th and the last
DIGITS = 6  # of the numbers in curves
FOR_FIGURES = ("caption", "runs", "labels", "numbers", "targets")  # of a table


def html(folder: Path, beside: Path) -> str:
    """The page about the runs below `folder`, to be written into the folder `beside`; it needs no other file.

    All texts that a model or a file of somebody else gave are escaped; its policy lets the page load nothing and run
    its own two scripts alone. Raises UsageError if there are no runs or a file of a run is broken.
    """
    runs, missing = find(folder)
    folders = {name: folder_of(folder, name) for name in runs}
    groups = tables(folder, runs)
    answers = answers_of(runs, folders)
    data = {
        "name": on_one_line(folder.resolve().name),
        "models": {model.key: model.title for model in COMPARED},
        "columns": [{column.key: asdict(column) for column in group["columns"]} for group in groups],
        "groups": [{key: group[key] for key in FOR_FIGURES} for group in groups],
        "runs": {name: _run(run, folders[name], beside, answers["records"][name]) for name, run in runs.items()},
    }
    css, *js = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in OWN)
    own = {"css": css, "js": "\n".join(js)}
    charts = get_plotlyjs()
    scripts = " ".join(f"'{_sha256(text)}'" for text in (own["js"], charts))
    styles = " ".join(f"'{_sha256(text)}'" for text in (own["css"], ""))  # Plotly fills an empty style sheet by rules
    environment = Environment(loader=PackageLoader("soul_exp.report", "."), autoescape=True, undefined=StrictUndefined)
    environment.filters["spans"] = spans
    return environment.get_template("page.html").render(
        title=f"{data['name']}: {len(runs)} run{'' if len(runs) == 1 else 's'}",
        policy="; ".join(
            [
                *("default-src 'none'", f"script-src {scripts}", f"style-src {styles}", "img-src data:"),
                *("base-uri 'none'", "form-action 'none'"),
            ]
        ),
        **own,
        packs={"data": _packed(data), "answers": _packed(answers), "plotly": _packed(charts)},
        groups=groups,
        missing=missing,
    )


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _packed(value: Any) -> str:
    """`value`, a text or what JSON can hold, as base64 of its gzip: letters that end no element of a page."""
    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


# --- what the figures and the provenance are made from ------------------------------------------------------------


def _run(run: Results, folder: Path, beside: Path, records: Mapping[str, list[Any]]) -> dict[str, Any]:
    where = folder.resolve()
    is_below = where.is_relative_to(beside.resolve())
    return {
        "link": quote(where.relative_to(beside.resolve()).as_posix() + "/") if is_below else None,
        "status": run.status,
        "reason": run.reason,
        "collapsed": run.collapsed,
        "metrics": with_delta(run),
        "intervals": run.intervals,
        "reasons": run.reasons,
        "no_interval": run.no_interval,
        "steps": {of: _curve(list(json_lines(folder / file))) for file, of in AT_STEP.items()},
        "attacks": _attacks(run),
        "about": _provenance(run, folder),
        "records": [[file, *of] for file, of in records.items()],
    }


def _curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The numbers of logged steps as columns, at most about MOST_STEPS of them; and whether each had collapsed."""
    kept = list(rows[:: math.ceil(len(rows) / MOST_STEPS) or 1])
    kept += [rows[-1]] if rows and kept[-1] is not rows[-1] else []
    names = dict.fromkeys(name for row in kept for name, value in row.items() if finite(value) is not None)
    found: dict[str, list[Any]] = {on_one_line(name): [_short(row.get(name)) for row in kept] for name in names}
    if any(row.get("collapsed") for row in kept):
        found["collapsed"] = [on_one_line(str(row.get("collapsed") or "")) for row in kept]
    return found


def _short(value: Any) -> float | None:
    return None if (found := finite(value)) is None else float(f"{found:.{DIGITS}g}")


def _attacks(run: Results) -> dict[str, Any]:
    """attack -> branch -> model -> measure -> [[point, value, whether it is informative], ...], by increasing point."""
    found: dict[str, Any] = {attack: {} for attack in run.attacks}
    for attack, model, branch, point, measures, is_informative in attack_points(run):
        of_model = found[attack].setdefault(branch, {}).setdefault(model, {})
        for measure, value in measures.items():
            curve = of_model.setdefault(measure, [])
            curve.append([point, _short(value), is_informative])
            curve.sort(key=lambda of: (isinstance(number_of(of[0]), str), number_of(of[0])))
    return found


def _provenance(run: Results, folder: Path) -> list[tuple[str, str]]:
    """Where the numbers of a run come from, as names and texts."""
    listed = {"model": run.choices, "seeds": run.seeds, "data": run.data_hashes, "versions": run.versions}
    return [
        ("commit", run.commit or "unknown: not run from a git checkout"),
        ("code, SHA-256", str(run.sha256.get("code") or "not recorded")),
        ("hardware", run.hardware or "not recorded"),
        ("typed", _typed(folder)),
        ("tuned on", run.tuned or "untuned"),
        *((name, "\n".join(f"{key} {value}" for key, value in of.items())) for name, of in listed.items()),
        ("dialect", run.dialect),
        ("version of the task", str(run.metric_versions.get(TASK, "not recorded"))),
        *(("note", note) for note in run.notes),
    ]


def _typed(folder: Path) -> str:
    """The command of this run."""
    options = typed(folder)
    if options is None:
        return "not recorded in the run folder"
    return on_one_line(shlex.join(["python", "-m", "soul_exp", *options]))
