"""What a user brings: rows to forget, rows to retain and perhaps rows that nobody has seen, from files or the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from soul_exp.data import Item, Part
from soul_exp.errors import UsageError
from soul_exp.ranges import COUNT, HALF, SOME
from soul_exp.tasks import refusals
from soul_exp.tasks.embedded import general_suite
from soul_exp.tasks.sources.rows import FIELDS, HUB, Row, Rows, distinct, read, shared
from soul_exp.tasks.task import Probe, Task, and_general, divided, forget_parts, spread

TYPE = (
    'type task=custom task.forget=FILE task.retain=FILE, each with a line {"prompt": "...", "answer": "..."} or '
    '{"text": "..."} for every row'
)
EARLIER = "earlier"  # the probe of all requests before this one


def custom(
    forget: str | None = None,
    retain: str | None = None,
    holdout: str | None = None,
    *,
    requests: Sequence[str] | None = None,
    request: int = 1,
    columns: Mapping[str, str | None] | None = None,
    revision: str | None = None,
    lead_words: Annotated[int | None, SOME] = None,
    overlap: str = "error",
    validation_fraction: Annotated[float, HALF] = 0.0,
    max_probe_rows: Annotated[int, COUNT] = 400,
    max_forget_probe_rows: Annotated[int, COUNT] = 2000,
    train_general: bool = False,
    trained_before: bool = False,
) -> Task:
    """The rows of `forget` are to be forgotten, those of `retain` kept; nobody has seen those of `holdout`.

    Each is a file or a hub dataset, as tasks/sources/rows.py reads it. Of `requests`, which replace `forget`, `request`
    (from 1) is forgotten now, those before it have been, those after it are neither unlearned nor retained yet: the
    target knows all of them, the retrained model those after it. A row that repeats another of its file is left out;
    one that is in two files is an error, unless `overlap` is "drop": then it is taken out of retain, or of the later
    request. With `train_general` the rows that the embedded utility suite needs are retained too.
    """
    if overlap not in ("error", "drop"):
        raise UsageError(f"task.overlap={overlap} is unknown: choose error or drop")
    if not isinstance(trained_before, bool):
        raise UsageError(f"task.trained_before={trained_before}: expected true or false")
    wanted = _wanted(forget, requests)
    if retain is None:
        raise UsageError(f"task=custom has no rows to retain (task.retain=null): {TYPE}")
    named = {field: field for field in FIELDS} | dict(columns or {})
    notes: list[str] = []

    def rows_of(place: str, option: str) -> Rows:
        table, said = distinct(read(place, option, columns=named, revision=revision, lead_words=lead_words))
        notes.extend([said] if said else [])
        return table

    option = "task.forget" if requests is None else "task.requests"
    asked = [rows_of(place, option) for place in wanted]
    kept = rows_of(retain, "task.retain")
    held = rows_of(holdout, "task.holdout") if holdout is not None else None
    asked, kept = _disjoint(asked, kept, held, overlap == "drop", notes)

    questions = general_suite.training_rows() if train_general else []
    common = kept.items + questions
    now, later = asked[request - 1], [item for table in asked[request:] for item in table.items]
    counts = _Counts(max_forget_probe_rows, max_probe_rows, validation_fraction)
    probes, missing = _probes(asked[:request], kept, held, counts)
    if requests is None:
        missing[EARLIER] = "task.requests is not given"
    if request > 1:
        notes.append(
            f"request {request} of {len(asked)} starts from the model that request {request - 1} left; the original "
            f"model is that before the first"
        )
    sentences = refusals.PASSAGES if all(item.raw for item in now.items) else refusals.QUESTIONS
    return Task(
        name="custom",
        source=wanted[request - 1],
        parts={**forget_parts(now.items, sentences), "retain": Part.of(common)},
        probes=probes,
        target_rows=[item for table in asked for item in table.items] + common,
        retrained_rows=later + common,
        caption=_caption(wanted, request, now, kept, held, probes, trained_before, and_general(questions)),
        missing=missing,
        trained_before=trained_before,
        notes=notes,
    )


@dataclass(frozen=True)
class _Counts:
    """How many rows are probed at most, and which share of them apart."""

    forget: int
    others: int
    validation_fraction: float


def _disjoint(
    asked: Sequence[Rows], kept: Rows, held: Rows | None, drop: bool, notes: list[str]
) -> tuple[list[Rows], Rows]:
    """The requests and what is to be retained, without rows that two files share; raises as `_without` does."""
    requests: list[Rows] = []
    for table in asked:
        for earlier in requests:
            table = _without(table, earlier, drop, notes)
        requests.append(table)
        kept = _without(kept, table, drop, notes)
        if held is not None:
            _without(held, table, False, notes)  # one of the two statements about it is wrong
    return requests, _without(kept, held, drop, notes) if held is not None else kept


def _probes(
    asked: Sequence[Rows], kept: Rows, held: Rows | None, counts: _Counts
) -> tuple[dict[str, Probe], dict[str, str]]:
    """The probes of the last of the requests `asked` so far, and why there are no others."""
    *before, now = asked
    tune, test = divided(spread(now.rows, counts.forget), counts.validation_fraction)
    tune_kept, test_kept = divided(spread(kept.rows, counts.others), counts.validation_fraction)
    tables: dict[str, tuple[Rows, Sequence[Row]]] = {"forget": (now, test), "retain": (kept, test_kept)}
    missing = {}
    if held is not None:
        tables["holdout"] = (held, spread(held.rows, counts.others))
    else:
        missing["holdout"] = "task.holdout is not given, so no text is known to be unseen"
    if tune and tune_kept:
        tables |= {"validation_forget": (now, tune), "validation_retain": (kept, tune_kept)}
    else:
        why = f"task.validation_fraction={counts.validation_fraction:g} leaves no rows"
        missing |= dict.fromkeys(("validation_forget", "validation_retain"), why)
    if before:
        known = [replace(row, paraphrase=None, wrong=None) for table in before for row in table.rows]
        tables[EARLIER] = (now, spread(known, counts.others))
    else:
        missing[EARLIER] = "nothing was forgotten before the first request"
    probes = {}
    for name, (table, rows) in tables.items():
        probes[name], absent = _probe(rows, table.name.partition("=")[0])
        missing |= {f"{name}.{field}": why for field, why in absent.items()}
    return probes, missing


def _wanted(forget: str | None, requests: Sequence[str] | None) -> list[str]:
    """The files of the requests, in their order; one where only `forget` is given."""
    if requests is None:
        if forget is None:
            raise UsageError(f"task=custom has no rows to forget (task.forget=null): {TYPE}")
        return [forget]
    if forget is not None:
        raise UsageError(f"task.forget={forget} and task.requests are both given: keep one")
    if not isinstance(requests, Sequence) or isinstance(requests, str) or not requests:
        raise UsageError(f"task.requests={requests}: expected a list, such as task.requests=[a.jsonl,b.jsonl]")
    if not all(isinstance(place, str) for place in requests):
        raise UsageError(f"task.requests={list(requests)}: expected a list of files or hub datasets")
    return list(requests)


def _without(table: Rows, other: Rows, drop: bool, notes: list[str]) -> Rows:
    """`table` less the rows that `other` has too, which is noted. Raises UsageError if they are not to be dropped."""
    both = shared(other, table)
    if not both:
        return table
    theirs, ours = both[0]
    said = (
        f"{len(both)} row(s) of {table.name} are in {other.name} too, the first being {ours.place}, there "
        f"{theirs.place} ({ours.item.prompt[:40]!r})"
    )
    if not drop:
        advice = "" if table.name.startswith("task.holdout=") else ", or type task.overlap=drop"
        raise UsageError(f"{said}: remove them from one of the two{advice}")
    gone = {row.place for _, row in both}
    left = [row for row in table.rows if row.place not in gone]
    if not left:
        raise UsageError(f"{said}, and nothing else is left in it: give other rows")
    notes.append(f"{said}: left out of {table.name.partition('=')[0]}")
    return Rows(table.name, left)


def _probe(rows: Sequence[Row], option: str) -> tuple[Probe, dict[str, str]]:
    """The probe of `rows`, and the fields that its answers will lack, with the reason."""
    missing = {}
    items = [row.item for row in rows]
    paraphrases = [Item(row.item.prompt, row.paraphrase) for row in rows if row.paraphrase is not None]
    wrong = [[Item(row.item.prompt, text) for text in row.wrong] for row in rows if row.wrong is not None]
    if len(paraphrases) < len(rows):
        missing["paraphrase_nll"] = f"{option} has no paraphrased_answer"
    if len(wrong) < len(rows):
        missing["wrong_nll"] = f"{option} has no perturbed_answer"
    wordless = next((row for row in rows if not _has_word(row.item.answer)), None)
    if wordless is not None:
        why = f"the answer in {wordless.place} of {option} has no word of a-z or 0-9, as ROUGE and BLEU need it"
        missing |= dict.fromkeys(("rouge_l", "generation"), why)
    return (
        Probe(
            items,
            paraphrases=paraphrases if len(paraphrases) == len(rows) else None,
            wrong=wrong if len(wrong) == len(rows) else None,
            generate=wordless is None,
        ),
        missing,
    )


def _has_word(text: str) -> bool:
    return any(character.isascii() and character.isalnum() for character in text.lower())


def _caption(
    wanted: Sequence[str], request: int, now: Rows, kept: Rows, held: Rows | None, probes: Mapping[str, Probe],
    trained_before: bool, general: str,
) -> str:  # fmt: skip
    def counted(probe: str, rows: int, what: str) -> str:
        asked = sum(len(probes[name].items) for name in (probe, f"validation_{probe}") if name in probes)
        return f"{rows} {what}{f' ({asked} probed)' if asked < rows else ''}"

    place = wanted[request - 1]
    short = place if place.startswith(HUB) else Path(place).name
    which = f"request {request} of {len(wanted)}: " if len(wanted) > 1 else ""
    parts = [
        counted("forget", len(now.rows), "rows forgotten"),
        counted("retain", len(kept.rows), "retained") + general,
    ]
    parts += [counted("holdout", len(held.rows), "held out")] if held is not None else []
    before = "; the target is model.path as it is" if trained_before else ""
    return f"custom ({which}{short}): {', '.join(parts)}{before}"
