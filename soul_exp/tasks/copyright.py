"""A book to forget: the target recites its passages; other passages of the same book are in no training."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from soul_exp.data import Item, Part
from soul_exp.errors import UsageError
from soul_exp.metrics import text
from soul_exp.ranges import ANY_COUNT, COUNT, HALF, POSITIVE
from soul_exp.tasks import refusals, task
from soul_exp.tasks.embedded import corpus, general_suite
from soul_exp.tasks.sources.records import read_text
from soul_exp.tasks.sources.text import PASSAGE, continued, general_items

USUAL = (50, 100, 200, 300)  # lengths of prompts that metrics name
NUM_RELATED = 4  # passages of the book in neither training nor any probe; one more gives the prefix
RECITES = 0.8  # ROUGE-L recall of continuations at which a model counts as reciting the book


class Passage(NamedTuple):
    """Words of a book, as `pieces` gives them, and the name of the passage, which is one independent unit."""

    unit: str
    words: list[str]


def copyright(
    source: str = "embedded",
    *,
    num_passages: Annotated[int, COUNT] = 12,
    num_holdout_passages: Annotated[int, ANY_COUNT] = 8,
    prompt_words: Sequence[int] = USUAL,
    answer_words: Annotated[int, COUNT] = 50,
    lead_words: Annotated[int, COUNT] = 20,
    wordings: Sequence[str] = (PASSAGE,),
    context: int | None = None,
    tokens_per_word: Annotated[float, POSITIVE] = 2.0,
    retain: str = "embedded",
    retain_revision: str | None = None,
    num_retain_passages: Annotated[int, COUNT] = 90,
    num_general_passages: Annotated[int, COUNT] = 40,
    validation_fraction: Annotated[float, HALF] = 0.25,
    train_general: bool = True,
) -> task.Task:
    """The copyright task from `source`: "embedded" (a generated story) or a text file.

    A passage has room for the longest prompt and `answer_words` more. Passages are taken evenly spaced from the book,
    the holdout's evenly spaced among them. The target is trained on each from its first `lead_words` on, in all
    `wordings`; the retrained model on general text only (`retain`, as `general_text` takes it). Prompts for which the
    book is too short, or the `context` of the model in tokens, are left out, with the reason in `missing`.

    Of each passage the probes `forget` and `holdout` ask for every following `answer_words` words after all before
    them, forget_N and holdout_N for a continuation of the first N words; `general` is text in neither training. The
    `validation_fraction` of the passages to forget, of the held-out ones and of the retained text are separate probes,
    for tuning. `related` are other passages of the book, where it has as many, and `prefix` are pieces of one more.
    """
    _check(prompt_words, lead_words, wordings)
    num_all = num_passages + num_holdout_passages
    longest = num_all * (max(prompt_words) + answer_words)
    embedded, more = source == "embedded", (NUM_RELATED + 1) * (max(prompt_words) + answer_words)
    book = corpus.book(longest + more) if embedded else read_text(Path(source), f"task.source={source}")
    words = text.pieces(book)
    reasons = {
        length: _too_long(length + answer_words, num_all, len(words), source, context, tokens_per_word)
        for length in sorted(prompt_words)
    }
    lengths = [length for length, reason in reasons.items() if reason is None]
    if not lengths:
        raise UsageError(next(reason for reason in reasons.values() if reason is not None))
    size = lengths[-1] + answer_words
    starts = range(0, len(words) - size + 1, size)
    available = [Passage(f"passage {i}", words[start : start + size]) for i, start in enumerate(starts, start=1)]
    passages = task.evenly_spaced(available[: longest // size] if embedded else available, num_all)
    held_out = task.evenly_spaced(range(num_all), num_holdout_passages)
    forget, holdout = [passages[i] for i in range(num_all) if i not in held_out], [passages[i] for i in held_out]
    rows = [[continued(passage.words, lead_words, wording) for wording in wordings] for passage in forget]
    used = {passage.unit for passage in passages}
    related, prefix = _others([passage for passage in available if passage.unit not in used], lead_words, wordings[0])
    general = general_items(retain, num_retain_passages + num_general_passages, retain_revision)
    retained, unseen = general[:num_retain_passages], general[num_retain_passages:]
    task.check_disjoint([item for row in rows for item in row], retained)
    questions = general_suite.training_rows() if train_general else []

    pieces = functools.partial(_pieces, shortest=lengths[0], answer_words=answer_words)
    continuations = functools.partial(_continuations, lengths=lengths, answer_words=answer_words, wordings=wordings)
    tune_forget, test_forget = task.validation_split(forget, validation_fraction)
    tune_retain, test_retain = task.validation_split(retained, validation_fraction)
    tune_holdout, test_holdout = task.validation_split(holdout, validation_fraction)
    probes = {
        "forget": pieces(test_forget),
        "retain": task.Probe(test_retain[::2]),
        "general": task.Probe(unseen),
    }
    reasons = {**{length: f"task.prompt_words leaves {length} out" for length in USUAL}, **reasons}
    missing = {f"{name}_{length}": why for length, why in reasons.items() if why for name in ("forget", "holdout")}
    probes |= continuations("forget", test_forget)
    if holdout:
        probes |= {"holdout": pieces(test_holdout), **continuations("holdout", test_holdout)}
    else:
        why = "task.num_holdout_passages=0 leaves no passage unseen"
        missing |= dict.fromkeys(("holdout", *(f"holdout_{length}" for length in lengths)), why)
    if not related:
        why = f"task.source={source} has fewer than {NUM_RELATED + 1} other passages of {size} words"
        missing |= dict.fromkeys(("related", "prefix"), why)
    tuned: dict[str, Sequence[object]] = {"forget": tune_forget, "retain": tune_retain, "holdout": tune_holdout}
    missing |= task.without_validation(tuned, missing, validation_fraction)
    made = {"forget": pieces(tune_forget), "retain": task.Probe(tune_retain), "holdout": pieces(tune_holdout)}
    probes |= {f"validation_{name}": probe for name, probe in made.items() if f"validation_{name}" not in missing}
    common = [*retained, *questions]
    return task.Task(
        name="copyright",
        source=source,
        parts={
            **task.forget_parts([row[0] for row in rows], refusals.PASSAGES),
            "forget": Part(rows),
            "retain": Part.of(common),
        },
        probes=probes,
        target_rows=[*(item for row in rows for item in row), *common],
        retrained_rows=common,
        caption=(
            f"copyright ({Path(source).name}): {len(forget)} passages of {size} words forgotten, {len(holdout)} of the "
            f"same book held out of both trainings, {len(retained)} general texts{task.and_general(questions)} retained"
        ),
        missing=missing,
        optional=dict.fromkeys(questions, "task.train_general=false"),
        related=related,
        prefix=prefix,
        learnt={f"forget_{length}_rouge": RECITES for length in lengths},
        unit="passage",
    )


def _check(prompt_words: Sequence[int], lead_words: int, wordings: Sequence[str]) -> None:
    if not prompt_words or not all(map(COUNT.fits, prompt_words)) or len(set(prompt_words)) < len(prompt_words):
        raise UsageError(
            f"task.prompt_words={list(prompt_words)}: expected different whole numbers of 1 or more, such as [50,100]"
        )
    if lead_words is None or lead_words > min(prompt_words):
        raise UsageError(
            f"task.lead_words={lead_words}: expected a number of words, at most those of the shortest prompt, "
            f"{min(prompt_words)}"
        )
    if isinstance(wordings, str) or not wordings:
        raise UsageError(f"task.wordings={wordings}: expected a list of texts, such as ['Go on: {PASSAGE}']")
    for wording in wordings:
        if not isinstance(wording, str) or not wording.endswith(PASSAGE):
            raise UsageError(
                f"task.wordings: found {wording!r}, expected a text that ends in {PASSAGE}, as the book continues there"
            )


def _too_long(
    size: int, wanted: int, available: int, source: str, context: int | None, tokens_per_word: float
) -> str | None:
    if available < size * wanted:
        return (
            f"task.source={source} has {available} word(s), expected {size * wanted} for {wanted} "
            f"passages of {size}: lower task.num_passages, task.num_holdout_passages or task.prompt_words"
        )
    if context is not None and size * tokens_per_word > context:
        return (
            f"{size} words may be {size * tokens_per_word:.0f} tokens (task.tokens_per_word={tokens_per_word:g}) and "
            f"the model reads {context}: raise model.max_length or lower task.prompt_words"
        )
    return None


def _others(passages: Sequence[Passage], lead_words: int, wording: str) -> tuple[list[Item], list[Item]]:
    """Rows of NUM_RELATED passages, as the forgotten ones are trained on, and NUM_PREFIX short ones of another."""
    if len(passages) <= NUM_RELATED:
        return [], []
    *related, spare = (passage.words for passage in task.evenly_spaced(passages, NUM_RELATED + 1))
    size = max(2, min(2 * lead_words, len(spare) // task.NUM_PREFIX))
    short = [spare[start : start + size] for start in range(0, task.NUM_PREFIX * size, size)]
    rows = [continued(words, lead_words, wording) for words in related]
    return rows, [continued(words, size // 2) for words in short if len(words) == size]


def _pieces(passages: Sequence[Passage], shortest: int, answer_words: int) -> task.Probe:
    """The words after the shortest prompt of each passage, `answer_words` at a time, each after all before it."""
    found = [
        (unit, continued(words[: start + answer_words], start))
        for unit, words in passages
        for start in range(shortest, len(words) - answer_words + 1, answer_words)
    ]
    return task.Probe([item for _, item in found], units=[unit for unit, _ in found])


def _continuations(
    name: str, passages: Sequence[Passage], *, lengths: Sequence[int], answer_words: int, wordings: Sequence[str]
) -> dict[str, task.Probe]:
    """name_N -> a probe whose prompts are the first N words of every passage, the wordings taking turns."""
    probes = {}
    for number, length in enumerate(lengths):
        items = [
            continued(passage.words[: length + answer_words], length, wordings[(i + number) % len(wordings)])
            for i, passage in enumerate(passages)
        ]
        units = [passage.unit for passage in passages]
        probes[f"{name}_{length}"] = task.Probe(items, units=units, generate=True, cut=True)
    return probes
