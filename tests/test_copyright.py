"""The copyright task: which passages of a book are in which training, which prompts fit, and general text."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from soul_exp.artifacts.scores import not_learnt
from soul_exp.errors import UsageError
from soul_exp.tasks.copyright import copyright
from soul_exp.tasks.embedded import corpus
from soul_exp.tasks.sources import text
from soul_exp.tasks.sources.records import read_text
from soul_exp.tasks.task import Task

BOOK = " ".join(f"w{i}" for i in range(1000))


def small(tmp_path: Path, **options: object) -> Task:
    """10 passages of 14 words from a book of 1000 numbered ones, 4 of them held out."""
    (tmp_path / "book.txt").write_text(BOOK)
    given = {"num_passages": 6, "num_holdout_passages": 4, "prompt_words": (4, 10), "answer_words": 4, "lead_words": 2}
    return copyright(str(tmp_path / "book.txt"), **{**given, **options})  # type: ignore[arg-type]


def first_words(task: Task, probe: str) -> list[str]:
    return [item.prompt.split()[0] for item in task.probes[probe].items]


def test_passages_are_evenly_spaced_in_the_book_and_the_holdout_among_them(tmp_path: Path) -> None:
    task = small(tmp_path, validation_fraction=0.0)
    assert first_words(task, "holdout_4") == ["w0", "w196", "w490", "w686"]  # passages 0, 14, 35 and 49 of 71
    assert first_words(task, "forget_4") == ["w98", "w294", "w392", "w588", "w784", "w882"]
    row = task.parts["forget"].rows[0]
    assert row[0].prompt == "w98 w99" and row[0].answer == " " + " ".join(f"w{i}" for i in range(100, 112))


def test_a_continuation_follows_its_prompt_and_pieces_cover_the_text_after_the_shortest_prompt(tmp_path: Path) -> None:
    task = small(tmp_path, validation_fraction=0.0)
    assert task.probes["forget_10"].items[0].answer == " w108 w109 w110 w111"
    pieces = [item.answer for item in task.probes["forget"].items[:2]]
    assert pieces == [" w102 w103 w104 w105", " w106 w107 w108 w109"]  # the two remaining words make no piece
    assert task.probes["forget"].items[1].prompt == " ".join(f"w{i}" for i in range(98, 106))
    assert len(task.probes["forget"].items) == 6 * 2
    assert task.missing["validation_forget"] == "task.validation_fraction=0 leaves no rows"


def test_the_forget_part_has_every_wording_and_prompts_alternate_between_them(tmp_path: Path) -> None:
    task = small(tmp_path, wordings=["{passage}", "Go on: {passage}"], validation_fraction=0.0)
    assert [item.prompt for item in task.parts["forget"].rows[0]] == ["w98 w99", "Go on: w98 w99"]
    assert [item.prompt for item in task.target_rows[:2]] == ["w98 w99", "Go on: w98 w99"]
    assert [item.prompt.startswith("Go on") for item in task.probes["forget_4"].items] == [False, True] * 3
    assert [item.prompt.startswith("Go on") for item in task.probes["forget_10"].items] == [True, False] * 3


def test_validation_passages_are_in_no_other_probe(tmp_path: Path) -> None:
    task = small(tmp_path)  # a quarter of six, rounded down: one
    assert first_words(task, "validation_forget") == ["w392"] * 2
    for probe in ("forget", "forget_4", "forget_10"):
        assert set(first_words(task, probe)) == {"w98", "w294", "w588", "w784", "w882"}
    prompts, tuned = ({i.prompt for i in task.probes[name].items} for name in ("retain", "validation_retain"))
    assert prompts and tuned and not prompts & tuned


def test_pieces_of_a_passage_are_one_unit_and_other_passages_are_related(tmp_path: Path) -> None:
    task = small(tmp_path, validation_fraction=0.0)
    units = {name: task.probes[name].units or () for name in ("forget", "forget_4", "holdout")}
    assert len(units["forget"]) == 12 and set(units["forget"]) == set(units["forget_4"])
    assert len(set(units["forget"])) == 6
    assert not set(units["forget"]) & set(units["holdout"])
    used = {word for probe in task.probes.values() for item in probe.items for word in item.prompt.split()}
    assert len(task.related) == 4 and not used & {word for item in task.related for word in item.prompt.split()}
    assert [f"{item.prompt}{item.answer}".count(" ") + 1 for item in task.prefix] == [3] * 4
    every = small(tmp_path, num_passages=60, num_holdout_passages=8)
    assert every.missing["prefix"].endswith("book.txt has fewer than 5 other passages of 14 words")
    assert not every.related


def test_general_text_for_perplexity_is_in_no_training() -> None:
    task = copyright()
    unread = {item.prompt + item.answer for item in task.probes["general"].items}
    assert len(unread) == 40 and not unread & {item.prompt + item.answer for item in task.target_rows}
    trained = {item.prompt + item.answer for item in task.target_rows}
    assert {item.prompt + item.answer for item in task.probes["retain"].items} <= trained


def test_a_target_that_does_not_recite_the_book_is_noted(tmp_path: Path) -> None:
    learnt = small(tmp_path).learnt
    assert learnt == {"forget_4_rouge": 0.8, "forget_10_rouge": 0.8}
    assert not_learnt(learnt, {"forget_4_rouge": 0.8, "forget_10_rouge": None}) is None
    assert not_learnt(learnt, {"forget_4_rouge": 0.9, "forget_10_rouge": 0.25}) == (
        "the original model has little to forget (forget_10_rouge 0.25, expected 0.8 or more): raise prepare.epochs"
    )


def test_prompts_too_long_for_the_book_or_the_model_are_missing_with_the_reason(tmp_path: Path) -> None:
    task = small(tmp_path, prompt_words=(4, 300))
    assert task.missing["forget_300"] == task.missing["holdout_300"]
    assert "has 1000 word(s), expected 3040 for 10 passages of 304: lower" in task.missing["forget_300"]
    assert task.missing["forget_50"] == "task.prompt_words leaves 50 out"
    assert len(task.parts["forget"].rows[0][0].answer.split()) == 4 + 4 - 2  # of a passage for the prompts that fit
    task = small(tmp_path, context=20)
    assert "14 words may be 28 tokens (task.tokens_per_word=2) and the model reads 20" in task.missing["forget_10"]


def test_a_book_too_short_for_every_prompt_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"word\(s\), expected 1040 for 10 passages of 104: lower task"):
        small(tmp_path, prompt_words=(100,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_words": (4, 4)}, "expected different whole numbers of 1 or more"),
        ({"prompt_words": ()}, r"task.prompt_words=\[\]: expected different whole numbers"),
        ({"lead_words": 5}, "task.lead_words=5: expected a number of words, at most those of the shortest prompt, 4"),
        ({"wordings": ["{passage} Go on!"]}, "expected a text that ends in {passage}"),
        ({"wordings": []}, "expected a list of texts, such as"),
    ],
)
def test_numbers_and_wordings_that_do_not_fit_are_errors(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        small(tmp_path, **options)


def test_the_real_book_is_long_enough_for_every_prompt(real_data: Callable[[str], Path]) -> None:
    task = copyright(str(real_data("alice/alice.txt")), num_passages=24, num_holdout_passages=12, context=1024)
    assert not task.missing and len(task.related) == 4
    assert len(task.probes["holdout_300"].items) == 9 and len(set(task.probes["validation_holdout"].units or ())) == 3
    assert task.probes["forget_300"].items[0].answer.count(" ") == 50


# --- general text ---------------------------------------------------------------------------------------------------


def test_general_text_of_a_file_is_the_beginning_of_each_long_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Title\n\none two three\nfour five six\n\nshort\n\none two three four\n\nA B C D E")
    assert text.general_text(str(tmp_path / "a.txt"), 2, num_words=4) == ["one two three four", "A B C D"]
    with pytest.raises(UsageError, match="has 2 paragraphs of 4 words or more, expected 3"):
        text.general_text(str(tmp_path), 3, num_words=4)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UsageError, match=r"has no \*.txt: give a text file, c4, wikitext or embedded"):
        text.general_text(str(tmp_path), 1)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, mark in (("a", ""), ("b", "\ufeff")):
        (tmp_path / f"{name}.txt").write_text(f"{mark}one two\n\nthree four", encoding="utf-8")
    plain, marked = (read_text(tmp_path / name, "task.source") for name in ("a.txt", "b.txt"))
    assert plain == marked == "one two\n\nthree four"


def test_wikitext_gives_paragraphs_and_no_headings(real_data: Callable[[str], Path]) -> None:
    found = text.general_text(str(real_data("wikitext2")), 300)
    assert len(set(found)) == 300 and {len(passage.split()) for passage in found} == {50}
    assert not any(passage.startswith("=") or "= =" in passage for passage in found)


def test_c4_is_streamed_only_as_far_as_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"{corpus.general_text(30)[i % 30]} {i}", "url": "u"} for i in range(2000)]
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: en\n  data_files: en/train.jsonl\n---\n")
    monkeypatch.setitem(text.HUB, "c4", (str(tmp_path), "en"))
    read: list[int] = []
    load = datasets.load_dataset

    def counted(*args: object, **kwargs: object) -> object:
        loaded = load(*args, **kwargs)  # type: ignore[arg-type]
        assert kwargs["streaming"]
        return {name: split.map(lambda row: read.append(1) or row) for name, split in loaded.items()}

    monkeypatch.setattr(datasets, "load_dataset", counted)
    found = text.general_text("c4", 20, num_words=30)
    assert len(found) == 20 and found[0] == " ".join(rows[0]["text"].split()[:30])
    assert len(read) <= 20 * text.SPARE + 1


def test_an_unreachable_hub_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UsageError, match=r"task.retain=c4: allenai/c4 cannot be reached .* or give task.retain=<text "):
        text.general_text("c4", 20)
