"""Accuracy, as the tables of SOUL have it: the nearest answer by sentence embeddings, and the answer in the text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from soul_exp.checks.availability import missing_field
from soul_exp.errors import UsageError
from soul_exp.metrics import tofu
from soul_exp.metrics.answers import Answers, NotRecordedError
from soul_exp.metrics.dialects import in_dialect
from soul_exp.report import labels
from soul_exp.tasks import embeddings
from soul_exp.tasks.embeddings import Ngrams, SentenceModel, make_embedding, with_similarity
from soul_exp.tasks.task import rephrased_probes
from soul_exp.tasks.tofu import tofu as tofu_task


def of_cosines(*rows: list[float]) -> Answers:
    return Answers(nll=np.zeros(len(rows)), similarity=np.array(rows))


def test_the_paraphrased_answer_must_be_the_nearest_a_tie_is_right_and_what_has_nothing_in_common_wrong() -> None:
    nearest, second, tied = [0.9, 0.5, 0.1], [0.5, 0.9, 0.1], [0.5, 0.5, 0.1]
    assert tofu.accuracy(of_cosines(nearest, second)) == 0.5
    assert tofu.accuracy(of_cosines(nearest, second, tied)) == pytest.approx(2 / 3)
    assert tofu.accuracy(of_cosines([-0.1, -0.2])) == 1.0  # a sentence model may find all unlike
    assert tofu.accuracy(of_cosines([0.0, 0.0])) == 0.0  # as ",,,," has by n-grams
    assert math.isnan(tofu.accuracy(of_cosines(nearest, [math.nan, 0.5, 0.1])))
    with pytest.raises(NotRecordedError, match="answers without similarity"):
        tofu.accuracy(Answers(nll=np.zeros(1)))


def test_containment_asks_for_the_true_answer_in_any_case_and_nowhere_else_than_in_the_text() -> None:
    answers = ["Paris", "Jane Austen", "straße", "Rome"]
    texts = ["It is PARIS.", "Jane, or Austen", "in der STRASSE", "Romeo"]
    found = Answers(nll=np.zeros(4), answer=answers, generation=texts)
    assert tofu.containment(found) == 0.75  # Romeo contains Rome: the release's rule


def test_probability_of_the_paraphrased_question_is_that_of_the_same_answer() -> None:
    given = Answers(nll=np.zeros(2), rephrased_nll=np.array([0.0, math.log(4)]))
    assert tofu.paraphrased_question_probability(given) == pytest.approx((1 + 1 / 4) / 2)


# ---- the dialect of the SOUL release


def test_the_releases_truth_ratio_is_of_answers_without_end_to_the_paraphrased_question_and_adds_1e12() -> None:
    """By hand: R = mean(0.2, 0.4) / 0.5 = 0.6, and 0.3 / (0 + 1e-12) where the correct answer has no probability."""
    bare = {"bare_nll": -np.log([0.5, 1e-300]), "bare_wrong_nll": -np.log([[0.2, 0.4], [0.3, 0.3]])}
    other = {"nll": np.ones(2), "paraphrase_nll": np.full(2, 7.0), "wrong_nll": np.full((2, 2), 9.0)}
    metric = in_dialect(tofu.truth_ratio, "soul_release")
    assert metric(Answers(**bare, **other)) == pytest.approx((0.6 + 0.3e12) / 2, rel=1e-9)
    one = Answers(**bare, **other).take(np.array([0]))
    assert metric(one) == pytest.approx(0.6) and tofu.truth_ratio(one) == pytest.approx(1 - math.exp(-2))
    with pytest.raises(NotRecordedError, match="answers without bare_wrong_nll"):
        metric(Answers(**other))


def test_below_1_the_releases_truth_ratio_prefers_the_truth_so_that_lower_is_better_on_what_is_kept() -> None:
    metrics = {
        f"{probe}_truth_ratio": {"_target_": "soul_exp.metrics.tofu.truth_ratio", "answers": probe}
        for probe in ("forget", "retain")
    }
    found = {
        dialect: [labels.declared(metrics, name, dialect)[1] for name in metrics]
        for dialect in ("ours", "soul_release", "of a later version")
    }
    assert found["ours"] == found["of a later version"] == ["nearest", "higher"]
    assert found["soul_release"] == ["nearest", "lower"]


# ---- probes


def test_questions_are_asked_in_other_words_with_the_same_answers_but_for_validation() -> None:
    task = tofu_task()
    asked = rephrased_probes(task.probes)
    assert asked.keys() == {"forget", "retain"}
    probe, again = task.probes["forget"], asked["forget"]
    assert probe.paraphrased_questions and again.paraphrases and again.wrong and again.generate
    assert [item.prompt for item in again.items] == [item.prompt for item in probe.paraphrased_questions]
    assert [item.answer for item in again.items] == [item.answer for item in probe.items]
    assert again.choices == probe.choices and len(probe.choices[0]) == 6
    for item, paraphrase, wrong in zip(again.items, again.paraphrases, again.wrong, strict=True):
        assert {paraphrase.prompt, *(each.prompt for each in wrong)} == {item.prompt}


# ---- n-grams


def test_ngrams_are_counted_in_words_of_any_case_and_nearness_is_their_cosine() -> None:
    """By hand: " ab " has the 2-grams " a", "ab", "b ", the 3-grams " ab", "ab " and itself; " ac " shares " a"."""
    (found,) = Ngrams().load("cpu")(["Ab"], [["ab!", "ac", "xy", "", ",,,"]])
    assert found.tolist() == [1.0, pytest.approx(1 / 6), 0.0, 0.0, 0.0]
    assert np.array_equal(Ngrams().load("cpu")(["", ",,, ,,"], [["a", "b"]] * 2), np.zeros((2, 2)))


def test_a_text_that_names_the_right_value_in_other_words_is_nearest_and_repeated_commas_are_wrong() -> None:
    choices = [["Love led towards Taniso Famotu one spring.", "Love led towards Hisufen Tilenun one spring."]] * 3
    texts = ["The novelist is married to Taniso Famotu.", "The novelist is married to Hisufen Tilenun.", ",,,,,,"]
    given = Answers(nll=np.zeros(3), rephrased_generation=texts)
    found = with_similarity({"forget": given, "other": given}, {"forget": choices}, Ngrams(), "cpu")
    assert [tofu.accuracy(found["forget"].take(np.array([i]))) for i in range(3)] == [1.0, 0.0, 0.0]
    assert found["forget"].embedding == ["character n-grams of 2, 3, 4, version 1"] * 3
    assert found["other"] is given


# ---- a sentence-transformers model

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a cat dog sat lay on mat . ,".split()
TEXTS = ["the cat sat on a mat.", "a dog lay", "The CAT, the dog.", "dog " * 40, ""]


def sentence_model(folder: Path, pooling: dict[str, Any], lower: bool = False, **settings: Any) -> Path:
    """A tiny random BERT in the layout of sentence-transformers, as it was written from its first release on."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=1.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = {"do_lower_case": not lower, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    types = {"": "models.Transformer", "1_Pooling": "models.Pooling", "2_Normalize": "models.Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(types.items())
    ]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in {
        "tokenizer_config.json": tokenizer,
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": 16, **pooling},
        "sentence_bert_config.json": {"max_seq_length": 12, "do_lower_case": lower, **settings},
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder


MEAN, CLS = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, {"pooling_mode": "cls"}


@pytest.mark.parametrize(("pooling", "lower"), [(MEAN, False), (CLS, False), ({"pooling_mode": ["mean"]}, True)])
def test_cosines_are_those_of_one_text_at_a_time_cut_at_max_seq_length(
    pooling: dict[str, Any], lower: bool, tmp_path: Path
) -> None:
    folder = sentence_model(tmp_path / "bert", pooling, lower)
    model = BertModel.from_pretrained(folder).eval()

    def vector(text: str) -> np.ndarray:
        words = text.lower().replace(".", " .").replace(",", " ,").split()[:10]
        ids = torch.tensor([[WORDS.index(word) for word in ["[CLS]", *words, "[SEP]"]]])
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0]
        found: np.ndarray = (hidden[0] if pooling is CLS else hidden.mean(0)).double().numpy()
        return found / np.linalg.norm(found)

    found = replace(make_embedding(str(folder), None), batch_size=2).load("cpu")(TEXTS, [TEXTS] * len(TEXTS))
    expected = np.array([vector(text) for text in TEXTS])
    assert found == pytest.approx(expected @ expected.T, abs=1e-6) and len(set(found[0].round(4))) == 5


def test_cosines_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    for name, pooling in (("mean", MEAN), ("cls", CLS)):
        folder = sentence_model(tmp_path / name, pooling)
        vectors = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS).astype(np.float64)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        found = SentenceModel(str(folder)).load("cpu")(TEXTS, [TEXTS] * len(TEXTS))
        assert found == pytest.approx(vectors @ vectors.T, abs=1e-6)


def test_what_sentence_transformers_would_compute_otherwise_is_an_error_when_the_task_is_built(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "bert", MEAN)

    def refused(message: str, advice: str = "or type task.embedding=ngrams") -> None:
        with pytest.raises(UsageError, match=f"task.embedding=.*{message}.*{advice}"):
            tofu_task(embedding=str(folder))

    def changed(name: str, **content: Any) -> Callable[[], object]:
        before = (folder / name).read_text() if (folder / name).exists() else None
        old = json.loads(before) if before else {}
        (folder / name).write_text(json.dumps(content.get("all") or {**old, **content}))
        return lambda: (folder / name).write_text(before) if before else (folder / name).unlink()

    modules = json.loads((folder / "modules.json").read_text())
    dense = [*modules, {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}]
    for undo, message in (
        (lambda: changed("modules.json", all=dense), "the modules Transformer, Pooling, Normalize, Dense, expected"),
        (lambda: changed("modules.json", all=modules[:1]), "the modules Transformer, expected"),
        (lambda: changed("modules.json", all={"a": 1}), "is no sentence-transformers model"),
        (
            lambda: changed("1_Pooling/config.json", pooling_mode_max_tokens=True),
            "the pooling mean_tokens, max_tokens,",
        ),
        (lambda: changed("1_Pooling/config.json", pooling_mode="lasttoken"), "the pooling lasttoken, expected"),
        (lambda: changed("sentence_bert_config.json", transformer_task="fill-mask"), "the task fill-mask, expected"),
        (
            lambda: changed("config_sentence_transformers.json", default_prompt_name="query"),
            "a prompt before each text",
        ),
    ):
        restore = undo()
        refused(message)
        restore()
    assert tofu_task(embedding=str(folder)).caption.endswith("; accuracy on forget and retain by bert")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "embeddings.position_ids": torch.arange(32)[None]}, folder / "model.safetensors")
    tofu_task(embedding=str(folder))  # a constant that older releases saved
    save_file({name: weights[name] for name in weights if "pooler" not in name}, folder / "model.safetensors")
    refused("2 missing", "give a checkpoint")
    (folder / "modules.json").unlink()
    refused("is no sentence-transformers model .*No such file")
    with pytest.raises(UsageError, match=r"task.embedding=minilm is unknown: choose ngrams, sentence-transformers/"):
        tofu_task(embedding="minilm")


def test_a_copy_is_the_same_embedding_and_another_pooling_another(tmp_path: Path) -> None:
    ids = [SentenceModel(str(sentence_model(tmp_path / where / "bert", MEAN))).identity() for where in "ab"]
    other = SentenceModel(str(sentence_model(tmp_path / "c" / "bert", CLS))).identity()
    assert ids[0] == ids[1] != other and ids[0].startswith("bert, sha256 ")


def test_a_hub_name_is_read_from_the_local_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / f"models--{embeddings.MINILM.replace('/', '--')}"
    local = sentence_model(place / "snapshots" / "abc", MEAN)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = make_embedding(embeddings.MINILM, None)
    assert isinstance(found, SentenceModel) and found.folder == local
    assert found.title == embeddings.MINILM and found.identity().startswith(f"{embeddings.MINILM}, sha256 ")
    assert np.array_equal(*(each.load("cpu")(["a cat"], [TEXTS]) for each in (found, SentenceModel(str(local)))))
    with pytest.raises(UsageError, match=r"task.embedding: nobody/nothing is neither .* or type task.embedding=ngrams"):
        make_embedding("nobody/nothing", None)


def test_the_hubs_data_are_measured_with_the_releases_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    table = [row for _, row in zip(range(40), tofu_rows(), strict=False)]
    monkeypatch.setattr("soul_exp.tasks.tofu.hub_rows", lambda *_, **__: table)
    monkeypatch.setattr("soul_exp.tasks.tofu.make_embedding", lambda *given: asked.append(given) or Ngrams())
    tofu_task("hub", num_holdout_authors=0)
    tofu_task("hub", num_holdout_authors=0, embedding="ngrams", embedding_revision="abc")
    tofu_task()
    assert asked == [(embeddings.MINILM, None), ("ngrams", "abc"), ("ngrams", None)]


def tofu_rows(**others: Any) -> list[dict[str, Any]]:
    """Two authors whose rows are all of real TOFU's tables at once."""
    return [
        {"question": f"q{i}", "answer": f"a{i}", "paraphrased_question": f"p{i}", "paraphrased_answer": f"b{i}"}
        | {"perturbed_answer": [f"c{i}", f"d{i}"]}
        for i in range(40)
    ]


def test_real_tofu_without_paraphrased_questions_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{key: value for key, value in row.items() if key != "paraphrased_question"} for row in tofu_rows()]
    monkeypatch.setattr("soul_exp.tasks.tofu.hub_rows", lambda *_, **__: rows)
    task = tofu_task("hub", num_holdout_authors=0, embedding="ngrams")
    assert not rephrased_probes(task.probes) and "accuracy" not in task.caption
    for metric in (tofu.accuracy, tofu.paraphrased_question_probability, tofu.soul_release_truth_ratio):
        probe, field = missing_field(partial(metric, answers="forget"), task.probes, has_embedding=True) or ("", "")
        assert f"{probe}.{field}" in task.missing
        assert missing_field(partial(metric, answers="forget"), tofu_task().probes, has_embedding=True) is None
    assert missing_field(partial(tofu.soul_release_truth_ratio, answers="facts"), task.probes) is None
    why = "forget10_perturbed of task.source=hub has no column paraphrased_question"
    assert task.missing["forget.similarity"] == task.missing["forget.bare_wrong_nll"] == why
