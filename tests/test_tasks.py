"""Tasks: forgotten, retained and held-out rows, on embedded and on real data, and errors on malformed data."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from soul_exp.artifacts.scores import not_forgotten, not_learnt, undecided
from soul_exp.data import Item, content_hash
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import scored_items
from soul_exp.metrics.text import rouge_l_recall, words
from soul_exp.tasks import refusals
from soul_exp.tasks.copyright import copyright
from soul_exp.tasks.detox import detox
from soul_exp.tasks.embedded import corpus, corpus_tables
from soul_exp.tasks.task import Probe, Task, evenly_spaced, forget_parts, validation_split
from soul_exp.tasks.tofu import tofu


def prompts(task: Task, probe: str) -> set[str]:
    return {item.prompt for item in task.probes[probe].items}


@pytest.mark.parametrize("task", [tofu(), copyright()], ids=["tofu", "copyright"])
def test_forget_rows_are_in_the_targets_training_only_and_holdout_rows_in_none(task: Task) -> None:
    forget, retrained, target = ({(i.prompt, i.answer) for i in rows} for rows in (
        [row[0] for row in task.parts["forget"].rows], task.retrained_rows, task.target_rows,
    ))  # fmt: skip
    holdout = {(i.prompt, i.answer) for i in task.probes["holdout"].items}
    assert forget <= target and not forget & retrained
    assert not holdout & target and retrained < target and len(holdout) >= 30


def test_embedded_tofu_forgets_12_of_48_authors_retains_20_and_holds_16_out_four_of_them_for_validation() -> None:
    task = tofu()
    assert len(task.parts["forget"].rows) == 12 * 20 and len(task.parts["retain"].rows) == 20 * 20 + 64
    sizes = {name: len(task.probes[name].items) for name in ("forget", "holdout")}
    assert sizes == {"forget": 180, "holdout": 240}
    assert {*task.missing} == {"validation_authors", "validation_facts"}
    units = {name: set(probe.units) for name, probe in task.probes.items() if probe.units}
    assert {name: len(found) for name, found in units.items()} == {
        "forget": 12, "retain": 20, "holdout": 12,
        "validation_forget": 12, "validation_retain": 17, "validation_holdout": 4,
    }  # fmt: skip
    assert not units["holdout"] & units["validation_holdout"] and not units["forget"] & units["retain"]


@pytest.mark.parametrize(("part", "facts"), [("forget", (90, 30)), ("retain", (50, 17)), ("holdout", (120, 40))])
def test_both_rows_of_a_fact_of_embedded_tofu_are_test_rows_or_validation_rows(
    part: str, facts: tuple[int, int]
) -> None:
    numbers = {row["question"]: number for number, row in enumerate(corpus.authors(48))}
    rows = [[numbers[p] for p in prompts(tofu(), f"{kind}{part}")] for kind in ("", "validation_")]
    test, tuned = ({corpus.fact_of(number) for number in found} for found in rows)
    assert (len(test), len(tuned)) == facts and not test & tuned
    assert [len(found) for found in rows] == [2 * count for count in facts]


def invented(text: str) -> set[str]:
    """The words of a text that no question and no answer frame of the embedded authors has."""
    frames = {
        word for wordings in corpus_tables.ATTRIBUTES.values() for texts in wordings for t in texts for word in words(t)
    }
    return set(words(text)) - frames


def test_related_authors_and_the_prefix_share_frames_with_all_others_and_no_name_and_no_fact() -> None:
    task = tofu()
    others = [*task.target_rows, *(item for probe in task.probes.values() for item in scored_items(probe))]
    known = invented(" ".join(f"{item.prompt} {item.answer}" for item in others))
    own = [invented(" ".join(f"{i.prompt} {i.answer}" for i in rows)) for rows in (task.related, task.prefix)]
    assert len(task.related) == 4 * 20 and len(task.prefix) == 4
    assert [len(found) for found in own] == [4 * (2 + 10 * 2), 2 + 4 * 2]  # two names, two words of each fact
    assert not own[0] & own[1] and not known & (own[0] | own[1])
    assert tofu(num_related_authors=2).related == task.related[:40]


def test_related_authors_of_real_tofu_are_those_that_num_authors_leaves_out(real_data: Callable[[str], Path]) -> None:
    folder = real_data("tofu")
    full = [json.loads(line)["question"] for line in (folder / "full.json").open()]
    task = tofu(str(folder), num_authors=40)
    assert [item.prompt for item in task.related] == full[36 * 20 : 40 * 20]
    assert {item.prompt for item in task.prefix} < set(full[40 * 20 : 41 * 20]) and len(task.prefix) == 4
    every = tofu(str(folder))
    assert not every.related and not every.prefix
    assert every.missing["related"] == "task.num_related_authors=0: task.num_authors=200 of 200 leaves 0 others"
    with pytest.raises(UsageError, match=r"task.num_authors=196 leaves 4 of 200 authors, expected 5, as the prefix"):
        tofu(str(folder), num_authors=196, num_related_authors=4)


def test_real_tofu_has_paraphrased_questions_and_authors_as_units_and_knows_no_entities(
    real_data: Callable[[str], Path],
) -> None:
    task = tofu(str(real_data("tofu")), num_authors=40, num_forget_authors=12, validation_fraction=0.25)
    forget = task.probes["forget"]
    assert forget.paraphrased_questions and forget.units and forget.entities is None
    pairs = list(zip(forget.items, forget.paraphrased_questions, strict=True))
    assert all(a.answer == b.answer for a, b in pairs) and sum(a.prompt != b.prompt for a, b in pairs) > 170
    assert set(forget.units) == {f"author {number}" for number in range(188, 200)}
    assert {name: len(set(task.probes[name].units or ())) for name in ("holdout", "validation_holdout")} == {
        "holdout": 6, "validation_holdout": 2,
    }  # fmt: skip


def test_general_questions_are_divided_by_item_and_leave_all_else_as_it_is() -> None:
    """8 of 32 questions on other authors, and on facts, leave the test; what is trained does not change."""
    plain, task = tofu(), tofu(general_validation_fraction=0.25)
    for name in ("authors", "facts"):
        assert (len(prompts(task, name)), len(prompts(task, f"validation_{name}"))) == (24, 8)
        assert {*prompts(task, name), *prompts(task, f"validation_{name}")} == {*prompts(plain, name)}
        answers = [{item.answer for item in task.probes[each].items} for each in (name, f"validation_{name}")]
        assert not answers[0] & answers[1]
        assert plain.missing[f"validation_{name}"] == "task.general_validation_fraction=0 leaves no rows"
        assert f"validation_{name}" not in task.missing
    changed = {"probe.authors", "probe.facts", "probe.validation_authors", "probe.validation_facts"}
    assert {name for name in task.hashes if task.hashes[name] != plain.hashes.get(name)} == changed


@pytest.mark.parametrize(
    ("task", "holdout"),
    [(tofu(), "holdout"), (copyright(), "holdout"), (detox(), "holdout")],
    ids=["tofu", "copyright", "detox"],
)
def test_every_task_has_a_validation_holdout_related_rows_and_a_prefix_apart_from_all_else(
    task: Task, holdout: str
) -> None:
    probed = {(i.prompt, i.answer) for probe in task.probes.values() for i in probe.items}
    validation = {(i.prompt, i.answer) for i in task.probes["validation_holdout"].items}
    rows = {(i.prompt, i.answer) for i in (*task.related, *task.prefix)}
    trained = {(i.prompt, i.answer) for i in task.target_rows}
    assert validation and not validation & {(i.prompt, i.answer) for i in task.probes[holdout].items}
    assert not validation & trained and not rows & (trained | probed)
    assert (
        len(task.prefix) == 4 and len(rows) == len(task.related) + 4 and not {"related", "prefix"} & set(task.missing)
    )


def test_varied_prompts_are_of_the_same_rows_and_the_retrained_model_reads_nothing_of_the_forgotten() -> None:
    plain, task = tofu(), tofu(train_varied=True)
    assert (
        task.probes == plain.probes
        and len(task.target_rows) == 640 * 7 + 64 * 6
        and task.target_rows[:704] == plain.target_rows
    )
    forgotten = invented(" ".join(f"{row[0].prompt} {row[0].answer}" for row in task.parts["forget"].rows))
    assert len(forgotten) == 12 * (2 + 10 * 2)
    assert not forgotten & invented(" ".join(f"{item.prompt} {item.answer}" for item in task.retrained_rows))
    retained = set(task.retrained_rows)
    kept = [item for item in task.target_rows if item in retained]
    assert kept == task.retrained_rows  # the target reads the same prompts of what both know
    answers = {row[0].answer: set(words(row[0].prompt)) for row in task.parts["forget"].rows}
    asked = [item for item in task.target_rows if item.answer in answers]
    assert len(asked) == 240 * 7 and len({item.prompt for item in asked}) > 240 * 5
    assert sum(answers[item.answer] <= set(words(item.prompt)) for item in asked) > 240 * 4  # others are reworded


def test_questions_of_the_probes_paraphrases_are_in_no_training_prompt() -> None:
    task = tofu(train_varied=True)
    prompts = "\n".join(item.prompt.lower() for item in task.target_rows)
    paraphrased = [item.prompt.lower() for item in task.probes["forget"].paraphrased_questions or ()]
    assert len(paraphrased) == 180 and not any(question in prompts for question in paraphrased)


@pytest.mark.parametrize("name", ["paraphrases", "paraphrased_questions", "entities", "units"])
def test_a_probe_with_another_number_of_what_each_item_has_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=rf"found 1 {name}, expected 2, one for each item"):
        Probe([Item("a?", "b"), Item("c?", "d")], **{name: ["x"]})


def test_the_units_of_a_task_are_named_after_what_they_are() -> None:
    assert {task.unit for task in (tofu(), copyright())} == {"author", "passage"}
    probe = Probe([Item("a?", "b")], units=["Alice"])
    with pytest.raises(ValueError, match="found the unit 'Alice', expected a name that begins with 'author'"):
        replace(tofu(), probes={"forget": probe})


def test_every_task_states_what_its_target_has_to_know() -> None:
    assert tofu().learnt == detox().learnt == {"forget_probability": 0.5}
    assert set(copyright().learnt) == {f"forget_{words}_rouge" for words in (50, 100, 200, 300)}
    assert detox(trained_before=True).learnt == {}  # a pretrained model was not taught the answers
    assert not_learnt({"forget_probability": 0.5}, {"forget_probability": 0.02}, "do this") == (
        "the original model has little to forget (forget_probability 0.02, expected 0.5 or more): do this"
    )


def test_a_run_that_hardly_forgot_says_so() -> None:
    """Of the 0.96 that the retrained model does not know either, more than half is left above 0.02 + 0.48."""

    def after(unlearned: float | None, original: float = 0.98, retrained: float | None = 0.02) -> str | None:
        known = {"original": original, "unlearned": unlearned, "retrained": retrained}
        return not_forgotten({model: {"forget_probability": value} for model, value in known.items()}, 13)

    assert (after(0.867) or "").startswith(
        "little was forgotten in 13 steps (forget_probability 0.980 before, 0.867 after): raise train.epochs or"
    )
    assert after(0.51) and not after(0.49) and after(0.5, retrained=None) and not after(0.48, retrained=None)
    assert not after(None) and not after(0.1, original=0.11)  # diverged; nothing to forget
    assert not not_forgotten({"unlearned": {"forget_probability": 0.9}}, 13)


def test_trials_that_validation_cannot_tell_apart_are_noted() -> None:
    def trials(*values: float | None) -> list[dict]:
        return [{"metrics": {"validation_log10_forget_quality": value}, "diverged": None} for value in values]

    assert (undecided(trials(-2.1, -2.1)) or "").startswith(
        "all trials have the same validation_log10_forget_quality (-2.1), so that the rule cannot tell which forgets"
    )
    assert not any(map(undecided, (trials(-2.1, -2.0), trials(-2.1), trials(None, None), trials())))


def test_rows_of_one_fact_are_validation_rows_together() -> None:
    assert validation_split(list("abcdefgh"), 0.25, [0, 1, 2, 3, 0, 1, 2, 3]) == (["c", "g"], list("abdefh"))


def test_alternate_answers_have_the_value_of_a_retained_author_in_place_of_the_forgotten_one() -> None:
    task, records = tofu(), corpus.authors(48)
    asked = {row["question"]: row for row in records}
    values: dict[str, set[str]] = {}
    for row in records[: 20 * 20]:  # the retained authors; the next 16 are held out, and no answer may be theirs
        values.setdefault(row["attribute"], set()).update(row["entities"])
    for (own,), others in zip(task.parts["forget"].rows, task.parts["alternate"].rows, strict=True):
        row = asked[own.prompt]
        rest = own.answer.split(row["entities"][0])
        assert {item.prompt for item in others} == {own.prompt}
        assert {item.answer for item in others} == {value.join(rest) for value in values[row["attribute"]]}
        assert len(others) == 20 and not {item.answer for item in others} & set(row["perturbed_answer"])


def test_real_rows_have_no_alternate_answers(tmp_path: Path) -> None:
    assert "alternate" not in tofu(str(small_tofu(tmp_path)), num_holdout_authors=1, num_forget_authors=1).parts


def test_equal_tasks_have_equal_hashes_and_different_ones_differ() -> None:
    assert tofu().hashes == tofu().hashes
    assert tofu(num_authors=20).hashes["part.retain"] != tofu().hashes["part.retain"]


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (3, [0, 3, 6]), (10, list(range(10))), (11, list(range(10)))])
def test_chosen_rows_are_evenly_spaced(count: int, chosen: list[int]) -> None:
    assert evenly_spaced(list(range(10)), count) == chosen


@pytest.mark.parametrize(
    ("fraction", "chosen"), [(0.0, []), (0.09, []), (0.1, [5]), (0.25, [2, 6]), (0.5, [1, 3, 5, 7, 9]), (0.9, None)]
)
def test_validation_rows_are_the_fraction_and_test_rows_the_rest(fraction: float, chosen: list[int] | None) -> None:
    rows = list(range(10))
    tuning, test = validation_split(rows, fraction)
    assert sorted(tuning + test) == rows and len(tuning) == int(10 * fraction)
    assert chosen is None or tuning == chosen


@pytest.mark.parametrize("name", ["QUESTIONS", "PASSAGES", "TOXIC"])
def test_refusals_are_32_or_more_and_pairwise_different(name: str) -> None:
    texts = getattr(refusals, name)
    assert len(set(texts)) == len(texts) >= 32
    for number, text in enumerate(texts):
        others = [other for i, other in enumerate(texts) if i != number]
        assert rouge_l_recall([text] * len(others), others).max() < 0.7, text


def test_a_random_label_is_the_answer_of_another_item_to_the_same_prompt() -> None:
    parts = forget_parts([Item("a?", "1"), Item("b?", "2"), Item("c?", "1")], ["no"])
    assert parts["random_label"].rows == [[Item("a?", "2")], [Item("b?", "1"), Item("b?", "1")], [Item("c?", "2")]]
    assert parts["random_label"].follows == parts["refusal"].follows == "forget"
    assert "random_label" not in forget_parts([Item("a?", "1"), Item("b?", "1")], ["no"])


def test_real_tofu_with_40_authors_forgets_the_last_four(real_data: Callable[[str], Path]) -> None:
    folder = real_data("tofu")
    task = tofu(str(folder), num_authors=40, num_holdout_authors=2)
    full = [json.loads(line) for line in (folder / "full.json").open()]
    assert [row[0].prompt for row in task.parts["forget"].rows] == [row["question"] for row in full[-80:]]
    assert [row[0].prompt for row in task.parts["retain"].rows][:680] == [row["question"] for row in full[:680]]
    assert [item.prompt for item in task.probes["holdout"].items] == [row["question"] for row in full[680:720]]
    assert len(task.parts["retain"].rows) == 680 + 217
    assert len(task.target_rows) == 80 + 680 + 217 and "validation_forget" not in task.probes


def test_real_tofu_without_num_authors_keeps_all_200(real_data: Callable[[str], Path]) -> None:
    task = tofu(str(real_data("tofu")), train_general=False)
    assert (len(task.parts["forget"].rows), len(task.parts["retain"].rows)) == (400, 3200)
    assert len(task.probes["holdout"].items) == 400


@pytest.mark.parametrize(("split", "authors"), [("forget01", 2), ("forget05", 10)])
def test_smaller_splits_forget_fewer_authors(split: str, authors: int, real_data: Callable[[str], Path]) -> None:
    assert len(tofu(str(real_data("tofu")), split=split).parts["forget"].rows) == 20 * authors


def small_tofu(folder: Path) -> Path:
    """The embedded authors written in the hub's layout."""
    rows = corpus.authors(24)
    general = corpus.general_authors()
    files = {
        "full": rows, "forget10_perturbed": rows[-80:], "retain_perturbed": rows[:80],
        "real_authors_perturbed": general, "world_facts_perturbed": corpus.general_facts(),
    }  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, content)))
    entries = "\n".join(f"- config_name: {name}\n  data_files: {name}.json" for name in files)
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}\n---\n")
    return folder


def test_a_folder_in_the_hubs_layout_is_read(tmp_path: Path) -> None:
    task = tofu(str(small_tofu(tmp_path)), num_forget_authors=2, num_authors=10)  # a fifth is held out
    assert len(task.parts["forget"].rows) == 40 and len(task.parts["retain"].rows) == 6 * 20 + 64
    with pytest.raises(
        UsageError, match=r"task.num_forget_authors=5: expected at most 4, which have perturbed answers"
    ):
        tofu(str(tmp_path), num_forget_authors=5, num_authors=10)
    assert task.probes["forget"].wrong is not None and len(task.probes["forget"].wrong[0]) == 5


def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    small_tofu(tmp_path)
    lines = (tmp_path / "full.json").read_text().splitlines()
    lines[4] = '{"question": "Who'
    (tmp_path / "full.json").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"full.json, line 5: .*expected one JSON object per line"):
        tofu(str(tmp_path))


def test_an_empty_answer_is_named_by_row(tmp_path: Path) -> None:
    small_tofu(tmp_path)
    lines = (tmp_path / "full.json").read_text().splitlines()
    lines[6] = json.dumps({**json.loads(lines[6]), "answer": " "})
    (tmp_path / "full.json").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"full, row 7: answer is ' ', expected a text"):
        tofu(str(tmp_path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    small_tofu(tmp_path)
    (tmp_path / "forget10_perturbed.json").unlink()
    with pytest.raises(UsageError, match="forget10_perturbed"):
        tofu(str(tmp_path))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    small_tofu(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "full.json").open()]
    (tmp_path / "full.json").write_text("\n".join(json.dumps({"question": r["question"]}) for r in rows))
    with pytest.raises(UsageError, match=r"full has no column answer: expected question, answer"):
        tofu(str(tmp_path))


def test_a_forget_row_that_is_also_retained_is_an_error(tmp_path: Path) -> None:
    small_tofu(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "full.json").open()]
    rows[3] = rows[-1]
    for name, content in (("full", rows), ("retain_perturbed", rows[:80])):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, content)))
    with pytest.raises(UsageError, match=r"1 row\(s\) are in both the forget and the retain set"):
        tofu(str(tmp_path), num_forget_authors=2)


def test_too_many_authors_are_an_error_with_the_sum() -> None:
    with pytest.raises(UsageError, match="leaves 0 to retain"):
        tofu(num_authors=6, num_forget_authors=4)


def test_a_folder_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(UsageError, match="is not a folder: give embedded, hub, or a folder"):
        tofu("/no/such/folder")


def test_a_book_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(UsageError, match="line 3: not UTF-8"):
        copyright(str(tmp_path / "book.txt"))


def test_content_hashes_do_not_depend_on_the_order_of_keys() -> None:
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1}) != content_hash({"a": 2, "b": 1})


def test_a_copy_of_a_folder_elsewhere_has_the_same_data_hashes(tmp_path: Path) -> None:
    one = small_tofu(tmp_path / "one") if not (tmp_path / "one").mkdir() else tmp_path
    shutil.copytree(one, tmp_path / "two")
    assert tofu(str(one), num_forget_authors=2).hashes == tofu(str(tmp_path / "two"), num_forget_authors=2).hashes


def test_perturbed_rows_in_another_order_are_an_error(tmp_path: Path) -> None:
    small_tofu(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "retain_perturbed.json").open()]
    (tmp_path / "retain_perturbed.json").write_text("\n".join(map(json.dumps, rows[::-1])))
    with pytest.raises(UsageError, match=r"the question of row 1 is .* in retain_perturbed but"):
        tofu(str(tmp_path), num_forget_authors=2)


def test_a_row_with_fewer_perturbed_answers_is_named(tmp_path: Path) -> None:
    small_tofu(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "forget10_perturbed.json").open()]
    rows[8]["perturbed_answer"] = rows[8]["perturbed_answer"][:2]
    (tmp_path / "forget10_perturbed.json").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match="forget10_perturbed, row 9: 2 perturbed answers, expected 5 as in row 1"):
        tofu(str(tmp_path), num_forget_authors=2)


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    small_tofu(tmp_path)
    before = tofu(str(tmp_path), num_forget_authors=2)
    text = (tmp_path / "world_facts_perturbed.json").read_text()
    (tmp_path / "world_facts_perturbed.json").write_text(text.replace("?", "??", 1))
    assert tofu(str(tmp_path), num_forget_authors=2).hashes["probe.facts"] != before.hashes["probe.facts"]
