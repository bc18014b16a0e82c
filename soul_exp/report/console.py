"""How numbers and metrics are shown, and one run's models side by side on a console."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from soul_exp.results import Results

WIDTH = 100  # columns of a console
NULL = "—"
HEADLINE = ("log10_forget_quality", "forget_quality", "utility", "mia_auc")
MIA, DELTA = "mia_auc", "mia_auc_delta"  # delta: the retrained model's minus this one's
NAMES = {"utility": "model utility", MIA: "MIA AUC", DELTA: "Δ (retrained − MIA AUC)"}
HIGHER, LOWER, TARGET = "higher is better", "lower is better", "retrained = target value"
SUITE = (("acc", HIGHER), ("word_perplexity", LOWER))  # what is shown of a task of the utility suite
KEEP = ("retain_", "authors_", "facts_")  # probes of what is to be kept, where of these measures more is better:
MEASURES = ("_probability", "_rouge", "_truth_ratio", "_bleu", "_accuracy")


def comparison(results: Results) -> str:
    """The metrics of one run, its models side by side, in at most 100 columns; a null has its reason below."""
    unlearned = "unlearn" in results.config.get("stages", ())
    before, after = ("before", "after") if unlearned and "original" in results.metrics else ("original", "model")
    titles = {"original": before, "input_based": "input-based", "unlearned": after, "retrained": "retrained"}
    models = {title: results.metrics[model] for model, title in titles.items() if model in results.metrics}
    names = headline_first(name for values in models.values() for name in values)
    probes = [name.partition("_")[0] for name in names if name not in HEADLINE]
    diverged = f"*** DIVERGED: {results.reason} *** The numbers are those of the model where it stopped."
    tuned = f"tuned on: {results.tuned}" if results.tuned else "untuned: no entry of conf/tuned/ chose these numbers"
    choices = ", ".join(f"{group} {choice}" for group, choice in results.choices.items() if choice != "none")
    above = [results.caption, choices, diverged if results.status == "diverged" else "", tuned if unlearned else ""]
    cells_wide = [max(11, len(title) + 1) for title in models]
    room = WIDTH - sum(cells_wide) - 2 - len(TARGET)
    width = max(28, min(room, 36, max(map(len, names), default=0)))

    def row(label: str, cells: Iterable[str], hint: str = "") -> str:
        told = "".join(f"{cell:>{wide}}" for cell, wide in zip(cells, cells_wide, strict=True))
        return f"{label[:width]:<{width}}{told}  {hint}".rstrip()

    lines, group = [row("", models)], ""
    keys = {title: model for model, title in titles.items()}
    unknown: dict[tuple[str, str], list[str]] = {}  # (models, reason) -> metrics
    for name in names:
        probe, _, rest = name.partition("_")
        grouped = name not in HEADLINE and rest != "" and probes.count(probe) > 1
        lines += [probe] if grouped and probe != group else []
        group = probe if grouped else ""
        values = {title: finite(measured.get(name)) for title, measured in models.items()}
        hint = hint_of(name) if "retrained" in models or hint_of(name) == HIGHER else ""
        lines.append(row(f"  {label_of(rest)}" if grouped else label_of(name), map(number, values.values()), hint))
        start = values.get(before)
        if name == "utility" and start:
            shares = [NULL if value is None else f"{100 * value / start:.1f} %" for value in values.values()]
            lines.append(row(f"  kept, as a share of {before}", shares))
        if empty := [title for title, value in values.items() if value is None]:
            known = [results.reasons.get(f"{keys[title]}.{name}") for title in empty] + [results.reasons.get(name)]
            reason = "; ".join(dict.fromkeys(filter(None, known))) or "no reason is given"
            unknown.setdefault((", ".join(empty), reason), []).append(label_of(name))
    below = [f"{NULL} {', '.join(named)} ({where}): {reason}" for (where, reason), named in unknown.items()]
    for label, cells, hint in _suite_rows(results, [model for model, title in titles.items() if title in models]):
        lines.append(row(label, cells, hint))
    seconds = ", ".join(f"{stage} {number(value)} s" for stage, value in results.seconds.items())
    last = [f"{name} {number(finite(results.training.get(name)))}" for name in ("win_rate", "effective_update")]
    below.append(f"{seconds}; {results.num_steps} steps; {', '.join(last)}")
    return "\n".join([*_wrapped(above), "", *lines, "", *_wrapped([*below, *results.notes])])


def _suite_rows(results: Results, models: Sequence[str]) -> list[tuple[str, list[str], str]]:
    """Of each task of the utility suite what counts: (label, a cell a model, hint); a title above; none without one."""
    asked = dict.fromkeys(task for model in models for task in results.suite.get(model, {}))
    rows: list[tuple[str, list[str], str]] = []
    for task in asked:
        for metric, hint in SUITE:
            values = [results.suite.get(model, {}).get(task, {}).get(metric) for model in models]
            if any(value is not None for value in values):
                label = f"  {task} {metric}".replace("_", " ")
                rows.append((label, [number(finite(value)) for value in values], hint))
    return [(f"utility suite {results.config['utility_suite']}", [""] * len(models), ""), *rows] if rows else []


def label_of(name: str) -> str:
    return NAMES.get(name) or name.replace("_", " ").replace("rouge", "ROUGE").replace("bleu", "BLEU")


def hint_of(name: str) -> str:
    if name == "general_perplexity":
        return LOWER
    if name in HEADLINE[:3] or (name.startswith(KEEP) and name.endswith(MEASURES)):
        return HIGHER
    return TARGET if name == MIA or name.startswith(("forget_", "holdout_", "earlier_")) else ""


def headline_first(names: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(names), key=lambda name: HEADLINE.index(name) if name in HEADLINE else len(HEADLINE))


def number(value: float | None, scale: float | None = None) -> str:
    """`value` with the digits that numbers of the size of `scale` deserve: .1f for 26.4, .3f for 0.264."""
    size = abs(value or 0) if scale is None else scale
    digits = ".1e" if 0 < size < 1e-3 or size >= 1e7 else ".3f" if size < 10 else ".1f" if size < 1000 else ".0f"
    return NULL if value is None else f"{value:{digits}}"


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _wrapped(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(text, WIDTH)]
