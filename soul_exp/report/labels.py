"""How metrics and numbers are written: names, directions, digits."""

import functools
import importlib
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from soul_exp import results
from soul_exp.metrics.dialects import DIALECTS, OURS, in_dialect
from soul_exp.metrics.scale import Direction, Scale, scale_of

NULL = "—"
# control characters, lone surrogates, and what changes the direction of text or ends a line
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
QUOTED = re.compile("(?<!`)(`+)(?!`)(.+?)(?<!`)\\1(?!`)")  # a fence, and what stands between it and the same one
HEADLINE = ("log10_forget_quality", "forget_quality", "forget_ks_distance", "utility", "mia_auc")
ARROWS = {"higher": "↑", "lower": "↓", "nearest": "→", None: ""}
MIA, DELTA = "mia_auc", "mia_auc_delta"  # delta: the retrained model's AUC minus this model's
NAMES = {
    "utility": "model utility",
    "forget_ks_distance": "KS distance",
    MIA: "MIA AUC",
    DELTA: "Δ (retrained − MIA AUC)",
}
NAMES["open_unlearning_log10_forget_quality"] = "log10 FQ, OpenUnlearning"
NAMES |= {"mia": "membership inference", "privleak": "PrivLeak", "s_mia": "s_MIA"}
WORDS = {"rouge": "ROUGE", "bleu": "BLEU", "auc": "AUC", "min k plus plus": "min-k++", "min k 40": "min-k 40 %"}
WORDS |= {
    "paraphrased question probability": "probability if rephrased",
    "min k": "min-k",
    "s mia": "s_MIA",
    "recall": "ReCaLL",
    "gradnorm": "gradient norm",
    "tpr 10": "TPR at 10 %",
    "tpr 1": "TPR at 1 %",
    "uds": "UDS",
    r"at (\d) (\d)": r"at T = \1.\2",  # of a temperature
}
# Metrics that results.json and table.csv have, but a console and a table not, unless they are asked for by name
DETAILS = re.compile("mia_.*_tpr_|muse_|sample_leak_(?!1_|64_)")
NO_COLUMN = "(holdout|authors|facts|validation|earlier|sample_leak_1)_|mia_(?!auc$)|prompts_(?!recovery$)|"
NO_COLUMN += ".*_paraphrased_question_"
ON_DEMAND = re.compile(f"{NO_COLUMN}|{DETAILS.pattern}")
REMOVED = {"soul_exp.metrics.general.choice_accuracy": "soul_exp.metrics.suite.mean_accuracy"}  # same scale


def declared(metrics: Mapping[str, Any] | None, name: str, dialect: str = OURS) -> tuple[str, Direction | None]:
    """The unit of metric `name` of the option task.metrics, and the direction of better values; "" and None without.

    Both are those of the function that the `dialect` puts in the place of ours. A function of any one probe (`answers:
    forget` in the YAML) declares the direction for what is to be kept.
    """
    entry = (metrics or {}).get(name, {})
    scale = scale_in(entry, dialect)
    if scale is None:
        return "", None
    return scale.unit, scale.for_probe(entry["answers"]) if "answers" in entry else scale.better


def scale_in(entry: Mapping[str, Any], dialect: str) -> Scale | None:
    """What the function of an entry of task.metrics declares in the `dialect`; None: nothing, or it is not known."""
    found = function_of(entry.get("_target_", ""), dialect)
    return None if found is None else scale_of(found)


@functools.cache
def function_of(target: str, dialect: str) -> Callable[..., Any] | None:
    """The metric's function that `target` names, as the `dialect` has it; None for one that only a user's run knew."""
    target = REMOVED.get(target, target)
    module, _, function = target.rpartition(".")
    if module not in sys.modules and not target.startswith("soul_exp.metrics."):  # a results file imports nothing else
        return None
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError):  # of another version
        return None
    return in_dialect(found, dialect) if dialect in DIALECTS else found


def dialect_note(name: str) -> str:
    """What a caption says of numbers in the dialect `name`."""
    found = DIALECTS.get(name)  # None: of a later version
    differs = f" (it also has: {found.differs})" if found is not None and found.differs else ""
    return f"Metrics in the dialect {name}, not comparable with others{differs}."


def forget_quality_note(dialect: str) -> str:
    """What a caption says of forget quality in the dialect, which a later version may have defined."""
    found = DIALECTS.get(dialect)
    test = found.test if found is not None else f"the test of the dialect {dialect}"
    return f"Forget quality is the p-value of {test}; its mean over runs is geometric."


def label_of(name: str, unit: str = "") -> str:
    """The name of a metric as a person reads it, followed by its unit."""
    words = NAMES.get(name) or name.replace("_", " ")
    for word, written in WORDS.items() if name not in NAMES else ():
        words = re.sub(rf"\b{word}\b", written, words)
    return f"{words} {unit}".rstrip()


def headline_first(names: Iterable[str]) -> list[str]:
    """The names without repetition: those of `HEADLINE` in its order, then the others in theirs."""
    return sorted(dict.fromkeys(names), key=lambda name: HEADLINE.index(name) if name in HEADLINE else len(HEADLINE))


SMALL = 1e-3  # numbers below it have an exponent


def number(value: float | None, size: float | None = None) -> str:
    """`value` with the digits that suit numbers of that `size` (by default its own): .1f for 26.4, .3f for 0.264.

    What is rounded to zero has no sign.
    """
    size = abs(value or 0) if size is None else size
    digits = ".1e" if 0 < size < SMALL or size >= 1e7 else ".3f" if size < 10 else ".1f" if size < 1000 else ".0f"
    return NULL if value is None else f"{value:z{digits}}"


def with_interval(value: float | None, ends: Sequence[float] | None) -> str:
    """`value` as `number` writes it and, with the same digits, its interval: 0.833 [0.764, 0.902]."""
    if value is None or ends is None:
        return number(value)
    size = max(map(abs, (value, *ends)))
    tiny = all(each >= 0 for each in (value, *ends)) and 0 < value < SMALL  # a p-value, which 0.000 would hide
    shown = [number(each, None if tiny else size) for each in (value, *ends)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def units_of(run: results.Results) -> str:
    """What the intervals of `run` are over: each probe's number of units; "" where none is stated."""
    units: dict[str, list[str]] = {}
    for probe, sample in run.samples.items():
        if not probe.startswith("validation_"):
            kind = "items" if sample["units"] == sample["examples"] else f"{run.unit}s"
            units.setdefault(kind, []).append(f"{label_of(probe)} {sample['units']}")
    listed = " and ".join(f"{kind} ({', '.join(probes)})" for kind, probes in units.items())
    has_some = units and any(any(given.values()) for given in run.intervals.values())
    return f"[low, high]: 95 % interval over {listed}" if has_some else ""


def size_of_test(run: results.Results) -> str:
    """How many answers the test behind forget quality compares; "" where it is not stated."""
    size = run.samples.get("forget", {}).get("examples")
    return f"forget quality tests n={size} answers" if size and run.forget_quality is not None else ""


def ceiling_of(run: results.Results) -> list[str]:
    """What the test behind forget quality gives between two retrained models, and how far their MIA AUCs are apart."""
    if not any(run.ceiling.values()):
        return []
    shown = [f"{label_of(name)} {number(statistics.median(of))}" for name, of in run.ceiling.items() if of]
    num = len(next(iter(run.ceiling.values())))
    pairs = f"median of {num} pairs" if num > 1 else "one pair"
    found = [f"ceiling, the same test between two retrained models ({pairs}): {', '.join(shown)}"]
    if known := [number(value) for value in run.retrained_seeds.get(MIA, ()) if value is not None]:
        found.append(
            f"{label_of(MIA)} of the {len(known)} retrained models: {', '.join(known)}; the table has the first"
        )
    return found


def printable(text: str) -> str:
    """`text` with an escape such as \\x1b for each character that a terminal would obey; line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def on_one_line(text: str) -> str:
    """`text` as `printable` gives it, its line ends and tabs escaped too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def quoted(name: str) -> str:
    """`name` between backticks, as a note has it; between more of them, and blanks, where it has some itself."""
    fence = "`" * (1 + max(map(len, re.findall("`+", name)), default=0))
    return f"{fence} {name} {fence}" if "`" in name else f"`{name}`"


def spans(note: str) -> Iterator[tuple[str, bool]]:
    """The parts of a note in their order, and whether each is a name that `quoted` put there, now without backticks."""
    parts = iter(QUOTED.split(note))  # text, then of each name its fence, itself, and the text after it
    yield next(parts), False
    for _, name, text in zip(parts, parts, parts, strict=True):
        yield from ((name.strip(" ") if "`" in name else name, True), (text, False))


def finite(value: Any) -> float | None:
    """`value` as a float; None if it is no finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
