"""The share of each independent unit, such as an author, in a metric of a run: what methods are compared by."""

from pathlib import Path
from typing import Any

import numpy as np

from soul_exp.errors import explained
from soul_exp.files import json_lines
from soul_exp.metrics.answers import MATRICES, TEXTS, Answers
from soul_exp.metrics.dialects import DIALECTS
from soul_exp.metrics.uncertainty import rows_of_units
from soul_exp.report.labels import finite, function_of
from soul_exp.results import Results

MOST_OFF, ROUNDING = 0.1, 1e-9  # of the half-width of a metric's interval; of sums
RECORDS = "records"  # in a run's folder
BROKEN = (ValueError, KeyError, TypeError, OSError, AttributeError)


class Units:
    """The metrics by unit of a model of the run in `folder`; records are read once, when first asked for."""

    def __init__(self, folder: Path, run: Results, model: str = "unlearned") -> None:
        self.folder, self.run, self.model = folder, run, model
        self._answers: dict[str, Answers | None] = {}

    def of(self, name: str) -> dict[str, float | None]:
        """Unit -> the value of metric `name`; empty for one that has none by unit.

        Of an attack it is the jackknife's pseudo-value, as results.json states it, where these add up to the metric. A
        metric of the answers to one probe is computed from the records of the unit's items alone. Raises UsageError for
        records that are broken.
        """
        if self.model == "unlearned" and name in self.run.unit_values:
            return dict(self.run.unit_values[name]) if self.add_up(name) else {}
        entry = (self.run.config["task"].get("metrics") or {}).get(name, {})
        metric = function_of(str(entry.get("_target_", "")), self.run.dialect)
        if metric is None or "answers" not in entry:
            return {}
        answers = self._of_probe(str(entry["answers"]))
        if answers is None:
            return {}
        names = [f"item {item}" for item in range(len(answers))] if answers.unit is None else answers.unit
        constants = {key: value for key, value in entry.items() if key not in ("_target_", "_partial_", "answers")}
        rows = zip(dict.fromkeys(names), rows_of_units(answers), strict=True)
        try:
            return {unit: finite(metric(answers.take(np.asarray(of)), **constants)) for unit, of in rows}
        except ValueError:  # its items lack what the metric reads, or are too few for a value
            return {}

    def add_up(self, name: str) -> bool:
        """Whether the mean of the values by unit is the metric of the attack, but for a tenth of its half-width.

        It is not where a unit changes the metric in steps or not at all, as with a least value over branches.
        """
        shares = [finite(share) for share in self.run.unit_values[name].values()]
        value = finite(self.run.metrics["unlearned"].get(name))
        low, high = self.run.intervals.get("unlearned", {}).get(name) or (0.0, 0.0)
        if value is None or not shares or None in shares:
            return False
        return abs(float(np.mean(np.array(shares, dtype=float))) - value) <= MOST_OFF * (high - low) / 2 + ROUNDING

    def _of_probe(self, probe: str) -> Answers | None:
        if probe not in self._answers:
            found = _read(self.folder / RECORDS / self.model / f"{probe}.jsonl")
            first = DIALECTS[self.run.dialect].first if self.run.dialect in DIALECTS else None
            self._answers[probe] = found.take(np.arange(min(first, len(found)))) if found and first else found
        return self._answers[probe]


def _read(path: Path) -> Answers | None:
    if not path.is_file():
        return None
    with explained(BROKEN, f"{path} has no records of answers", "run `python -m soul_exp.verify` on the run's folder"):
        records = [*json_lines(path)]
        common = {*Answers.__dataclass_fields__}.intersection(*records)
        fields = {name: [record[name] for record in records] for name in common}
        return Answers(**{name: _field(name, values) for name, values in fields.items()})


def _field(name: str, values: list[Any]) -> Any:
    if name == "right":  # a text such as "1101"
        return [np.array([digit == "1" for digit in text]) for text in values]
    if name in TEXTS:
        return values
    if name not in MATRICES and isinstance(values[0], list):
        return [np.array(each, dtype=np.float64) for each in values]
    return np.array(values, dtype=np.float64)
