"""Answers, our records of them, and the logs of the TOFU authors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soul_exp.evaluation.records import (
    as_recorded,
    read_open_unlearning,
    read_records,
    read_retrained,
    read_tofu_log,
    rounded,
    write_records,
)
from soul_exp.metrics.answers import Answers

SECTIONS = {
    "retain": "eval_log.json",
    "forget": "eval_log_forget.json",
    "authors": "eval_real_author_wo_options.json",
    "facts": "eval_real_world_wo_options.json",
}


def two_answers() -> Answers:
    """Two examples with every field; 0.1 has no exact binary form, 1/3 needs all digits, one text is hard to quote."""
    return Answers(
        nll=np.array([0.1, 1 / 3]),
        logp=[np.array([-0.25, -1.0000004]), np.array([-3.0])],
        right=[np.array([True, False]), np.array([True])],
        paraphrase_nll=np.array([0.5, 2.0]),
        wrong_nll=np.array([[1.0, 2.0], [3.0, 4.0]]),
        rouge_l=np.array([1.0, 0.0]),
        question=["Where?", 'Who said "hi\n\u2028there"?'],
        answer=["İstanbul", "Zoë"],
        entities=[("İstanbul",), ("Zoë", "Ë")],
        generation=["", "\ud800 half a character"],
        generation_nll=np.array([0.2, 2 / 3]),
        refused=np.array([False, True]),
        unit=["author 1", "author 2"],
        mean_logp=[np.array([-0.125, -2.0]), np.array([-1 / 3])],
        var_logp=[np.array([1e-9, 2.0]), np.array([0.0])],
        gradnorm=np.array([0.1, 2 / 3]),
        gradnorm_mean=np.array([0.01, 1 / 30]),
        recall_ll=np.array([-0.7, -1 / 7]),
    )


def tofu_log(as_lists: bool = False) -> dict[str, Any]:
    """A log of eleven items per section, keys in alphabetical order (0, 1, 10, 2, ...); item i has an NLL of i."""

    def column(values: list[Any]) -> Any:
        return values if as_lists else {key: values[int(key)] for key in sorted(str(i) for i in range(len(values)))}

    return {
        section: {
            "avg_gt_loss": column([float(i) for i in range(11)]),
            "avg_paraphrased_loss": column([i + 0.5 for i in range(11)]),
            "average_perturb_loss": column([[i + 1.0, i + 2.0] for i in range(11)]),
            "rougeL_recall": column([i / 10 for i in range(11)]),
        }
        for section in SECTIONS.values()
    }


def assert_same(left: Answers, right: Answers) -> None:
    fields = ("nll", "paraphrase_nll", "wrong_nll", "rouge_l", "generation_nll", "refused", "gradnorm", "gradnorm_mean")
    for field in (*fields, "recall_ll"):
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field))
    for field in ("question", "answer", "entities", "generation", "unit"):
        assert getattr(left, field) == getattr(right, field)
    for field in ("logp", "mean_logp", "var_logp"):
        assert (getattr(left, field) is None) == (getattr(right, field) is None)
        for mine, theirs in zip(getattr(left, field) or [], getattr(right, field) or [], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert [list(row) for row in left.right or []] == [list(row) for row in right.right or []]


# ---- Answers


def test_a_field_of_another_length_than_nll_is_an_error() -> None:
    with pytest.raises(ValueError, match="found 1 entries of rouge_l, expected 2"):
        Answers(nll=np.zeros(2), rouge_l=np.zeros(1))


def test_wrong_answers_must_be_a_matrix_with_a_column() -> None:
    for shape in ((2,), (2, 0)):
        with pytest.raises(ValueError, match=r"expected \[N, K\]"):
            Answers(nll=np.zeros(2), wrong_nll=np.zeros(shape))


def test_a_field_that_was_not_recorded_is_named_when_needed() -> None:
    with pytest.raises(ValueError, match="found answers without wrong_nll"):
        Answers(nll=np.zeros(2)).numbers("wrong_nll")


# ---- Records


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_records(tmp_path / "forget.jsonl", two_answers())
    assert_same(read_records(tmp_path / "forget.jsonl"), two_answers())


def test_a_field_that_is_none_is_not_written_and_is_read_as_none(tmp_path: Path) -> None:
    write_records(tmp_path / "forget.jsonl", Answers(nll=np.array([0.5])))
    assert (tmp_path / "forget.jsonl").read_text() == '{"nll": 0.5}\n'
    assert_same(read_records(tmp_path / "forget.jsonl"), Answers(nll=np.array([0.5])))


def test_a_record_has_one_line_per_example_and_a_fixed_order_of_keys(tmp_path: Path) -> None:
    write_records(tmp_path / "forget.jsonl", two_answers())
    lines = (tmp_path / "forget.jsonl").read_text().splitlines()
    order = ["question", "answer", "unit", "entities", "nll", "logp", "right"]
    order += ["paraphrase_nll", "wrong_nll", "rouge_l", "generation", "generation_nll", "refused"]
    order += ["mean_logp", "var_logp", "gradnorm", "gradnorm_mean", "recall_ll"]
    assert [list(json.loads(line)) for line in lines] == [order, order]
    assert [json.loads(line)["right"] for line in lines] == ["10", "1"]


def test_recorded_answers_come_back_from_a_file_to_the_last_bit_also_what_is_not_finite(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    sizes = 10.0 ** np.arange(-20, 6)  # of log-probabilities that nearly are 0, and of others
    logp = [-np.float32(draw.random(26) * sizes), np.float32([-math.inf, math.nan, 0.0])]
    found = as_recorded(replace(two_answers(), nll=np.array([math.inf, 1 / 3]), logp=logp, var_logp=logp))
    write_records(tmp_path / "forget.jsonl", found)
    assert_same(read_records(tmp_path / "forget.jsonl"), found)
    assert_same(as_recorded(found), found)


def test_numbers_per_token_are_recorded_with_eight_digits_and_others_with_all() -> None:
    logp = np.array([-12.345678912, -1.23456789e-5, -1 / 3, 0.0, -1e-14])
    found = as_recorded(replace(two_answers(), logp=[logp, logp[:1]]))
    assert found.needed("logp")[0].tolist() == [-12.345679, -1.2345679e-05, -0.33333333, 0.0, 0.0]
    assert found.nll[1] == 1 / 3 and found.needed("gradnorm")[1] == 2 / 3
    single = -np.float32(np.random.default_rng(0).exponential(3, 1000))
    np.testing.assert_allclose(rounded(single), single, rtol=5.1e-8, atol=0)


def test_numbers_that_are_not_finite_are_null_in_strict_json_and_nan_when_read(tmp_path: Path) -> None:
    answers = Answers(
        nll=np.array([math.nan, math.inf, 1.0]),
        logp=[np.array([-math.inf, -1.0])] * 3,
        wrong_nll=np.array([[math.nan, 2.0]] * 3),
    )
    write_records(tmp_path / "forget.jsonl", answers)
    text = (tmp_path / "forget.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    back = read_records(tmp_path / "forget.jsonl")
    np.testing.assert_array_equal(back.nll, [math.nan, math.nan, 1.0])
    np.testing.assert_array_equal(back.needed("logp")[0], [math.nan, -1.0])
    np.testing.assert_array_equal(back.numbers("wrong_nll")[0], [math.nan, 2.0])


def test_low_precision_arrays_and_plain_lists_can_be_written(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", Answers(nll=np.array([0.5], np.float32), logp=[[-1.5]], rouge_l=[1]))  # type: ignore
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"nll": 0.5, "logp": [-1.5], "rouge_l": 1.0}


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    answers = Answers(nll=np.zeros(2), question=["good", 7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="question: found 7, expected a text"):
        write_records(tmp_path / "forget.jsonl", answers)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "forget.jsonl"
    write_records(path, Answers(nll=np.array([0.5])))

    def disk_full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_records(path, two_answers())
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == '{"nll": 0.5}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: found an empty file, expected one JSON object per example"),
        ('{"nll": 1}\n{"nll": 2', "line 2: found '{\"nll\": 2', expected one JSON object"),
        ('{"nll": 1}\n\n{"nll": 1}\n', "line 2: found '', expected one JSON object"),
        ('{"nll": NaN}\n', "NaN is not strict JSON, null is"),
        ("[1]\n", "line 1: found [1], expected one JSON object"),
        ('{"rouge_l": 1}\n', "line 1: found the fields ['rouge_l'], expected nll and any of"),
        ('{"nll": 1, "nnl": 1}\n', "line 1: found the fields ['nll', 'nnl'], expected nll and any of"),
        ('{"nll": "1"}\n', "line 1, nll: found '1', expected a number or null"),
        ('{"nll": true}\n', "line 1, nll: found True, expected a number or null"),
        ('{"nll": 1, "logp": -1}\n', "line 1, logp: found -1, expected a list of numbers"),
        ('{"nll": 1, "logp": [[-1]]}\n', "line 1, logp: found [-1], expected a number or null"),
        ('{"nll": 1, "answer": null}\n', "line 1, answer: found None, expected a text"),
        ('{"nll": 1, "refused": 1}\n', "line 1, refused: found 1, expected true or false"),
        ('{"nll": 1, "entities": []}\n', "line 1, entities: found [], expected a list of texts"),
        ('{"nll": 1, "entities": "Oslo"}\n', "line 1, entities: found 'Oslo', expected a list of texts"),
        ('{"nll": 1, "wrong_nll": []}\n', "line 1, wrong_nll: found 0 numbers, expected at least one"),
        (
            '{"nll": 1, "rouge_l": 1}\n{"nll": 1}\n',
            "line 2: found the fields ['nll'], expected ['nll', 'rouge_l'] as in line 1",
        ),
        (
            '{"nll": 1, "wrong_nll": [1, 2]}\n{"nll": 1, "wrong_nll": [1]}\n',
            "line 2, wrong_nll: found 1 numbers, expected 2 as in the first example",
        ),
    ],
)
def test_the_error_on_a_malformed_record_has_file_line_found_and_expected(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "forget.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_records(path)
    found = str(error.value)
    assert found.startswith(f"{path}, line ") and message in found and "\n" not in found


def test_records_that_are_not_utf8_are_an_error_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "forget.jsonl"
    path.write_bytes(b'{"nll": 1}\n{"nll": 1, "answer": "\xff"}\n')
    with pytest.raises(ValueError, match=r"forget\.jsonl, line 2: found"):
        read_records(path)


# ---- The logs of TOFU's authors


@pytest.mark.parametrize("as_lists", [False, True], ids=["objects", "lists"])
def test_a_tofu_log_is_read_in_the_order_of_its_item_numbers(tmp_path: Path, as_lists: bool) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(tofu_log(as_lists)))
    log = read_tofu_log(path)
    assert list(log) == list(SECTIONS)
    for answers in log.values():
        np.testing.assert_array_equal(answers.nll, np.arange(11))
        np.testing.assert_array_equal(answers.numbers("paraphrase_nll"), np.arange(11) + 0.5)
        np.testing.assert_array_equal(answers.numbers("wrong_nll")[10], [11.0, 12.0])
        np.testing.assert_array_equal(answers.numbers("rouge_l"), np.arange(11) / 10)


def _without_section(log: dict[str, Any]) -> Any:
    del log["eval_log_forget.json"]
    return log


def _without_key(log: dict[str, Any]) -> Any:
    del log["eval_log.json"]["rougeL_recall"]
    return log


def _with_text(log: dict[str, Any]) -> Any:
    log["eval_log.json"]["avg_gt_loss"]["3"] = "high"
    return log


def _with_short_row(log: dict[str, Any]) -> Any:
    log["eval_log.json"]["average_perturb_loss"]["4"] = [1.0]
    return log


def _with_missing_item(log: dict[str, Any]) -> Any:
    del log["eval_log.json"]["rougeL_recall"]["10"]
    return log


def _with_named_item(log: dict[str, Any]) -> Any:
    log["eval_log.json"]["avg_gt_loss"]["mean"] = 1.0
    return log


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_section, "expected a TOFU evaluation log with an object eval_log_forget.json"),
        (_without_key, "eval_log.json, rougeL_recall: found None, expected a list, or an object keyed by item number"),
        (_with_text, "eval_log.json, avg_gt_loss, item 3: found 'high', expected a number or null"),
        (_with_short_row, "average_perturb_loss, item 4: found 1 numbers, expected 2 as in the first example"),
        (_with_missing_item, "eval_log.json: Answers: found 10 entries of rouge_l, expected 11, one per nll"),
        (_with_named_item, "eval_log.json, avg_gt_loss: found the keys"),
        (lambda log: [1, 2], "found [1, 2], expected a TOFU evaluation log"),
    ],
)
def test_the_error_on_a_malformed_tofu_log_has_file_key_found_and_expected(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(spoil(tofu_log())))
    with pytest.raises(ValueError) as error:
        read_tofu_log(path)
    found = str(error.value)
    assert found.startswith(str(path)) and message in found and "\n" not in found


def test_the_error_on_a_tofu_log_that_is_not_json_has_the_line(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text('{\n"eval_log.json": }\n')
    with pytest.raises(ValueError, match=r"log\.json, line 2: found no JSON .* expected an evaluation log"):
        read_tofu_log(path)


def test_the_authors_logs_hold_300_100_and_117_items(real_data: Callable[[str], Path]) -> None:
    log = read_tofu_log(real_data("tofu_logs/llama2-7b_full.json"))
    assert {probe: answers.numbers("wrong_nll").shape for probe, answers in log.items()} == {
        "retain": (300, 5),
        "forget": (300, 5),
        "authors": (100, 3),
        "facts": (117, 3),
    }


# ---- The evaluation files of OpenUnlearning


def open_unlearning_file(num_items: int = 11) -> dict[str, Any]:
    """In the file's own layout: metric -> its value, and statistics by item, of which some have one per answer."""

    def by_item(one: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        return {"agg_value": 0.5, "value_by_index": {str(i): one(i) for i in reversed(range(num_items))}}

    found: dict[str, Any] = {"forget_quality": {"agg_value": 0.1}}
    for name in ("forget", "ra"):
        found[f"{name}_Q_A_Prob"] = by_item(lambda i: {"prob": 0.1, "avg_loss": float(i)})
        found[f"{name}_Q_A_PERT_Prob"] = by_item(lambda i: {"prob": [0.1] * 2, "avg_loss": [i + 1.0, i + 2.0]})
    found["forget_Q_A_PARA_Prob"] = by_item(lambda i: {"prob": 0.1, "avg_loss": i + 0.5})
    found["forget_Q_A_ROUGE"] = by_item(
        lambda i: {"rougeL_recall": i / 10, "input": f"Q{i}", "ground_truth": f"A{i}", "generation": f"G{i}"}
    )
    return found


def test_a_file_of_open_unlearning_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps(open_unlearning_file()))
    found = read_retrained(path)
    assert list(found) == ["forget", "authors"]
    forget, authors = found["forget"], found["authors"]
    np.testing.assert_array_equal(forget.nll, np.arange(11))
    np.testing.assert_array_equal(forget.numbers("paraphrase_nll"), np.arange(11) + 0.5)
    np.testing.assert_array_equal(authors.numbers("wrong_nll")[10], [11.0, 12.0])
    np.testing.assert_array_equal(forget.numbers("rouge_l"), np.arange(11) / 10)
    assert (forget.needed("question")[10], forget.needed("answer")[10], forget.needed("generation")[10]) == (
        "Q10", "A10", "G10",
    )  # fmt: skip
    assert authors.rouge_l is authors.paraphrase_nll is authors.logp is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda log: {"other": 1}, "found the keys ['other'], expected an evaluation file with forget_Q_A_Prob"),
        (lambda log: [1], "found [1], expected an evaluation file with forget_Q_A_Prob"),
        (lambda log: log | {"ra_Q_A_Prob": 1}, "ra_Q_A_Prob, value_by_index: found None, expected a list"),
        (lambda log: log | {"ra_Q_A_Prob": log["forget_Q_A_ROUGE"]}, "ra_Q_A_Prob, item 0: found {"),
        (
            lambda log: log | {"ra_Q_A_Prob": open_unlearning_file(10)["ra_Q_A_Prob"]},
            "ra: Answers: found 11 entries of wrong_nll, expected 10",
        ),
    ],
)
def test_the_error_on_a_malformed_file_of_open_unlearning_has_file_metric_found_and_expected(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps(spoil(open_unlearning_file())))
    with pytest.raises(ValueError) as error:
        read_open_unlearning(path)
    assert str(error.value).startswith(f"{path}") and message in str(error.value) and "\n" not in str(error.value)


# ---- The retrained model's answers


def test_the_retrained_model_is_read_from_a_folder_of_records_by_probe(tmp_path: Path) -> None:
    write_records(tmp_path / "forget.jsonl", two_answers())
    write_records(tmp_path / "holdout.jsonl", Answers(nll=np.array([0.5])))
    (tmp_path / "results.json").write_text("{}")
    retrained = read_retrained(tmp_path)
    assert sorted(retrained) == ["forget", "holdout"]
    assert_same(retrained["forget"], two_answers())


def test_the_retrained_model_is_read_from_a_tofu_log(tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(json.dumps(tofu_log()))
    assert sorted(read_retrained(tmp_path / "log.json")) == sorted(SECTIONS)


def test_a_folder_without_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no \*\.jsonl in the folder, expected records"):
        read_retrained(tmp_path)


def test_a_path_with_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found nothing, expected a folder of records"):
        read_retrained(tmp_path / "nowhere")
