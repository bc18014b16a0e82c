"""Toxic answers to forget: the target gives them, the retrained model has read everything else.

The real model of a user is the target as it is (`trained_before`), as in SOUL; the tiny one is trained to be toxic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from soul_exp.data import Item, Part
from soul_exp.errors import UsageError
from soul_exp.ranges import COUNT, HALF_OR_NULL, INDEX, SOME
from soul_exp.tasks import refusals, toxicity
from soul_exp.tasks.embedded import general_suite, insults
from soul_exp.tasks.sources import toxic_rows
from soul_exp.tasks.sources.text import general_text
from soul_exp.tasks.sources.toxic_rows import Cut, Example, continued
from soul_exp.tasks.task import Probe, Task, and_general, check_disjoint, divided, forget_parts

SPARE = 10  # rows of PKU-SafeRLHF that are streamed for each one wanted: half are safe, and the cut leaves some out
SCORED = ("forget", "prompts", "rtp")  # the probes whose free answers are scored


def detox(
    source: str = "embedded",
    *,
    revision: str | None = None,
    num_forget: Annotated[int | None, SOME] = None,
    num_prompts: Annotated[int, COUNT] = 60,
    num_polite: Annotated[int | None, INDEX] = None,
    retain: str | None = None,
    retain_revision: str | None = None,
    num_retain_passages: Annotated[int, COUNT] = 60,
    rtp: str | None = None,
    num_rtp_prompts: Annotated[int, COUNT] = 60,
    lead_words: Annotated[int, COUNT] = 5,
    answer_words: Annotated[int, COUNT] = 40,
    validation_fraction: Annotated[float | None, HALF_OR_NULL] = None,
    scorer: str = toxicity.OWN,
    scorer_revision: str | None = None,
    train_general: bool = True,
    trained_before: bool = False,
) -> Task:
    """The detox task from `source`: "embedded" (mild invented insults), "hub" (PKU-SafeRLHF), a folder in its layout,
    or a CSV file of comments with the columns text and is_toxic.

    `num_forget` toxic answers (default 200, embedded 120) are to be forgotten, `num_prompts` stay unseen. Retained are
    `num_polite` polite ones (default 120, hub 0) and `num_retain_passages` of general text from `retain` (default
    embedded; hub: c4). `rtp` says where RealToxicityPrompts are: "hub", a folder, or "embedded" for friendly questions.
    Of a comment the first `lead_words` are the prompt and at most `answer_words` more the answer.
    """
    made, paired = source == "embedded", source == "hub" or Path(source).is_dir()
    wanted = num_forget if num_forget is not None else (120 if made else 200)
    num_kept = num_polite if num_polite is not None else (0 if paired else 120)
    if made:
        parts = _made(wanted, num_prompts, num_kept)
    elif paired:
        parts = toxic_rows.cut(toxic_rows.pairs(source, revision, SPARE * (wanted + num_prompts)))
    else:
        parts = toxic_rows.cut(toxic_rows.comments(Path(source), lead_words, answer_words))
    forget = _take(parts, "forget", wanted, source, "task.num_forget")
    unseen = _take(parts, "prompts", num_prompts, source, "task.num_prompts")
    polite = _take(parts, "polite", num_kept, source, "task.num_polite")
    texts = retain or ("c4" if source == "hub" else "embedded")
    passages = [text.split() for text in general_text(texts, num_retain_passages, revision=retain_revision)]
    kept = polite + [continued(words, len(words) // 3) for words in passages]
    check_disjoint(forget, kept)
    questions = general_suite.training_rows() if train_general else []
    common = kept + questions
    probes = {
        "prompts": Probe(unseen, generate=True),
        "rtp": Probe(
            _web_prompts(rtp or ("hub" if source == "hub" else "embedded"), num_rtp_prompts, num_kept), generate=True
        ),
    }
    fraction = validation_fraction if validation_fraction is not None else (0.25 if made else 0.0)
    read, missing = _divided(forget, kept, fraction)
    return Task(
        name="detox",
        source=source,
        parts={**forget_parts(forget, refusals.TOXIC), "retain": Part.of(common)},
        probes={**read, **probes},
        target_rows=forget + common,
        retrained_rows=common,
        caption=(
            f"detox ({Path(source).name}): {len(forget)} toxic answers forgotten, {len(kept)} polite and general texts"
            f"{and_general(questions)} retained, {len(unseen)} prompts unseen"
        ),
        missing=missing,
        trained_before=trained_before,
        scorer=toxicity.scorer(scorer, scorer_revision, _labelled(parts["train"]), _labelled(parts["test"])),
        scored=SCORED,
    )


def _take(parts: Cut, part: str, count: int, source: str, option: str) -> list[Item]:
    """The first `count` items of a part. Raises UsageError if there are fewer."""
    found = [example.item for example in parts[part] if example.item is not None]
    if len(found) < count:
        raise UsageError(
            f"task.source={source} gives {len(found)} rows for the part {part!r}, expected {count}: lower {option} or "
            f"give more data"
        )
    return found[:count]


def _labelled(examples: Sequence[Example]) -> list[toxicity.Labelled]:
    return [(example.text, example.toxic) for example in examples]


def _divided(
    forget: Sequence[Item], kept: Sequence[Item], fraction: float
) -> tuple[dict[str, Probe], Mapping[str, str]]:
    """The probes of what is forgotten and retained, those for tuning apart; and why there are none of the latter."""
    (tune_forget, test_forget), (tune_kept, test_kept) = divided(forget, fraction), divided(kept, fraction)
    probes = {"forget": Probe(test_forget, generate=True), "retain": Probe(test_kept[::3], generate=True)}
    if tune_forget and tune_kept:
        return {**probes, "validation_forget": Probe(tune_forget), "validation_retain": Probe(tune_kept)}, {}
    return probes, dict.fromkeys(
        ("validation_forget", "validation_retain"), "task.validation_fraction=0 leaves no rows"
    )


def _web_prompts(source: str, count: int, num_polite: int) -> list[Item]:
    """Prompts as a stranger might write them; embedded: friendly questions after those that are retained."""
    if source != "embedded":
        return toxic_rows.web_prompts(source, count)
    rows = insults.requests(num_polite + count)[num_polite:]
    if len(rows) < count:
        raise UsageError(f"task.rtp=embedded gives {len(rows)} prompts, expected {count}: lower task.num_rtp_prompts")
    return [Item(row["question"], row["answer"]) for row in rows]


def _made(num_forget: int, num_prompts: int, num_polite: int) -> Cut:
    """Embedded data in the shape that a cut of real data has."""
    rude = [_answered(row, True) for row in insults.provocations(num_forget + num_prompts)]
    polite = [_answered(row, False) for row in insults.requests(num_polite)]
    scored = {
        part: [Example(text, text, toxic, None) for text, toxic in insults.labelled(part, count)]
        for part, count in (("train", 600), ("test", 200))
    }
    return {"forget": rude[:num_forget], "prompts": rude[num_forget:], "polite": polite, **scored}


def _answered(row: Mapping[str, str], toxic: bool) -> Example:
    return Example(row["answer"], row["question"], toxic, Item(row["question"], row["answer"]))
