"""Templates, token ids, padding, and the order in which training visits rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import items

from soul_exp.data import Encoded, Item, Part, Template, encode, pad, without_end
from soul_exp.errors import UsageError
from soul_exp.models.language_model import LanguageModel
from soul_exp.training.stream import Stream, visits, windows


def stream(lm: LanguageModel, batch_size: int = 4, seed: int = 0, num_steps: int = 6) -> Stream:
    forget, retain = items(10), items(17, start=20)
    refusals = Part([[Item(i.prompt, text) for text in ("No.", "I do not know.")] for i in forget], follows="forget")
    parts = {"forget": Part.of(forget), "retain": Part.of(retain), "refusal": refusals}
    encoded = {name: (p, lm.encode([i for row in p.rows for i in row])) for name, p in parts.items()}
    return Stream(encoded, num_steps=num_steps, batch_size=batch_size, seed=seed)


def test_every_answer_ends_in_one_end_token(lm: LanguageModel) -> None:
    for encoded in lm.encode(items(9)):
        assert list(encoded.ids).count(lm.tokenizer.eos_token_id) == 1
        assert encoded.ids[-1] == lm.tokenizer.eos_token_id


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("end", ["<|end|>", "<|end|><|end|>", "<|end|>\n"])
def test_an_answer_that_writes_out_the_end_token_is_the_same_row_as_one_that_does_not(
    end: str, raw: bool, lm: LanguageModel
) -> None:
    plain = Item("Which amber is number 0?", " amber birch", raw)
    assert lm.encode([replace(plain, answer=plain.answer + end)]) == lm.encode([plain])
    assert without_end([replace(plain, answer=plain.answer + end)], lm.tokenizer) == [plain]


@pytest.mark.parametrize("tokenizer", ["llama", "gpt2", "byte"])
def test_the_end_token_is_the_tokenizers_own(tokenizer: str, lm: LanguageModel) -> None:
    lm.tokenizer.add_special_tokens({"eos_token": {"llama": "</s>", "gpt2": "<|endoftext|>", "byte": "#"}[tokenizer]})
    written = f"amber{lm.tokenizer.eos_token}"
    ids = encode([Item("Which?", written)], lm.tokenizer, Template(), 128)[0].ids
    assert list(ids).count(lm.tokenizer.eos_token_id) == 1 and ids[-1] == lm.tokenizer.eos_token_id
    assert without_end([Item("Which?", "amber<|end|>")], lm.tokenizer) == [Item("Which?", "amber<|end|>")]


def test_an_end_token_that_a_template_writes_is_not_repeated(lm: LanguageModel) -> None:
    written = replace(lm.template, answer=" {answer}<|end|>")
    assert encode(items(3), lm.tokenizer, written, 128) == lm.encode(items(3))


def test_a_template_that_continues_after_the_end_token_is_named_and_no_row_is(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match=r"model.template.answer=.* continues after the end token <\|end\|>"):
        encode(items(3), lm.tokenizer, replace(lm.template, answer=" {answer}<|end|> so"), 128)


def test_an_end_token_within_an_answer_or_alone_is_an_error_that_names_the_row(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match=r"'amber<\|end\|>birch' to 'Why\?' continues after the end token <\|end\|>"):
        lm.encode([Item("Why?", "amber<|end|>birch")])
    with pytest.raises(UsageError, match=r"the answer to 'Why\?' is the end token <\|end\|> and no text: give it one"):
        lm.encode([Item("Why?", " <|end|>")])
    assert lm.encode([Item("<|end|>Why<|end|>", "amber")])  # a prompt may hold it, as those of chats do


def test_the_prompt_of_training_is_the_prompt_of_generation(lm: LanguageModel) -> None:
    item = items(1)[0]
    encoded = lm.encode([item])[0]
    prompt, answer = lm.template.texts(item)
    assert lm.tokenizer.decode(encoded.ids[: encoded.num_prompt]) == prompt
    assert lm.tokenizer.decode(encoded.ids[encoded.num_prompt : -1]) == answer


def test_raw_text_bypasses_the_template() -> None:
    assert Template().texts(Item("Once upon", " a time", raw=True)) == ("Once upon", " a time")


def test_a_system_prompt_precedes_the_question_and_running_text() -> None:
    base = Template(system_prompt="Keep quiet.")
    assert base.texts(Item("Who?", "Me")) == ("Keep quiet.\n\nQuestion: Who?\nAnswer:", " Me")
    chat = Template("<|u|>{question}<|a|>", "{answer}", "<|s|>{system}<|u|>{question}<|a|>")
    assert chat.texts(Item("Who?", "Me")) == ("<|u|>Who?<|a|>", "Me")
    assert replace(chat, system_prompt="Keep quiet.").texts(Item("Who?", "Me")) == (
        "<|s|>Keep quiet.<|u|>Who?<|a|>",
        "Me",
    )
    assert base.texts(Item("Once upon", " a time", raw=True)) == ("Keep quiet.\n\nOnce upon", " a time")
    assert chat.markers() == ["<|u|>", "<|a|>", "<|s|>"]


def test_braces_in_a_system_prompt_or_a_question_are_text() -> None:
    template = Template(system_prompt="Not {question}.")
    assert template.texts(Item("{system}?", "Me"))[0] == "Not {question}.\n\nQuestion: {system}?\nAnswer:"


def test_a_row_that_only_the_system_prompt_makes_too_long_says_so(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match=r"tokens with the system prompt but the model reads 128"):
        lm.with_system_prompt("quiet " * 60).encode(items(1))


def test_braces_in_a_question_are_text() -> None:
    assert Template().texts(Item("What is {answer}?", "{question}")) == (
        "Question: What is {answer}?\nAnswer:",
        " {question}",
    )


def test_positions_predict_the_labels_and_padding_has_none() -> None:
    batch = pad([Encoded([5, 6, 7, 8], 2), Encoded([5, 9], 1)], pad_id=0)
    assert batch["positions"].tolist() == [[1, 2], [0, 0]]
    assert batch["labels"].tolist() == [[7, 8], [9, -100]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_row_longer_than_the_model_reads_is_named(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match="the model reads 128"):
        lm.encode([Item("Why?", "so " * 200)])


# (rows of the first set, rows of the second, batch size): a batch divides one, both, neither; a batch is larger
SIZES = [(40, 360, 8), (40, 200, 32), (20, 100, 8), (80, 363, 8), (83, 701, 8), (8, 9, 8), (5, 40, 8), (3, 2, 8)]


def drawn(num_rows: int, others: int, batch_size: int, num_steps: int = 50, seed: int = 0) -> np.ndarray:
    """[num_steps, batch_size] the rows that each step visits of the first of two sets, of 5 to 89 tokens each."""
    lengths = np.random.default_rng(num_rows).integers(5, 90, num_rows)
    shared = windows((num_rows, others), batch_size, num_steps)
    return visits(lengths, batch_size, shared, seed, "forget").reshape(num_steps, batch_size)


@pytest.mark.parametrize(("first", "second", "batch_size"), SIZES)
def test_a_step_holds_no_row_twice_or_all_rows_almost_equally_often(first: int, second: int, batch_size: int) -> None:
    for num_rows, others in ((first, second), (second, first)):
        counts = np.stack([np.bincount(step, minlength=num_rows) for step in drawn(num_rows, others, batch_size)])
        if num_rows >= batch_size:
            assert counts.max() == 1
        else:
            assert (counts.max(1) - counts.min(1)).max() <= 1


@pytest.mark.parametrize(("first", "second", "batch_size"), SIZES)
def test_every_pass_visits_every_row_once(first: int, second: int, batch_size: int) -> None:
    for num_rows, others in ((first, second), (second, first)):
        order = drawn(num_rows, others, batch_size).ravel()
        passes = [order[start : start + num_rows] for start in range(0, len(order) - num_rows + 1, num_rows)]
        assert len(passes) == len(order) // num_rows and all(sorted(rows) == list(range(num_rows)) for rows in passes)


def test_the_order_is_drawn_anew_in_each_pass_and_from_each_seed() -> None:
    order = drawn(40, 360, 8).ravel()
    assert (order[:40] != order[40:80]).any() and (order == drawn(40, 360, 8).ravel()).all()
    assert (order != drawn(40, 360, 8, seed=1).ravel()).any()


def test_windows_end_where_a_pass_of_any_set_ends() -> None:
    """40 rows in steps of 8: after 5, 10 ...; 100 rows: inside step 12 (from 0), so after 13, and after 25."""
    assert [(w.start, w.stop) for w in windows((40, 100), 8, 26)] == [
        (0, 5), (5, 10), (10, 13), (13, 15), (15, 20), (20, 25), (25, 26),
    ]  # fmt: skip
    assert [(w.start, w.stop) for w in windows((1000, 3), 8, 40)] == [(0, 16), (16, 32), (32, 40)]


def test_steps_hold_rows_of_similar_length_and_long_rows_of_all_parts_meet() -> None:
    """Two sets whose passes end together, and two whose passes end inside steps: a third of the padding, or half."""
    for sizes, share in (((80, 360), 1 / 3), ((83, 363), 1 / 2)):
        shared, rng = windows(sizes, 8, 200), np.random.default_rng(0)
        bucketed, anyhow = [], []
        for num_rows in sizes:
            lengths = rng.integers(5, 90, num_rows)
            bucketed.append(lengths[visits(lengths, 8, shared, 0, "a")].reshape(200, 8))
            anyhow.append(np.concatenate([rng.permutation(lengths) for _ in range(20)])[:1600].reshape(200, 8))
        padding = [8 * 2 * joint.max(1).sum() - joint.sum() for joint in map(np.hstack, (bucketed, anyhow))]
        assert padding[0] < share * padding[1]


def test_a_batch_larger_than_a_part_is_noted(lm: LanguageModel) -> None:
    assert stream(lm, batch_size=8).notes == []
    assert stream(lm, batch_size=10).notes == []
    (note,) = stream(lm, batch_size=15).notes
    assert "15 is more than the 10 rows of forget and refusal: a step holds each of them 1 or 2 times" in note


def test_equal_seeds_give_equal_orders_of_rows(lm: LanguageModel) -> None:
    one, other = stream(lm), stream(lm)
    assert all((one.order[name] == other.order[name]).all() for name in one.order)
    assert len(one) == 24
    assert not (stream(lm, seed=1).order["retain"] == one.order["retain"]).all()


def test_a_part_that_follows_another_visits_its_rows_and_draws_a_wording(lm: LanguageModel) -> None:
    planned = stream(lm, num_steps=20)
    assert (planned.order["refusal"] // 2 == planned.order["forget"]).all()
    assert 0.2 < (planned.order["refusal"] % 2).mean() < 0.8


def test_a_part_whose_leading_part_is_absent_still_visits_every_row(lm: LanguageModel) -> None:
    forget = items(10)
    part = Part([[Item(i.prompt, "No.")] for i in forget], follows="forget")
    alone = Stream({"refusal": (part, lm.encode([row[0] for row in part.rows]))}, num_steps=5, batch_size=4, seed=0)
    assert np.bincount(alone.order["refusal"]).tolist() == [2] * 10


def test_stacked_parts_keep_the_labels_of_each_row(lm: LanguageModel) -> None:
    from soul_exp.training.stream import collated

    planned = stream(lm)
    batch = collated([planned[i] for i in range(4)], lm.pad_id)
    assert batch["rows"].shape == (12,)
    for row, number in enumerate(batch["rows"].tolist()):
        name = list(planned.order)[row // 4]
        encoded = planned.encoded[name][number]
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == list(encoded.ids[encoded.num_prompt :])
        assert torch.equal(batch["attention_mask"][row].sum(), torch.tensor(len(encoded.ids)))
