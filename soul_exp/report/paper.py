"""The tables of SOUL's paper: their columns, and published numbers beside ours. Runs ask for both by paper=true."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from importlib.resources.abc import Traversable

from soul_exp.errors import UsageError, explained, short
from soul_exp.metrics.dialects import DIALECTS
from soul_exp.report.labels import NULL
from soul_exp.report.rows import Method, Rows
from soul_exp.report.table import Cell, Column, Row, Table
from soul_exp.results import Results

COLUMNS = {  # task -> metrics, in the order of the paper's table
    "tofu": "forget_quality forget_accuracy forget_rouge mia_auc retain_accuracy retain_rouge authors_accuracy "
    "authors_rouge facts_accuracy facts_rouge",
    "copyright": "forget_100_bleu forget_100_rouge forget_300_bleu forget_300_rouge suite_perplexity utility",
    "detox": "rtp_toxicity prompts_toxicity suite_perplexity utility",
}
PUBLISHED = files(__package__).joinpath("published")  # TASK.csv
OWN, BESIDE = "The paper's columns", "Published numbers beside ours"  # titles of tables
NONE_CONFIRMED = "No published number of this task is confirmed, so only ours stand here."
SAME, ALL, NOT_RUN, NO_COUNTERPART = "nothing", "all four", "not run", "no counterpart"
CellOf = Callable[[Sequence[str], str], Cell]  # of runs and a metric: the mean


@dataclass(frozen=True)
class Published:
    """A published number. A text is empty where nobody has confirmed what its source means."""

    method: str  # as method= names it, by this loss and this optimizer
    loss: str
    optimizer: str
    metric: str  # as the source names it
    value: str  # with the source's digits
    unit: str
    model: str  # as model= names it, where it is one of these
    data: str  # as `data_of` names them, where they are the same
    dialect: str
    ours: str  # the metric of ours that is the same in that dialect, or as near as `definition` says; empty: none is
    definition: str  # how it is defined, unless as `ours`
    source: str


def columns(rows: Rows) -> list[str]:
    """The metrics of the paper's table of the task; none unless a run has paper=true."""
    is_asked = any(run.config.get("paper") for run in rows.runs.values())
    return COLUMNS.get(rows.first.choices.get("task", ""), "").split() if is_asked else []


def beside(rows: Rows, cell: CellOf) -> list[Table]:
    """A table of each published number of the task beside ours; none unless a run has paper=true.

    A row for each number, and for each of our rows that is of its method. Raises UsageError for a broken file.
    """
    if not columns(rows):
        return []
    known = read(PUBLISHED.joinpath(f"{rows.first.choices['task']}.csv"))
    if not known:
        return [Table(BESIDE, (), (), NONE_CONFIRMED)]
    found = [_row(number, method, rows, cell) for number in known for method in _methods(rows, number)]
    num_same = sum(row.cells[-2].text == SAME for row in found)
    definitions: dict[tuple[str, str], dict[str, None]] = {}  # source, definition -> metrics
    for of in known:
        if of.definition:
            definitions.setdefault((of.source, of.definition), {})[of.metric] = None
    about = (
        f"Published: {', '.join(dict.fromkeys(of.data for of in known))}. Ours: model "
        f"{', '.join(dict.fromkeys(run.choices.get('model', NULL) for run in rows.runs.values()))}, data "
        f"{data_of(rows.first)}, dialect {rows.first.dialect}. Both are the same quantity where "
        f"model, data, dialect and definition are: in {num_same} of {len(found)} rows. {NULL} under theirs: not "
        "confirmed."
    )
    if definitions:
        listed = (f"{' and '.join(of)} ({source}): {text}" for (source, text), of in definitions.items())
        about += f" Definitions: {'; '.join(listed)}."
    theirs = ("method", "metric", "published", "their model", "their dialect", "source", "ours")
    columns_of = [*(Column(name, name) for name in theirs), *(rows.keys[place] for place in _places(rows))]
    header = (*columns_of, Column("unequal", "unequal or unknown"), Column("status", "status"))
    return [Table(BESIDE, header, tuple(found), about)]


def data_of(run: Results) -> str:
    """What the run unlearned, by its options: "tofu hub forget10"."""
    task = run.config["task"]
    source = str(task.get("source") or "").rpartition("/")[2]
    return " ".join(filter(None, (run.choices.get("task"), source, task.get("split"))))


def read(path: Traversable) -> list[Published]:
    """The published numbers in a CSV file; none without the file. Raises UsageError for a broken line."""
    if not path.is_file():
        return []
    names = [field.name for field in fields(Published)]
    with explained((UnicodeDecodeError, csv.Error), str(path), "correct it"):
        header, *lines = [*csv.reader(path.read_text(encoding="utf-8").splitlines(), strict=True)] or [[]]
    if header != names:
        raise UsageError(f"{path} begins with {short(','.join(header))}: expected {','.join(names)}")
    found = []
    for number, line in enumerate(lines, 2):
        at = f"{path}, line {number}"
        if len(line) != len(names):
            raise UsageError(f"{at} has {len(line)} values: expected {len(names)}, in quotes where one has a comma")
        published = Published(*line)
        with explained(ValueError, f"{at}: value is {short(published.value)}", "expected a finite number"):
            if not math.isfinite(float(published.value)):
                raise ValueError("it is not finite")
        if absent := [name for name in ("method", "metric", "source") if not getattr(published, name)]:
            raise UsageError(f"{at}: {absent[0]} is empty, expected a text")
        if published.dialect not in ("", *DIALECTS):
            raise UsageError(f"{at}: dialect is {short(published.dialect)}, expected one of {', '.join(DIALECTS)}")
        if not published.ours and not published.definition:
            raise UsageError(f"{at}: ours and definition are empty, expected a metric, or why none is the same")
        found.append(published)
    return found


def _methods(rows: Rows, number: Published) -> Sequence[Method | None]:
    """Our rows that are of the method of a published number; None alone if there is none."""
    named = {"choices.loss": number.loss, "choices.optimizer": number.optimizer}  # a checkpoint has neither
    return [of for of in rows.methods if named.items() <= rows.values[of.runs[0]].items()] or [None]


def _places(rows: Rows) -> list[int]:
    """The places of the keys that tell our rows of a method apart."""
    return [place for place, column in enumerate(rows.keys) if column.key not in ("loss", "optimizer")]


def _row(number: Published, method: Method | None, rows: Rows, cell: CellOf) -> Row:
    theirs = (number.method, number.metric, f"{number.value} {number.unit}".rstrip(), number.model, number.dialect)
    texts = [*(Cell(text or NULL) for text in theirs), Cell(number.source)]
    if method is None:
        return Row((*texts, Cell(NOT_RUN), *[Cell(NULL)] * len(_places(rows)), Cell(NULL), Cell("")))
    run = rows.runs[method.runs[0]]
    ours = cell(method.runs, number.ours) if number.ours else Cell(NO_COUNTERPART)
    pairs = (
        ("model", number.model, run.choices.get("model")),
        ("data", number.data, data_of(run)),
        ("dialect", number.dialect, run.dialect),
        ("definition", number.definition, ""),
    )
    unequal = [what for what, of_theirs, of_ours in pairs if of_theirs != of_ours]
    said = ALL if len(unequal) == len(pairs) else ", ".join(unequal) or SAME
    about = (*(method.key[place] for place in _places(rows)), said, method.status)
    return Row((*texts, ours, *map(Cell, about)), method.is_sound)
