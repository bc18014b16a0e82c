"""A book to forget: the target recites its passages; other passages of the same book are in no training."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from soul_exp.data import Part
from soul_exp.errors import UsageError
from soul_exp.metrics import text
from soul_exp.ranges import ANY_COUNT, COUNT, HALF, POSITIVE
from soul_exp.tasks import refusals, task
from soul_exp.tasks.embedded import corpus, general_suite
from soul_exp.tasks.sources.records import read_text
from soul_exp.tasks.sources.text import PASSAGE, continued, general_items

USUAL = (50, 100, 200, 300)  # lengths of prompts that metrics name
RECITES = 0.8  # ROUGE-L recall of continuations at which a model counts as reciting the book


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
    `validation_fraction` of the passages to forget, and of the retained text, are separate probes, for tuning.
    """
    _check(prompt_words, lead_words, wordings)
    num_all = num_passages + num_holdout_passages
    longest = num_all * (max(prompt_words) + answer_words)
    book = corpus.book(longest) if source == "embedded" else read_text(Path(source), f"task.source={source}")
    words = text.pieces(book)
    reasons = {
        length: _too_long(length + answer_words, num_all, len(words), source, context, tokens_per_word)
        for length in sorted(prompt_words)
    }
    lengths = [length for length, reason in reasons.items() if reason is None]
    if not lengths:
        raise UsageError(next(reason for reason in reasons.values() if reason is not None))
    size = lengths[-1] + answer_words
    passages = task.evenly_spaced([words[i : i + size] for i in range(0, len(words) - size + 1, size)], num_all)
    held_out = task.evenly_spaced(range(num_all), num_holdout_passages)
    forget, holdout = [passages[i] for i in range(num_all) if i not in held_out], [passages[i] for i in held_out]
    rows = [[continued(passage, lead_words, wording) for wording in wordings] for passage in forget]
    general = general_items(retain, num_retain_passages + num_general_passages, retain_revision)
    retained, unseen = general[:num_retain_passages], general[num_retain_passages:]
    task.check_disjoint([item for row in rows for item in row], retained)
    questions = general_suite.training_rows() if train_general else []

    pieces = functools.partial(_pieces_of, shortest=lengths[0], answer_words=answer_words)
    continuations = functools.partial(_continuations, lengths=lengths, answer_words=answer_words, wordings=wordings)
    tune_forget, test_forget = task.validation_split(forget, validation_fraction)
    tune_retain, test_retain = task.validation_split(retained, validation_fraction)
    probes = {
        "forget": pieces(test_forget),
        "retain": task.Probe(test_retain[::2]),
        "general": task.Probe(unseen),
    }
    reasons = {**{length: f"task.prompt_words leaves {length} out" for length in USUAL}, **reasons}
    missing = {f"{name}_{length}": why for length, why in reasons.items() if why for name in ("forget", "holdout")}
    if tune_forget and tune_retain:
        probes |= {"validation_forget": pieces(tune_forget), "validation_retain": task.Probe(tune_retain)}
    else:
        missing |= task.no_validation(validation_fraction)
    probes |= continuations("forget", test_forget)
    if holdout:
        probes |= {"holdout": pieces(holdout), **continuations("holdout", holdout)}
    else:
        why = "task.num_holdout_passages=0 leaves no passage unseen"
        missing |= dict.fromkeys(("holdout", *(f"holdout_{length}" for length in lengths)), why)
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


def _pieces_of(passages: Sequence[list[str]], shortest: int, answer_words: int) -> task.Probe:
    """The words after the shortest prompt of each passage, `answer_words` at a time, each after all before it."""
    pieces = [
        (continued(passage[: start + answer_words], start), f"passage {number}")
        for number, passage in enumerate(passages, start=1)
        for start in range(shortest, len(passage) - answer_words + 1, answer_words)
    ]
    return task.Probe([item for item, _ in pieces], units=[unit for _, unit in pieces])


def _continuations(
    name: str, passages: Sequence[list[str]], *, lengths: Sequence[int], answer_words: int, wordings: Sequence[str]
) -> dict[str, task.Probe]:
    """name_N -> a probe whose prompts are the first N words of every passage, the wordings taking turns."""
    probes = {}
    for number, length in enumerate(lengths):
        items = [
            continued(passage[: length + answer_words], length, wordings[(i + number) % len(wordings)])
            for i, passage in enumerate(passages)
        ]
        probes[f"{name}_{length}"] = task.Probe(items, generate=True, cut=True)
    return probes
