"""A book to forget: passages that the target recites, held-out passages of the same book that nobody has read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from soul_exp.data import Item, Part
from soul_exp.errors import UsageError
from soul_exp.tasks import embedded, embedded_suite, refusals
from soul_exp.tasks.task import Probe, Task, check_disjoint, forget_parts
from soul_exp.tasks.text import read_text


def copyright(
    source: str = "embedded",
    *,
    num_passages: int = 60,
    num_holdout_passages: int = 30,
    num_retain_passages: int = 120,
    prompt_words: int = 20,
    answer_words: int = 40,
    train_general: bool = True,
) -> Task:
    """The copyright task from `source`: "embedded" (a story that the project makes) or a text file.

    Passages of `prompt_words` + `answer_words` words are taken from all over the book; the holdout's are spread evenly
    among them, the others are to be forgotten. The retrained model reads general text only.
    """
    made = source == "embedded"
    length = prompt_words + answer_words
    wanted = num_passages + num_holdout_passages
    text = embedded.book(wanted * length) if made else read_text(Path(source), "task.source")
    words = text.split()
    passages = [words[i * length : (i + 1) * length] for i in range(len(words) // length)]
    if len(passages) < wanted:
        raise UsageError(
            f"task.source={source} has {len(words)} words, enough for {len(passages)} passages of {length}: expected "
            f"{wanted}, lower task.num_passages or task.num_holdout_passages"
        )
    spaced = [passages[i * len(passages) // wanted] for i in range(wanted)]  # from all over the book
    held = {i * wanted // num_holdout_passages for i in range(num_holdout_passages)} if num_holdout_passages else set()
    forget = [_item(words, prompt_words) for i, words in enumerate(spaced) if i not in held]
    holdout = [_item(words, prompt_words) for i, words in enumerate(spaced) if i in held]
    general = embedded.general_text(num_retain_passages)
    retain = [_item(text.split(), len(text.split()) // 3) for text in general]
    knowledge = embedded.general_authors() + embedded.general_facts()
    questions = embedded_suite.training_rows() if train_general else []
    check_disjoint(forget, retain)
    probes = {
        "forget": Probe(forget, generate=True),
        "retain": Probe(retain[::3]),
        "knowledge": Probe(
            [Item(row["question"], row["answer"]) for row in knowledge],
            wrong=[[Item(row["question"], wrong) for wrong in row["perturbed_answer"]] for row in knowledge],
        ),
    }
    missing = {}
    if holdout:
        probes["holdout"] = Probe(holdout, generate=True)
    else:
        missing["holdout"] = "task.num_holdout_passages=0 leaves no passage unseen"
    return Task(
        name="copyright",
        source=source,
        parts={
            **forget_parts(forget, refusals.PASSAGES),
            "retain": Part.of(retain + questions),
        },
        probes=probes,
        target_rows=forget + retain + questions,
        retrained_rows=retain + questions,
        caption=(
            f"copyright ({Path(source).name}): {len(forget)} passages of {length} words forgotten, "
            f"{len(holdout)} of the same book held out of both trainings"
        ),
        missing=missing,
    )


def _item(words: Sequence[str], num_prompt: int) -> Item:
    return Item(" ".join(words[:num_prompt]), " " + " ".join(words[num_prompt:]), raw=True)
