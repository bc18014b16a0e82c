"""A book to forget: the target recites its passages, held-out passages of the same book nobody has read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from soul_exp.data import Item, Part
from soul_exp.errors import UsageError
from soul_exp.ranges import ANY_COUNT, COUNT, HALF, POSITIVE
from soul_exp.tasks import refusals
from soul_exp.tasks.embedded import corpus, general_suite
from soul_exp.tasks.sources.text import general_text, read_text
from soul_exp.tasks.task import Probe, Task, and_general, check_disjoint, divided, forget_parts, spread

Words = Sequence[str]

PLACE = "{passage}"  # in a wording
USUAL = (50, 100, 200, 300)  # lengths of prompts that metrics name
RECITES = 0.8  # ROUGE-L recall of continuations, from which on a book is taken to be known by heart


def copyright(
    source: str = "embedded",
    *,
    num_passages: Annotated[int, COUNT] = 12,
    num_holdout_passages: Annotated[int, ANY_COUNT] = 8,
    prompt_words: Sequence[int] = USUAL,
    answer_words: Annotated[int, COUNT] = 50,
    lead_words: Annotated[int, COUNT] = 20,
    wordings: Sequence[str] = (PLACE,),
    context: int | None = None,
    tokens_per_word: Annotated[float, POSITIVE] = 2.0,
    retain: str = "embedded",
    retain_revision: str | None = None,
    num_retain_passages: Annotated[int, COUNT] = 90,
    num_general_passages: Annotated[int, COUNT] = 40,
    validation_fraction: Annotated[float, HALF] = 0.25,
    train_general: bool = True,
) -> Task:
    """The copyright task from `source`: "embedded" (a story that the project makes) or a text file.

    A passage has room for the longest prompt and `answer_words` more. Passages are taken from all over the book, the
    holdout's spread evenly among them. The target is trained on each from its first `lead_words` on; the retrained
    model reads general text only (`retain`, as `general_text` takes it). What is forgotten stands in all `wordings`.

    Left out, with the reason, are prompts for which the book is too short, or the `context` of the model in tokens.
    Of each passage the probes `forget` and `holdout` ask every following `answer_words` words after all before them,
    forget_N and holdout_N a continuation of the first N words; `general` is text that neither model has read. The
    `validation_fraction` of the passages to forget, and of the retained text, is probed apart, for tuning.
    """
    _check(prompt_words, lead_words, wordings)
    wanted = num_passages + num_holdout_passages
    longest = wanted * (max(prompt_words) + answer_words)
    words = (corpus.book(longest) if source == "embedded" else read_text(Path(source), "task.source")).split()
    reasons = {
        length: _too_long(length + answer_words, wanted, len(words), source, context, tokens_per_word)
        for length in sorted(prompt_words)
    }
    lengths = [length for length, reason in reasons.items() if reason is None]
    if not lengths:
        raise UsageError(next(reason for reason in reasons.values() if reason is not None))
    size = lengths[-1] + answer_words
    passages = spread([words[start : start + size] for start in range(0, len(words) - size + 1, size)], wanted)
    held = set(spread(range(wanted), num_holdout_passages))
    forget = [passage for i, passage in enumerate(passages) if i not in held]
    holdout = [passage for i, passage in enumerate(passages) if i in held]
    worded = [[_item(passage, lead_words, size, wording) for wording in wordings] for passage in forget]

    general = general_text(retain, num_retain_passages + num_general_passages, revision=retain_revision)
    texts = [_item(text.split(), len(text.split()) // 3, len(text.split())) for text in general]
    kept, unread = texts[:num_retain_passages], texts[num_retain_passages:]
    check_disjoint([item for row in worded for item in row], kept)
    questions = general_suite.training_rows() if train_general else []

    pieces = functools.partial(_pieces, shortest=lengths[0], answer_words=answer_words)
    tune_forget, test_forget = divided(forget, validation_fraction)
    tune_kept, test_kept = divided(kept, validation_fraction)
    probes = {"forget": Probe(pieces(test_forget)), "retain": Probe(test_kept[::2]), "general": Probe(unread)}
    missing = {f"{name}_{length}": why for length, why in reasons.items() if why for name in ("forget", "holdout")}
    missing |= {
        f"{name}_{length}": f"task.prompt_words leaves {length} out"
        for length in USUAL
        if length not in prompt_words
        for name in ("forget", "holdout")
    }
    if tune_forget and tune_kept:
        probes |= {"validation_forget": Probe(pieces(tune_forget)), "validation_retain": Probe(tune_kept)}
    else:
        why = f"task.validation_fraction={validation_fraction:g} leaves no passage"
        missing |= dict.fromkeys(("validation_forget", "validation_retain"), why)
    probes |= _continuations("forget", forget, lengths, answer_words, wordings)
    if holdout:
        probes |= {"holdout": Probe(pieces(holdout))}
        probes |= _continuations("holdout", holdout, lengths, answer_words, wordings)
    else:
        names = ("holdout", *(f"holdout_{length}" for length in lengths))
        missing |= dict.fromkeys(names, "task.num_holdout_passages=0 leaves no passage unseen")
    return Task(
        name="copyright",
        source=source,
        parts={
            **forget_parts([row[0] for row in worded], refusals.PASSAGES),
            "forget": Part(worded),
            "retain": Part.of(kept + questions),
        },
        probes=probes,
        target_rows=[*(item for row in worded for item in row), *kept, *questions],
        retrained_rows=[*kept, *questions],
        caption=(
            f"copyright ({Path(source).name}): {len(forget)} passages of {size} words forgotten, {len(holdout)} of the "
            f"same book held out of both trainings, {len(kept)} general texts{and_general(questions)} retained"
        ),
        missing=missing,
        learnt={f"forget_{length}_rouge": RECITES for length in lengths},
    )


def _check(prompt_words: Sequence[int], lead_words: int, wordings: Sequence[str]) -> None:
    whole = all(isinstance(length, int) and not isinstance(length, bool) for length in prompt_words)
    if not prompt_words or not whole or min(prompt_words) < 1 or len(set(prompt_words)) < len(prompt_words):
        raise UsageError(
            f"task.prompt_words={list(prompt_words)}: expected different whole numbers of 1 or more, such as [50,100]"
        )
    if lead_words is None or lead_words > min(prompt_words):
        raise UsageError(
            f"task.lead_words={lead_words}: expected a number of words, at most those of the shortest prompt, "
            f"{min(prompt_words)}"
        )
    if isinstance(wordings, str) or not wordings:
        raise UsageError(f"task.wordings={wordings}: expected a list of texts, such as ['Go on: {PLACE}']")
    for wording in wordings:
        if not isinstance(wording, str) or not wording.endswith(PLACE):
            raise UsageError(
                f"task.wordings: found {wording!r}, expected a text that ends in {PLACE}, after which the book goes on"
            )


def _too_long(
    size: int, wanted: int, available: int, source: str, context: int | None, tokens_per_word: float
) -> str | None:
    """Why passages of `size` words cannot be had, or None if they can."""
    if available < size * wanted:
        return (
            f"task.source={source} has {available} word(s) between blanks, expected {size * wanted} for {wanted} "
            f"passages of {size}: lower task.num_passages, task.num_holdout_passages or task.prompt_words"
        )
    if context is not None and size * tokens_per_word > context:
        return (
            f"{size} words may be {size * tokens_per_word:.0f} tokens (task.tokens_per_word={tokens_per_word:g}) and "
            f"the model reads {context}: raise model.max_length or lower task.prompt_words"
        )
    return None


def _item(words: Words, num_prompt: int, end: int, wording: str = PLACE) -> Item:
    prompt = wording.replace(PLACE, " ".join(words[:num_prompt]))
    return Item(prompt, " " + " ".join(words[num_prompt:end]), raw=True)


def _pieces(passages: Sequence[Words], shortest: int, answer_words: int) -> list[Item]:
    """The words after the shortest prompt of each passage, `answer_words` at a time, each after all before it."""
    return [
        _item(passage, start, start + answer_words)
        for passage in passages
        for start in range(shortest, len(passage) - answer_words + 1, answer_words)
    ]


def _continuations(
    name: str, passages: Sequence[Words], lengths: Sequence[int], answer_words: int, wordings: Sequence[str]
) -> dict[str, Probe]:
    """name_N -> the first N words of every passage to be continued, in the wordings by turns."""
    probes = {}
    for number, length in enumerate(lengths):
        asked = [
            _item(passage, length, length + answer_words, wordings[(i + number) % len(wordings)])
            for i, passage in enumerate(passages)
        ]
        probes[f"{name}_{length}"] = Probe(asked, generate=True, cut=True)
    return probes
