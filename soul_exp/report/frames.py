"""All that the runs of a folder recorded, as data frames: the door for anyone's own analysis."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from soul_exp.files import json_lines
from soul_exp.report import comparison, runs
from soul_exp.report.group import Group
from soul_exp.report.labels import declared, label_of, scale_in
from soul_exp.report.statistics import Range
from soul_exp.report.units import RECORDS
from soul_exp.results import attack_of, metric_entries

LOSSES, TRAJECTORY = "train.jsonl", "trajectory.jsonl"  # in a run's folder
AT_STEP = {LOSSES: "training", TRAJECTORY: "validation"}
KEYS = ["run", "model", "probe", "item"]


@dataclass(frozen=True)
class Frames:
    """The runs below `folder`; each frame is read when it is first asked for.

    All have a column `run`, its folder's name below `folder`. Raises UsageError if there are no runs, or for a file
    that is broken.
    """

    folder: Path

    @functools.cached_property
    def runs(self) -> pd.DataFrame:
        """A row for each run: what was chosen, the options that differ, and every metric, as `tables.load` gives it."""
        return runs.load(self.folder)

    @functools.cached_property
    def tables(self) -> list[Group]:
        """The runs that are comparable, table by table, as `runs.table` numbers them from 1."""
        return comparison.groups_of(self.folder, runs.find(self.folder)[0])

    @functools.cached_property
    def metrics(self) -> pd.DataFrame:
        """A row for each metric, by its name: label, better, low, high, and attack.

        `better` is "higher", "lower", "nearest" (to the retrained model) or null, every value lies in [low, high], and
        `attack` is the one that it is of, or null.
        """
        rows: dict[str, dict[str, Any]] = {}
        for run in runs.find(self.folder)[0].values():
            entries, attacks = metric_entries(run), attack_of(run)
            for name in run.metrics["unlearned"]:
                unit, better = declared(entries, name, run.dialect)
                within = Range.of(scale_in(entries.get(name, {}), run.dialect))
                about = {"label": label_of(name, unit), "better": better, "low": within.low, "high": within.high}
                rows.setdefault(name, {**about, "attack": attacks.get(name)})
        return pd.DataFrame.from_dict(rows, orient="index", columns=["label", "better", "low", "high", "attack"])

    @functools.cached_property
    def trials(self) -> pd.DataFrame:
        """A row for each trial of a run: lr, gamma, validation metrics, and whether it was chosen."""
        return runs.trials(self.folder)

    @functools.cached_property
    def attacks(self) -> pd.DataFrame:
        """A row for each point of an attack on a model: attack, model, branch, point, measures, informative."""
        return runs.attacks(self.folder)

    @functools.cached_property
    def items(self) -> pd.DataFrame:
        """A row for each answer: model, probe, item (from 0, the probe's order), unit, texts, and numbers by item.

        Texts are as the model wrote them. What has a number for each token is left out; records/ has it.
        """
        names = runs.find(self.folder)[0]
        rows = [
            {"run": name, "model": file.parent.name, "probe": file.stem, "item": item, **_scalars(record)}
            for name in names
            for file in sorted(runs.folder_of(self.folder, name).glob(f"{RECORDS}/*/*.jsonl"))
            for item, record in enumerate(json_lines(file))
        ]
        return pd.DataFrame(rows, columns=None if rows else KEYS)

    @functools.cached_property
    def steps(self) -> pd.DataFrame:
        """A row for each step that was logged: step, `of` ("training" or "validation", of evaluate.every), numbers."""
        rows = [
            {"run": name, "of": of, **line}
            for name in runs.find(self.folder)[0]
            for file, of in AT_STEP.items()
            for line in json_lines(runs.folder_of(self.folder, name) / file)
        ]
        return pd.DataFrame(rows, columns=None if rows else ["run", "of", "step"])


def load(folder: Path | str) -> Frames:
    """The runs below `folder` as data frames."""
    root = Path(folder)
    runs.find(root)  # its error before any work
    return Frames(root)


def _scalars(record: dict[str, Any]) -> dict[str, Any]:
    """What of a record is a text, a number or a flag."""
    return {name: value for name, value in record.items() if not isinstance(value, list) and name != "right"}
