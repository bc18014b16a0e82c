"""A user's rows to forget, rows to retain and perhaps rows that are in no training, from files or the hub."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from soul_exp.data import Item, Part
from soul_exp.errors import UsageError
from soul_exp.metrics.text import words
from soul_exp.ranges import COUNT, HALF, SOME, Choice
from soul_exp.tasks import refusals
from soul_exp.tasks.embedded import general_suite
from soul_exp.tasks.sources.rows import HUB, Row, Rows, columns_of, distinct, normalised, read, shared
from soul_exp.tasks.task import (
    NUM_PREFIX,
    Probe,
    Task,
    and_general,
    evenly_spaced,
    forget_parts,
    validation_split,
    without_validation,
)

EXAMPLE = (
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
    request: Annotated[int, COUNT] = 1,
    columns: Mapping[str, str | None] | None = None,
    forget_columns: Mapping[str, str | None] | None = None,
    retain_columns: Mapping[str, str | None] | None = None,
    holdout_columns: Mapping[str, str | None] | None = None,
    revision: str | None = None,
    lead_words: Annotated[int | None, SOME] = None,
    overlap: Annotated[str, Choice(("error", "drop"))] = "error",
    validation_fraction: Annotated[float, HALF] = 0.0,
    max_probe_rows: Annotated[int, COUNT] = 400,
    max_forget_probe_rows: Annotated[int, COUNT] = 2000,
    train_general: bool = False,
    trained_before: bool = False,
) -> Task:
    """The rows of `forget` are forgotten, those of `retain` retained; those of `holdout` are in no training.

    Each is a file or a hub dataset, as tasks/sources/rows.py reads it. `columns` (field -> name) are common to all;
    `forget_columns` (also of requests), `retain_columns` and `holdout_columns` are of one file alone.

    Of `requests`, which replace `forget`, number `request` (from 1) is forgotten now, earlier ones have been, later
    ones are neither unlearned nor retained yet: the target is trained on all of them, the retrained model on the later
    ones. A row that repeats another of its file is left out; a row in two files is an error, or with `overlap` "drop"
    it leaves retain, or the later request. With `train_general` the rows that the embedded utility suite needs are
    retained too.
    """
    sources = sources_of(forget, requests)
    if retain is None:
        raise UsageError(f"task=custom has no rows to retain (task.retain=null): {EXAMPLE}")
    own = {"forget": forget_columns, "retain": retain_columns, "holdout": holdout_columns}
    named = {name: columns_of(f"task.{name}", columns, given) for name, given in own.items()}
    notes: list[str] = []

    def rows_of(source: str, name: str, option: str | None = None) -> Rows:
        option = option or f"task.{name}"
        return distinct(read(source, option, columns=named[name], revision=revision, lead_words=lead_words), notes)

    if not 1 <= request <= len(sources):
        raise UsageError(f"task.request={request}: expected a number from 1 to {len(sources)}, of the requests")
    option = None if requests is None else "task.requests"
    requested = [rows_of(source, "forget", option) for source in sources]
    retained = rows_of(retain, "retain")
    unseen = rows_of(holdout, "holdout") if holdout is not None else Rows("task.holdout", [])
    requested, retained = _disjoint(requested, retained, unseen, overlap == "drop", notes)

    questions = general_suite.training_rows() if train_general else []
    common = retained.items + questions
    now, later = requested[request - 1], [item for table in requested[request:] for item in table.items]
    probes, missing = _probes(
        requested[:request], retained, unseen, max_forget_probe_rows, max_probe_rows, validation_fraction
    )
    if requests is None:
        missing[EARLIER] = "task.requests is not given"
    missing["related"] = "task=custom has no rows that are known to be related and in no training"
    prefix = _prefix(unseen, [item for probe in probes.values() for item in probe.items])
    if not prefix:
        missing["prefix"] = f"task.holdout has fewer than {NUM_PREFIX} rows beyond task.max_probe_rows={max_probe_rows}"
    if request > 1:
        notes.append(
            f"request {request} of {len(requested)} starts from the model that request {request - 1} left; the "
            f"original model is that before the first"
        )
    sentences = refusals.PASSAGES if all(item.raw for item in now.items) else refusals.QUESTIONS
    return Task(
        name="custom",
        source=sources[request - 1],
        parts={**forget_parts(now.items, sentences, _alternates(now)), "retain": Part.of(common)},
        probes=probes,
        target_rows=[item for table in requested for item in table.items] + common,
        retrained_rows=later + common,
        caption=_caption(
            sources, request, {"forget": now, "retain": retained, "holdout": unseen}, probes, trained_before, questions
        ),
        missing=missing,
        optional=dict.fromkeys(questions, "task.train_general=false"),
        trained_before=trained_before,
        prefix=prefix,
        unit="prompt",
        notes=notes,
        locations={
            text: f"{table.name}, {row.location}"
            for table in (*requested, retained, unseen)
            for row in table.rows
            for text in row.texts
        },
    )


def _alternates(forget: Rows) -> list[tuple[str, ...]] | None:
    """The alternate answers to each row; None if the rows have none."""
    given = [row.alternates for row in forget.rows if row.alternates is not None]
    return given or None


def _prefix(unseen: Rows, probed: Sequence[Item]) -> list[Item]:
    """NUM_PREFIX rows of the holdout that no probe has; none if there are fewer."""
    others = [item for item in unseen.items if item not in set(probed)]
    return evenly_spaced(others, NUM_PREFIX) if len(others) >= NUM_PREFIX else []


def _disjoint(
    requested: Sequence[Rows], retained: Rows, unseen: Rows, drop: bool, notes: list[str]
) -> tuple[list[Rows], Rows]:
    """The requests and the retained rows, without rows that two files share; raises as `_without` does."""
    requests: list[Rows] = []
    for table in requested:
        for earlier in requests:
            table = _without(table, earlier, drop, notes)
        requests.append(table)
        retained = _without(retained, table, drop, notes)
        _without(unseen, table, False, notes)  # the user says both that the model knows it and that it does not
    return requests, _without(retained, unseen, drop, notes)


def _probes(
    requested: Sequence[Rows], retained: Rows, unseen: Rows, max_forget: int, max_others: int, fraction: float
) -> tuple[dict[str, Probe], dict[str, str]]:
    """The probes of the last of the requests so far, and why there are no others."""
    *before, now = requested
    tune, test = _validation_split(evenly_spaced(now.rows, max_forget), fraction)
    tune_retain, test_retain = _validation_split(evenly_spaced(retained.rows, max_others), fraction)
    tune_unseen, test_unseen = _validation_split(evenly_spaced(unseen.rows, max_others), fraction)
    tables: dict[str, tuple[Rows, Sequence[Row]]] = {"forget": (now, test), "retain": (retained, test_retain)}
    missing = {}
    if test_unseen:
        tables["holdout"] = (unseen, test_unseen)
    else:
        missing["holdout"] = "task.holdout is not given, so no text is known to be unseen"
    kept = {"forget": (now, tune), "retain": (retained, tune_retain), "holdout": (unseen, tune_unseen)}
    missing |= without_validation({name: rows for name, (_, rows) in kept.items()}, missing, fraction)
    tables |= {f"validation_{name}": pair for name, pair in kept.items() if f"validation_{name}" not in missing}
    if before:
        tuned = [_validation_split(evenly_spaced(table.rows, max_forget), fraction)[0] for table in before]
        tested = [table.without({row.location for row in rows}) for table, rows in zip(before, tuned, strict=True)]
        known = [replace(row, paraphrase=None, wrong=None) for table in tested for row in table.rows]
        tables[EARLIER] = (now, evenly_spaced(known, max_others))
    else:
        missing[EARLIER] = "nothing was forgotten before the first request"
    probes = {}
    for name, (table, rows) in tables.items():
        probes[name], absent = _probe(rows, table.name.partition("=")[0])
        missing |= {f"{name}.{field}": why for field, why in absent.items()}
    return probes, missing


def _validation_split(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Validation rows and test rows; the rows of one prompt, whatever its case and white space, stay together."""
    return validation_split(rows, fraction, [normalised(row.item.prompt) for row in rows])


def sources_of(forget: str | None, requests: Sequence[str] | None) -> list[str]:
    if requests is None:
        if forget is None:
            raise UsageError(f"task=custom has no rows to forget (task.forget=null): {EXAMPLE}")
        return [forget]
    if forget is not None:
        raise UsageError(f"task.forget={forget} and task.requests are both given: keep one")
    if not isinstance(requests, Sequence) or isinstance(requests, str) or not requests:
        raise UsageError(f"task.requests={requests}: expected a list, such as task.requests=[a.jsonl,b.jsonl]")
    if not all(isinstance(source, str) for source in requests):
        raise UsageError(f"task.requests={list(requests)}: expected a list of files or hub datasets")
    return list(requests)


def _without(table: Rows, other: Rows, drop: bool, notes: list[str]) -> Rows:
    """`table` without the rows that `other` has too, which is noted; unless `drop`, any such row is a UsageError."""
    both = shared(other, table)
    if not both:
        return table
    theirs, ours = both[0]
    found = (
        f"{len(both)} row(s) of {table.name} are in {other.name} too, the first being {ours.location}, there "
        f"{theirs.location} ({ours.item.prompt[:40]!r})"
    )
    if not drop:
        advice = "" if table.name.startswith("task.holdout=") else ", or type task.overlap=drop"
        raise UsageError(f"{found}: remove them from one of the two{advice}")
    left = table.without({row.location for _, row in both})
    if not left.rows:
        raise UsageError(f"{found}, and nothing else is left in it: give other rows")
    notes.append(f"{found}: left out of {table.name.partition('=')[0]}")
    return left


def _probe(rows: Sequence[Row], option: str) -> tuple[Probe, dict[str, str]]:
    """The probe of `rows`, and the fields that its answers will not have, with the reason."""
    missing = {}
    # every row has them or none has
    paraphrases = [Item(row.item.prompt, row.paraphrase) for row in rows if row.paraphrase is not None] or None
    wrong = [[Item(row.item.prompt, text) for text in row.wrong] for row in rows if row.wrong is not None] or None
    if paraphrases is None:
        missing["paraphrase_nll"] = f"{option} has no paraphrased_answer"
    if wrong is None:
        missing["wrong_nll"] = f"{option} has no perturbed_answer"
    wordless = next((row for row in rows if not words(row.item.answer)), None)
    if wordless is not None:
        why = f"the answer in {wordless.location} of {option} has no letter and no digit, which ROUGE and BLEU need"
        missing |= dict.fromkeys(("rouge_l", "generation"), why)
    units = [normalised(row.item.prompt) for row in rows]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(units), start=1)}
    probe = Probe(
        [row.item for row in rows], paraphrases, wrong, units=[f"prompt {numbers[prompt]}" for prompt in units],
        generate=wordless is None,
    )  # fmt: skip
    return probe, missing


def _caption(
    sources: Sequence[str], request: int, tables: Mapping[str, Rows], probes: Mapping[str, Probe],
    trained_before: bool, questions: Sequence[Item],
) -> str:  # fmt: skip
    words = {"forget": "rows forgotten", "retain": "retained", "holdout": "held out"}
    parts = []
    for name, table in tables.items():
        probed = sum(len(probes[probe].items) for probe in (name, f"validation_{name}") if probe in probes)
        some = f" ({probed} probed)" if probed < len(table.rows) else ""
        if table.rows:
            parts.append(f"{len(table.rows)} {words[name]}{some}{and_general(questions) if name == 'retain' else ''}")
    source = sources[request - 1]
    short = source if source.startswith(HUB) else Path(source).name
    which = f"request {request} of {len(sources)}: " if len(sources) > 1 else ""
    before = "; the target is model.path as it is" if trained_before else ""
    return f"custom ({which}{short}): {', '.join(parts)}{before}"
