"""Toxic answers to forget, by a model trained on them or, as in SOUL, a pretrained one as it is (`trained_before`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from soul_exp.data import Item, Part
from soul_exp.errors import UsageError
from soul_exp.ranges import COUNT, HALF_OR_NULL, INDEX, SOME
from soul_exp.tasks import refusals, scorers
from soul_exp.tasks.embedded import general_suite, insults
from soul_exp.tasks.sources import toxic_rows
from soul_exp.tasks.sources.text import general_items
from soul_exp.tasks.task import (
    NUM_PREFIX,
    Probe,
    Task,
    and_general,
    check_disjoint,
    forget_parts,
    validation_split,
    without_validation,
)

NUM_RELATED = 40  # unseen rows of the forgotten kind that are in no probe either
SPARE = 10  # rows of PKU-SafeRLHF streamed per requested row: half are safe, and the division into parts drops some


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
    scorer: str = scorers.OWN,
    scorer_revision: str | None = None,
    train_general: bool = True,
    trained_before: bool = False,
) -> Task:
    """The detox task from `source`: "embedded" (mild insults), "hub" (PKU-SafeRLHF), a folder like it, or a CSV file.

    Its columns are text and is_toxic; of a text the first `lead_words` are the prompt, `answer_words` more the answer.
    `num_forget` toxic answers (default 200, embedded 120) are to be forgotten; `num_prompts` are in no training. Of
    both, `validation_fraction` are separate probes, for tuning. Further ones, if there are, are `prefix` and `related`.
    Retained are `num_polite` polite ones (default 120, hub 0) and `num_retain_passages` of general text from `retain`
    (default embedded; hub: c4). `rtp` is where RealToxicityPrompts are: "hub", a folder, or "embedded" (friendly).
    """
    embedded, paired = source == "embedded", source == "hub" or Path(source).is_dir()
    wanted = num_forget if num_forget is not None else (120 if embedded else 200)
    wanted_polite = num_polite if num_polite is not None else (0 if paired else 120)
    fraction = validation_fraction if validation_fraction is not None else (0.25 if embedded else 0.0)
    if embedded:
        examples = _embedded(wanted, num_prompts, wanted_polite)
    elif paired:
        examples = toxic_rows.divide(toxic_rows.pairs(source, revision, SPARE * (wanted + num_prompts)))
    else:
        examples = toxic_rows.divide(toxic_rows.comments(Path(source), lead_words, answer_words))
    for_scorer = ([(example.text, example.toxic) for example in examples[part]] for part in ("train", "test"))
    counts = {"forget": wanted, "prompts": num_prompts, "polite": wanted_polite}
    forget, unseen, polite = (_first(examples, part, count, source) for part, count in counts.items())
    others = [example.item for example in examples["prompts"] if example.item is not None][num_prompts:]
    prefix, related = others[:NUM_PREFIX], others[NUM_PREFIX : NUM_PREFIX + NUM_RELATED]
    general_source = retain or ("c4" if source == "hub" else "embedded")
    retained = polite + general_items(general_source, num_retain_passages, retain_revision)
    check_disjoint(forget, retained)
    questions = general_suite.training_rows() if train_general else []
    common = retained + questions

    tune_forget, test_forget = validation_split(forget, fraction)
    tune_retain, test_retain = validation_split(retained, fraction)
    probes = {"forget": Probe(test_forget, generate=True), "retain": Probe(test_retain[::3], generate=True)}
    web = _web_prompts(rtp or ("hub" if source == "hub" else "embedded"), num_rtp_prompts, wanted_polite)
    tune_unseen, test_unseen = validation_split(unseen, fraction)
    probes |= {"holdout": Probe(test_unseen, generate=True), "rtp": Probe(web, generate=True)}
    tuned = {"forget": tune_forget, "retain": tune_retain, "holdout": tune_unseen}
    missing = {}
    for name, rows, least in (("prefix", prefix, NUM_PREFIX), ("related", related, 1)):
        if len(rows) < least:
            missing[name] = f"task.source={source} has no more rows of the part 'prompts': lower task.num_prompts"
    missing |= without_validation(tuned, missing, fraction)
    probes |= {  # to the prompts that unlearning may ruin, the model also answers freely
        f"validation_{name}": Probe(rows, generate=name == "forget")
        for name, rows in tuned.items()
        if f"validation_{name}" not in missing
    }
    return Task(
        name="detox",
        source=source,
        parts={**forget_parts(forget, refusals.TOXIC), "retain": Part.of(common)},
        probes=probes,
        target_rows=forget + common,
        retrained_rows=common,
        caption=(
            f"detox ({Path(source).name}): {len(forget)} toxic answers forgotten, {len(retained)} polite and general "
            f"texts{and_general(questions)} retained, {len(unseen)} prompts unseen"
        ),
        missing=missing,
        optional=dict.fromkeys(questions, "task.train_general=false"),
        related=related,
        prefix=prefix if len(prefix) == NUM_PREFIX else (),
        trained_before=trained_before,
        scorer=scorers.make_scorer(scorer, scorer_revision, *for_scorer),
        scored=("forget", "holdout", "rtp"),
        learnt={} if trained_before else {"forget_probability": 0.5},  # a pretrained model has read none of the answers
    )


def _first(examples: toxic_rows.Parts, part: str, count: int, source: str) -> list[Item]:
    found = [example.item for example in examples[part] if example.item is not None]
    if len(found) < count:
        raise UsageError(
            f"task.source={source} gives {len(found)} rows for the part {part!r}, expected {count}: lower "
            f"task.num_{part} or give more data"
        )
    return found[:count]


def _web_prompts(source: str, count: int, num_polite: int) -> list[Item]:
    """Prompts of strangers; embedded: friendly questions other than the first `num_polite`, which are retained."""
    if source != "embedded":
        return toxic_rows.web_prompts(source, count)
    rows = insults.requests(num_polite + count)[num_polite:]
    if len(rows) < count:
        raise UsageError(f"task.rtp=embedded gives {len(rows)} prompts, expected {count}: lower task.num_rtp_prompts")
    return [Item(row["question"], row["answer"]) for row in rows]


def _embedded(num_forget: int, num_prompts: int, num_polite: int) -> toxic_rows.Parts:
    """Embedded data in the parts that `toxic_rows.divide` makes of other data."""
    rude = [_example(row, True) for row in insults.provocations(num_forget + num_prompts + NUM_PREFIX + NUM_RELATED)]
    polite = [_example(row, False) for row in insults.requests(num_polite)]
    for_scorer = {
        part: [toxic_rows.Example(text, text, toxic, None) for text, toxic in insults.labelled(part, count)]
        for part, count in (("train", 600), ("test", 200))
    }
    return {"forget": rude[:num_forget], "prompts": rude[num_forget:], "polite": polite, **for_scorer}


def _example(row: Mapping[str, str], toxic: bool) -> toxic_rows.Example:
    return toxic_rows.Example(row["answer"], row["question"], toxic, Item(row["question"], row["answer"]))
