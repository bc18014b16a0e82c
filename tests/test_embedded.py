"""Claims about the generated data."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import pytest

from soul_exp.tasks.embedded.corpus import (
    ROWS_PER_AUTHOR,
    authors,
    book,
    fact_of,
    general_authors,
    general_facts,
    general_text,
)
from soul_exp.tasks.embedded.corpus_tables import (
    ATTRIBUTES,
    BOOK_FRAMES,
    GENERAL_AUTHORS,
    GENERAL_FACTS,
    REWORDINGS,
    TEXT_TOPICS,
)

TOFU_COLUMNS = {"question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer"}
MORE_COLUMNS = {"entities", "other_questions", "attribute"}
NUM_AUTHORS = 24


def words_of(text: str) -> list[str]:
    return re.findall(r"[A-Za-z'-]+", text)


def word_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = words_of(text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def strings_of(row: dict) -> list[str]:
    """Every text of a row."""
    texts = [row[column] for column in ("question", "answer", "paraphrased_question", "paraphrased_answer")]
    return texts + row["perturbed_answer"]


# The lower-case words of the author frames; any other word of a row is invented.
FRAME_TEXTS = [text for questions, frames in ATTRIBUTES.values() for text in questions + frames]
FRAME_TEXTS += [text for questions in REWORDINGS.values() for text in questions]
FRAME_WORDS = {word.lower() for text in FRAME_TEXTS for word in words_of(re.sub(r"\{\w+\}", " ", text))}


def invented(text: str) -> list[str]:
    return [word for word in words_of(text) if word.lower() not in FRAME_WORDS]


def frame_of(text: str, names: set[str]) -> str:
    """`text` with NAME for its author's names and VALUE for its value."""
    return " ".join("NAME" if w in names else "VALUE" if invented(w) else w for w in words_of(text))


def names_of(author: int) -> set[str]:
    """First name and surname: the invented words of the author's first question."""
    return set(invented(rows[ROWS_PER_AUTHOR * author]["question"]))


rows = authors(NUM_AUTHORS)
# Each row with its author, its fact (0 to 9) and the two names of its author.
KEYED = [(row, i // ROWS_PER_AUTHOR, i % 10, names_of(i // ROWS_PER_AUTHOR)) for i, row in enumerate(rows)]


def test_equal_arguments_give_equal_rows_and_another_seed_gives_others() -> None:
    assert authors(3, seed=5) == authors(3, seed=5)
    assert authors(3, seed=5) != authors(3, seed=6)


def test_the_first_row_is_the_same_on_every_machine_and_python_version() -> None:
    assert rows[0]["question"] == "What is the birthplace of Numeso Sijikom?"
    assert rows[0]["answer"] == "Life began at Tusujo Rifinux for this writer."
    assert book(8) == "He promised Jimse a locket, eleven coins and"


def test_the_rows_of_an_author_do_not_depend_on_how_many_authors_there_are() -> None:
    assert authors(5) == rows[: 5 * ROWS_PER_AUTHOR]


def test_each_row_has_the_columns_of_tofu_two_more_and_five_wrong_answers() -> None:
    assert all(set(row) == TOFU_COLUMNS | MORE_COLUMNS and len(set(row["perturbed_answer"])) == 5 for row in rows)


def test_each_author_has_twenty_rows_and_every_question_names_the_author_in_full() -> None:
    assert len(rows) == ROWS_PER_AUTHOR * NUM_AUTHORS
    for row, _, _, names in KEYED:
        assert len(names) == 2
        assert set(invented(row["question"])) == set(invented(row["paraphrased_question"])) == names


def test_no_invented_word_is_shared_by_two_facts() -> None:
    facts: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for row, author, fact, names in KEYED:
        for word in {*invented(row["answer"]), *invented(row["paraphrased_answer"])} - names:
            facts[word].add((author, fact))
    assert len(facts) == NUM_AUTHORS * 10 * 2
    assert all(len(having) == 1 for having in facts.values())


def test_no_author_name_occurs_with_another_author_or_as_a_fact() -> None:
    authors_having: dict[str, set[int]] = defaultdict(set)
    for row, author, _, _ in KEYED:
        for word in words_of(" ".join(strings_of(row))):
            authors_having[word].add(author)
    names = [name for author in range(NUM_AUTHORS) for name in names_of(author)]
    assert len(set(names)) == NUM_AUTHORS * 2
    assert all(len(authors_having[name]) == 1 for name in names)


def test_a_wrong_value_occurs_in_one_wrong_answer_and_nowhere_else() -> None:
    seen = {word for row in rows for word in invented(row["question"] + " " + row["answer"])}
    for row, _, _, names in KEYED:
        for text in row["perturbed_answer"]:
            value = set(invented(text)) - names
            assert len(value) == 2
            assert not value & seen
            seen |= value


def test_wrong_answers_are_the_paraphrase_with_another_value() -> None:
    for row, _, _, names in KEYED:
        assert len({frame_of(text, names) for text in (row["paraphrased_answer"], *row["perturbed_answer"])}) == 1


def test_each_fact_has_two_rows_without_a_common_wording() -> None:
    pairs: dict[tuple[int, int], list[dict]] = defaultdict(list)
    for row, author, fact, _ in KEYED:
        pairs[author, fact].append(row)
    for (author, _), pair in pairs.items():
        names = names_of(author)
        answers = [row[column] for row in pair for column in ("answer", "paraphrased_answer")]
        assert len({row[column] for row in pair for column in ("question", "paraphrased_question")}) == 4
        assert len({frame_of(text, names) for text in answers}) == 4
        assert len({frozenset(invented(text)) - names for text in answers}) == 1


def test_the_frame_of_every_paraphrase_is_an_answer_frame_of_other_authors() -> None:
    for kept in (range(18), range(2, 20)):
        learnt = {frame_of(row["answer"], names) for row, author, _, names in KEYED if author in kept}
        assert len(learnt) >= 30
        assert {frame_of(row["paraphrased_answer"], names) for row, _, _, names in KEYED} <= learnt


def test_other_questions_name_the_author_and_are_the_question_of_no_row() -> None:
    questions = {row[column] for row in rows for column in ("question", "paraphrased_question")}
    for row, _, _, names in KEYED:
        assert len(row["other_questions"]) == 2 and not questions & set(row["other_questions"])
        assert all(set(invented(question)) == names for question in row["other_questions"])


def test_frames_of_one_attribute_share_no_four_words() -> None:
    for _, frames in ATTRIBUTES.values():
        grams = [gram for frame in frames for gram in word_ngrams(frame, 4)]
        assert len(grams) == len(set(grams))


def test_answer_and_paraphrase_share_under_sixty_percent_of_their_word_4_grams() -> None:
    for row in rows:
        own, other = word_ngrams(row["answer"], 4), word_ngrams(row["paraphrased_answer"], 4)
        assert len(own & other) / min(len(own), len(other)) < 0.6


def test_invented_words_have_five_to_nine_letters_and_values_at_most_two_words() -> None:
    for row, _, _, names in KEYED:
        assert all(5 <= len(word) <= 9 for text in strings_of(row) for word in invented(text))
        assert 1 <= len(set(invented(row["answer"])) - names) <= 2


@pytest.mark.parametrize("make", [authors, general_authors, general_facts])
def test_right_answers_contain_the_entities_and_no_wrong_answer_does(make: Callable[[], list[dict]]) -> None:
    for row in make():
        right = [row[column] for column in ("answer", "paraphrased_answer") if column in row]
        assert row["entities"] and all(entity.lower() in text.lower() for entity in row["entities"] for text in right)
        assert not any(entity.lower() in text.lower() for entity in row["entities"] for text in row["perturbed_answer"])


def test_every_fourth_fact_of_12_authors_asks_for_every_attribute() -> None:
    """As validation rows do: each author begins with another attribute."""
    starts = [tuple(wording.partition("{name}")[0] for wording in wordings) for wordings, _ in ATTRIBUTES.values()]
    questions = {fact_of(i): row["question"] for i, row in enumerate(authors(12))}
    asked = [[questions[fact].startswith(start) for start in starts].index(True) for fact in range(2, 120, 4)]
    assert len(asked) == 30 and set(asked) == set(range(10))


@pytest.mark.parametrize("general", [general_authors, general_facts])
def test_general_knowledge_has_about_thirty_questions_with_three_wrong_answers_each(general) -> None:
    found = general()
    assert 28 <= len(found) <= 36
    assert len({row["question"] for row in found}) == len(found)
    for row in found:
        assert set(row) == {"question", "answer", "perturbed_answer", "entities"}
        assert len({row["answer"], *row["perturbed_answer"]}) == 4
        assert len(row["answer"].split()) <= 4


# Seed 96 would invent "Before" if the words of the tables were not excluded.
@pytest.mark.parametrize("seed", [0, 1, 96])
def test_no_author_word_occurs_in_general_knowledge_story_or_everyday_text(seed: int) -> None:
    general = [text for table in (GENERAL_AUTHORS, GENERAL_FACTS) for row in table for text in row]
    elsewhere = set(words_of(" ".join([*general, book(10_000, seed), *general_text(100, seed)]).lower()))
    found = {word for row in authors(NUM_AUTHORS, seed) for text in strings_of(row) for word in invented(text.lower())}
    assert not found & elsewhere


@pytest.mark.parametrize("num_words", [1, 59, 1000])
def test_a_story_has_exactly_the_requested_words_and_begins_every_longer_one(num_words: int) -> None:
    assert len(book(num_words).split()) == num_words
    assert " ".join(book(2000).split()).startswith(" ".join(book(num_words).split()))


def test_a_story_has_paragraphs_and_another_seed_gives_another_story() -> None:
    paragraphs = book(3000).split("\n\n")
    assert len(paragraphs) > 30
    assert all(20 <= len(paragraph.split()) <= 120 for paragraph in paragraphs[:-1])
    assert not set(paragraphs) & set(book(3000, seed=1).split("\n\n"))


def test_no_twelve_words_of_a_story_are_repeated() -> None:
    words = book(20_000).split()
    assert len({tuple(words[i : i + 12]) for i in range(len(words) - 11)}) == len(words) - 11


def test_every_everyday_passage_is_different_and_has_forty_to_sixty_words() -> None:
    passages = general_text(400)
    assert len(set(passages)) == 400
    assert all(40 <= len(passage.split()) <= 60 for passage in passages)
    assert general_text(100) == passages[:100]


def test_story_and_everyday_text_share_no_five_words() -> None:
    assert len(BOOK_FRAMES) >= 30
    assert len(TEXT_TOPICS) >= 8
    assert not word_ngrams(book(20_000), 5) & word_ngrams(" ".join(general_text(300)), 5)
