"""The rows of a table: which runs are one combination, and in what order combinations stand."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from soul_exp.report.labels import NULL
from soul_exp.report.runs import CHOSEN, frame_of, is_unlearned, study_of, tuned_on, varied
from soul_exp.report.table import CHOSEN_GROUP, Column
from soul_exp.results import Results


@dataclass(frozen=True)
class Method:
    """One row: runs that differ in the seed only and ended alike."""

    key: tuple[str, ...]  # what says which row it is, column by column
    runs: tuple[str, ...]  # each seed once
    status: str
    is_sound: bool  # neither diverged nor collapsed, not even some of the runs


@dataclass(frozen=True)
class Rows:
    """Runs that are comparable, in rows of those that differ in the seed only."""

    runs: Mapping[str, Results]
    order: Mapping[str, Sequence[str]]  # option -> its values as typed

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """One row per run, by its name."""
        frame = frame_of(self.runs)
        return frame.set_index("run", drop=False)

    @functools.cached_property
    def values(self) -> dict[str, dict[str, Any]]:
        """The rows of the frame: run -> key -> value. Faster than the frame where single values are read."""
        return {str(name): dict(row) for name, row in self.frame.to_dict("index").items()}

    @functools.cached_property
    def first(self) -> Results:
        """Any run: of what all share."""
        return next(iter(self.runs.values()))

    @functools.cached_property
    def is_tuned_here(self) -> bool:
        """Whether trials chose the learning rate and gamma, in all runs then."""
        return bool(self.first.trials)

    @functools.cached_property
    def is_checkpoints(self) -> bool:
        """Whether none of the models was unlearned here."""
        return not any(map(is_unlearned, self.runs.values()))

    @functools.cached_property
    def by(self) -> list[str]:
        """The keys of the frame that tell methods apart."""
        always = [] if self.is_checkpoints else ["choices.loss", "choices.optimizer"]
        choices = [key for key in self.choices if self.frame[key].nunique(dropna=False) > 1]
        found = [*always, *choices, *varied(self.frame)]
        return [key for key in found if not (self.is_tuned_here and key in CHOSEN)]

    @functools.cached_property
    def choices(self) -> list[str]:
        """The keys of the choices beside loss and optimizer."""
        in_columns = ("choices.loss", "choices.optimizer")
        return [key for key in self.frame if key.startswith("choices.") and key not in in_columns]

    @functools.cached_property
    def chosen(self) -> list[str]:
        """The keys of what trials chose, where it differs."""
        tuned = self.is_tuned_here
        return [key for key in CHOSEN if tuned and key in self.frame and self.frame[key].nunique(dropna=False) > 1]

    @functools.cached_property
    def has_tuned_on(self) -> bool:
        """Whether rows were tuned on several data."""
        return len({tuned_on(run) for run in self.runs.values()} - {None}) > 1

    @functools.cached_property
    def keys(self) -> list[Column]:
        """The columns that say which row it is."""
        names = [*(["model"] if self.is_checkpoints else []), *(key.partition(".")[2] for key in self.by)]
        found = [*(Column(name, name) for name in names)]
        found += [Column(name, name, CHOSEN_GROUP) for name in (key.partition(".")[2] for key in self.chosen)]
        return [*found, *([Column("tuned on", "tuned on")] if self.has_tuned_on else [])]

    @functools.cached_property
    def places(self) -> list[int]:
        """The places of the keys in which methods differ, without what trials chose if the others tell them apart."""
        keys = {method.key for method in self.methods}
        differ = [place for place in range(len(self.keys)) if len({key[place] for key in keys}) > 1]
        few = [place for place in differ if self.keys[place].group != CHOSEN_GROUP]
        return few if len({tuple(key[place] for place in few) for key in keys}) == len(keys) else differ

    @functools.cached_property
    def members(self) -> dict[tuple[Any, ...], list[str]]:
        """What tells a method from the others -> its runs."""
        found: dict[tuple[Any, ...], list[str]] = {}
        for name, run in self.runs.items():
            values = tuple(_value(self.frame.at[name, key]) for key in self.by)
            tried = tuple(sorted((trial["lr"], trial["gamma"]) for trial in run.trials))
            found.setdefault((values, tuned_on(run), tried), []).append(name)
        return dict(sorted(found.items(), key=lambda pair: self._place(pair[0][0])))

    def _place(self, values: tuple[Any, ...]) -> tuple[tuple[int, float], ...]:
        """Where a row of these values stands: numbers by size, texts as they were typed, or else as runs have them."""
        place = []
        for key, value in zip(self.by, values, strict=True):
            if value is None:
                place.append((0, 0.0))
            elif isinstance(value, int | float) and not isinstance(value, bool):
                place.append((1, float(value)))
            else:
                typed = self.order.get(key.partition(".")[2], ())
                texts = [*typed, *(str(other) for other in self.frame[key] if str(other) not in typed)]
                place.append((2, float(texts.index(str(value)))))
        return tuple(place)

    @functools.cached_property
    def repeats(self) -> dict[str, list[str]]:
        """Run -> the others of the same method, seed and study."""
        seeds = [key for key in self.frame if key.startswith("seeds.")]
        found: dict[str, list[str]] = {}
        for names in self.members.values():
            firsts: dict[tuple[Any, ...], str] = {}
            for name in names:
                identity = (*map(_value, self.frame.loc[name, seeds]), study_of(self.runs[name]))
                if (first := firsts.setdefault(identity, name)) != name:
                    found.setdefault(first, []).append(name)
        return found

    @functools.cached_property
    def methods(self) -> list[Method]:
        """The rows; diverged seeds have one of their own."""
        repeated = {name for others in self.repeats.values() for name in others}
        found = []
        for names in self.members.values():
            kept = [name for name in names if name not in repeated]
            for status in sorted({self.runs[name].status for name in kept}, reverse=True):
                same = [name for name in kept if self.runs[name].status == status]
                found.append(self._method(same, len(kept), status))
        return found

    def alone(self, name: str) -> Method:
        """The run as a row of its own."""
        return self._method([name], 1, self.runs[name].status)

    def _method(self, names: Sequence[str], num_seeds: int, status: str) -> Method:
        runs = [self.runs[name] for name in names]
        diverged = f", {num_seeds - len(names)} of {num_seeds} diverged" if len(names) < num_seeds else ""
        text = "DIVERGED" if status == "diverged" else f"{status}{diverged}"
        text += ", untuned" * (runs[0].tuned is None and is_unlearned(runs[0]))
        if num_collapsed := sum(bool(run.collapsed) for run in runs):
            text += ", COLLAPSED" if num_collapsed == len(runs) else f", {num_collapsed} of {len(runs)} collapsed"
        key = [text_of(self.frame.at[names[0], of]) for of in self.by]
        if self.is_checkpoints:
            key = ["checkpoint", *key]
        elif not is_unlearned(runs[0]):
            key[0] = "checkpoint"
        for of in self.chosen:
            key.append(", ".join(map(text_of, sorted({_value(self.frame.at[name, of]) or 0.0 for name in names}))))
        key += [tuned_on(runs[0]) or NULL] if self.has_tuned_on else []
        is_whole = status != "diverged" and len(names) == num_seeds
        return Method(tuple(key), tuple(names), text, is_whole and not num_collapsed)


def _value(value: Any) -> Any:
    """A value of a frame as Python's own; None if it is missing."""
    plain = value.item() if hasattr(value, "item") else value
    return None if plain is None or plain != plain else plain


def text_of(value: Any) -> str:
    """A value of the configuration as text."""
    return NULL if _value(value) is None else f"{value:g}" if isinstance(value, float) else str(value)
