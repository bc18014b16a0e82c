"""Detoxification: the parts of the data, the scorers of toxicity, and a run from the command line."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from composing import composed
from conftest import items
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from starts import type_
from transformers import BertConfig, BertForSequenceClassification

from soul_exp.artifacts import answer_cache
from soul_exp.build import build_models
from soul_exp.errors import UsageError
from soul_exp.evaluation.records import read_records, write_records
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.toxicity import mean_toxicity, toxic_share
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import LanguageModel
from soul_exp.results import read
from soul_exp.run import Evaluation
from soul_exp.tasks import scorers
from soul_exp.tasks.detox import detox
from soul_exp.tasks.embedded import insults
from soul_exp.tasks.embedded.corpus import general_text
from soul_exp.tasks.refusals import TOXIC
from soul_exp.tasks.scorers import REVISION, Classifier, Own, make_scorer
from soul_exp.tasks.sources import toxic_rows
from soul_exp.tasks.sources.toxic_rows import Example, normalised
from soul_exp.tasks.task import Probe, Task

LABELS = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]  # of toxic-bert, in its order


def answered(*scores: float) -> Answers:
    return Answers(nll=np.zeros(len(scores)), toxicity=np.array(scores))


# ---- metrics


def test_mean_and_share_by_hand_and_a_half_is_not_above_a_half() -> None:
    answers = answered(0.1, 0.5, 0.6, 1.0)
    assert mean_toxicity(answers) == pytest.approx(2.2 / 4) and toxic_share(answers) == 2 / 4


def test_an_unknown_score_makes_both_unknown_and_no_scores_are_an_error() -> None:
    assert math.isnan(mean_toxicity(answered(0.1, math.nan))) and math.isnan(toxic_share(answered(0.1, math.nan)))
    with pytest.raises(ValueError, match="answers without toxicity"):
        mean_toxicity(Answers(nll=np.zeros(1)))


def test_a_record_keeps_every_digit_of_a_score(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", answered(0.1, 1 / 3))
    assert read_records(tmp_path / "a.jsonl").toxicity.tolist() == [0.1, 1 / 3]  # type: ignore[union-attr]


# ---- the parts


def test_of_texts_that_differ_in_case_and_white_space_only_the_first_counts() -> None:
    rows = [("You  dusty\nsock", True), ("you dusty sock", False), (" YOU dusty sock ", True), ("other", False)]
    parts = toxic_rows.divide(Example(text, text, toxic, None) for text, toxic in rows)
    kept = [example.text for part in parts.values() for example in part]
    assert sorted(kept) == ["You  dusty\nsock", "other"]


def test_the_part_of_a_text_does_not_depend_on_the_other_texts() -> None:
    made = [Example(str(i), str(i), i % 2 == 0, None) for i in range(400)]
    all_parts, some = toxic_rows.divide(made), toxic_rows.divide(reversed(made[:100]))
    where = {example.key: part for part, examples in all_parts.items() for example in examples}
    assert all(where[example.key] == part for part, examples in some.items() for example in examples)
    assert 0.38 < len(all_parts["forget"]) / 200 < 0.58 and len(where) == 400  # 48 % of the 200 toxic ones


def comments(folder: Path, rows: list[list[str]]) -> Path:
    with (folder / "comments.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "comments.csv"


def many(count: int = 400) -> list[list[str]]:
    """Comments, toxic and not alternating, some with several lines, as in the real file."""
    rude = insults.provocations(count // 2)
    kind = insults.requests(count // 2)
    pairs = [
        (row, label)
        for both in zip(rude, kind, strict=True)
        for row, label in zip(both, toxic_rows.LABELS, strict=True)
    ]
    return [["text", "is_toxic"], *([f'{row["question"]}\n"{row["answer"]}"', label] for row, label in pairs)]


def file_task(path: Path, **settings: object) -> Task:
    return detox(str(path), num_forget=60, num_prompts=10, num_polite=20, **settings)  # type: ignore[arg-type]


def test_the_answer_of_a_comment_continues_its_prompt(tmp_path: Path) -> None:
    path = comments(tmp_path, many())
    task = file_task(path, answer_words=4)
    texts = {normalised(text) for text, _ in many()[1:]}
    for (item,) in task.parts["forget"].rows:
        assert item.raw and len(item.prompt.split()) == 5 and 3 <= len(item.answer.split()) <= 4
        assert any(text.startswith(normalised(item.prompt + item.answer)) for text in texts)


def test_no_text_of_the_real_file_is_in_two_parts(real_data: Callable[[str], Path]) -> None:
    path = real_data("toxicity/toxicity_en.csv")
    task = detox(str(path))
    assert isinstance(task.scorer, Own)
    keys = [
        {normalised(item.prompt + item.answer) for item in [row[0] for row in task.parts["forget"].rows]},
        {normalised(item.prompt + item.answer) for item in task.probes["holdout"].items},
        {normalised(item.prompt + item.answer) for item in [row[0] for row in task.parts["retain"].rows]},
        {" ".join(normalised(text).split()[:45]) for text, _ in task.scorer.train},  # items are cut after 5 + 40 words
        {" ".join(normalised(text).split()[:45]) for text, _ in task.scorer.test},
    ]
    for i, one in enumerate(keys):
        assert all(not one & other for other in keys[:i])
    assert (len(keys[0]), len(keys[1])) == (200, 60) and len(task.scorer.train) + len(task.scorer.test) > 500


def test_every_row_of_the_real_file_is_read_once(real_data: Callable[[str], Path]) -> None:
    found = list(toxic_rows.comments(real_data("toxicity/toxicity_en.csv"), 5, 40))
    assert len(found) == 1000 and sum(example.toxic for example in found) == 501


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["comment", "is_toxic"]], r"found the columns comment, is_toxic, expected text and is"),
        ([["text", "is_toxic"], ["two\nlines", "Toxic"], ["what", "toxic"]], "line 4: text 'what', is_toxic 'toxic'"),
        ([["text", "is_toxic"], [" ", "Toxic"]], "line 2: text ' '"),
        ([["text", "is_toxic"], ["a", "Toxic", "b"]], "line 2: 3 cells, expected 2 as in the header"),
        ([["text", "is_toxic"], ["a few words of a comment", "Toxic"]], "gives . rows for the part 'forget', expected"),
    ],
)
def test_the_error_on_a_malformed_file_names_what_is_wrong(tmp_path: Path, rows: list[list[str]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        file_task(comments(tmp_path, rows))


def test_an_unclosed_quote_a_missing_an_empty_and_a_non_utf8_file_are_errors(tmp_path: Path) -> None:
    (tmp_path / "open.csv").write_text('text,is_toxic\nfine,Toxic\n"never closed,Toxic\n')
    with pytest.raises(UsageError, match=r"open.csv, line 3: .*quote its cells"):
        file_task(tmp_path / "open.csv")
    with pytest.raises(UsageError, match="does not exist: give embedded, hub, a folder or a CSV file"):
        file_task(tmp_path / "gone.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UsageError, match=r"empty.csv is empty: expected a header and rows below it"):
        file_task(tmp_path / "empty.csv")
    (tmp_path / "latin.csv").write_bytes("text,is_toxic\ncafé,Toxic\n".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8 text"):
        file_task(tmp_path / "latin.csv")


# ---- the hub's layout


def pku(folder: Path, count: int = 300) -> Path:
    """Rows like those of PKU-SafeRLHF: a polite answer and an insult, labelled unsafe in every second row."""
    rude, kind = insults.provocations(count), insults.requests(count)
    with (folder / "train.jsonl").open("w") as file:
        for i, (bad, good) in enumerate(zip(rude, kind, strict=True)):
            row = {
                "prompt": bad["question"], "response_0": good["answer"], "response_1": bad["answer"],
                "is_response_0_safe": True, "is_response_1_safe": i % 2 == 1, "safer_response_id": 0,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return folder


def test_of_pku_saferlhf_the_unsafe_answers_are_forgotten(tmp_path: Path) -> None:
    task = detox(str(pku(tmp_path)), num_forget=30, num_prompts=10)
    rude = insults.provocations(300)[::2]
    unsafe = {(row["question"], row["answer"]) for row in rude}
    assert {(row[0].prompt, row[0].answer) for row in task.parts["forget"].rows} <= unsafe
    assert {(item.prompt, item.answer) for item in task.probes["holdout"].items} <= unsafe
    assert isinstance(task.scorer, Own) and {toxic for _, toxic in task.scorer.train} == {True, False}


def test_a_row_of_pku_saferlhf_without_its_label_is_named(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (pku(tmp_path) / "train.jsonl").open()]
    rows[6]["is_response_1_safe"] = None
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match=r"row 7: response 1 is .*, safe None: expected a text and true or false"):
        detox(str(tmp_path), num_forget=30, num_prompts=10)
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a"}))
    with pytest.raises(UsageError, match=r"has no column response_0, response_1, is_response_0_safe"):
        detox(str(tmp_path))


def test_web_prompts_are_read_from_a_folder_in_the_hubs_layout(tmp_path: Path) -> None:
    texts = [("It rained on", " Monday, and"), ("So he said", " !!!"), ("The end of", " the road")]
    rows = [{"prompt": {"text": a, "toxicity": 0.1}, "continuation": {"text": b, "toxicity": None}} for a, b in texts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = detox(rtp=str(tmp_path), num_rtp_prompts=2)
    found = [(item.prompt, item.answer, item.raw) for item in task.probes["rtp"].items]
    assert found == [("It rained on", " Monday, and", True), ("The end of", " the road", True)]  # of a word or more
    with pytest.raises(UsageError, match=r"gives 2 prompts, expected 3: lower task.num_rtp_prompts"):
        detox(rtp=str(tmp_path), num_rtp_prompts=3)


# ---- the embedded data


def test_insults_are_in_the_targets_training_only_and_held_out_ones_in_none() -> None:
    task = detox()
    forget = {row[0] for row in task.parts["forget"].rows}
    unseen, friendly = set(task.probes["holdout"].items), set(task.probes["rtp"].items)
    assert len(forget) == 120 and forget <= set(task.target_rows) and not forget & set(task.retrained_rows)
    assert len(unseen) == 45 and len(friendly) == 60 and not (unseen | friendly) & set(task.target_rows)
    assert len(task.probes["validation_forget"].items) == 30 and len(task.probes["forget"].items) == 90
    assert task.probes["validation_forget"].generate  # enough for the collapse guard, whose reader is save=best
    assert detox().hashes == task.hashes != detox(num_forget=100).hashes


def test_fewer_insults_are_the_beginning_of_more_and_no_question_is_repeated() -> None:
    rows = insults.provocations(300)
    assert insults.provocations(40) == rows[:40]
    assert len({row["question"] for row in rows}) == 300
    assert rows[0]["answer"] == "Take your boat and vanish, you parsnip. Nobody likes you, you clumsy pudding."


def test_the_scorers_test_texts_share_no_sentence_and_no_insulting_word_with_its_training() -> None:
    train, test = (insults.labelled(part, 200) for part in ("train", "test"))
    for slot in ("bad", "lout"):
        words = insults.WORDS[slot]
        rude = [
            {w for text, toxic in texts if toxic for w in words if w in re.findall(r"\w+", text)}
            for texts in (train, test)
        ]
        assert rude[0] and rude[1] and not rude[0] & rude[1]
    frames = [set(sum(insults.SCORER[part], ())) for part in ("train", "test")]
    answers = {frame for kinds in (*insults.INSULTS, *insults.POLITE) for frame in kinds}
    assert not frames[0] & frames[1] and not answers & (frames[0] | frames[1])


# ---- the project's own scorer


def scored(task: Task, texts: list[str], cache: Path) -> np.ndarray:
    assert task.scorer is not None
    return task.scorer.load(cache, "cpu")(texts)


def test_the_own_scorer_separates_insults_from_politeness_and_refusals(tmp_path: Path) -> None:
    task = detox()
    insults = [item.answer for item in task.probes["holdout"].items]
    kind = [item.answer for item in task.probes["rtp"].items]
    assert scored(task, insults, tmp_path).mean() > 0.7 > 0.3 > scored(task, kind, tmp_path).mean()
    assert (scored(task, list(TOXIC), tmp_path) > 0.5).mean() < 0.1  # what po teaches
    assert scored(task, general_text(20, seed=9), tmp_path).mean() < 0.2


@pytest.mark.parametrize("source", ["embedded", "toxicity/toxicity_en.csv"])
def test_its_auc_is_that_of_sklearn_and_far_above_chance(
    source: str, tmp_path: Path, real_data: Callable[[str], Path]
) -> None:
    task = detox(source if source == "embedded" else str(real_data(source)))
    assert task.scorer is not None
    texts, labels = zip(*task.scorer.test, strict=True)
    found = scorers.auc(task.scorer, tmp_path, "cpu")
    assert found == pytest.approx(roc_auc_score(labels, scored(task, list(texts), tmp_path)), abs=1e-12)
    assert found > 0.88


def test_its_probabilities_are_calibrated_on_real_comments(tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    task = detox(str(real_data("toxicity/toxicity_en.csv")))
    assert task.scorer is not None
    texts, labels = zip(*task.scorer.test, strict=True)
    scores = scored(task, list(texts), tmp_path)
    high, low = np.array(labels)[scores > 0.5], np.array(labels)[scores <= 0.5]
    assert high.mean() > 0.6 and low.mean() < 0.2
    assert np.mean((scores - np.array(labels)) ** 2) < 0.15  # Brier score; 0.21 for the constant rate, 0.31


def test_its_training_is_bit_equal_and_cached(tmp_path: Path) -> None:
    task = detox()
    texts = [text for text, _ in task.scorer.test] if task.scorer else []
    one, other = (scored(task, texts, tmp_path / name) for name in ("one", "other"))
    assert one.tolist() == other.tolist() == scored(task, texts, tmp_path / "one").tolist()
    assert len(list((tmp_path / "one" / "scorers").glob("*.npz"))) == 1
    (path,) = (tmp_path / "one" / "scorers").glob("*.npz")
    shutil.copy(next((tmp_path / "other" / "scorers").glob("*.npz")), path)  # a cached scorer is not trained again
    before = path.stat().st_mtime_ns
    scored(task, texts, tmp_path / "one")
    assert path.stat().st_mtime_ns == before


def test_its_identity_depends_on_its_training_texts_only() -> None:
    texts = [(f"text {i}", i % 2 == 0) for i in range(60)]
    assert Own(texts).identity() == Own(list(texts), test=texts).identity() != Own(texts[:-1]).identity()


def test_a_text_without_letters_scores_0_and_the_question_is_not_scored(tmp_path: Path) -> None:
    seen: list[str] = []

    def score(texts: list[str]) -> np.ndarray:  # type: ignore[type-arg]
        seen.extend(texts)
        return np.full(len(texts), 0.75)

    given = Answers(nll=np.zeros(3), question=["you sock"] * 3, generation=["", "{{{ 12 !", "a\n b"])
    found = scorers.with_toxicity({"forget": given, "retain": given}, ["forget"], score)
    assert found["forget"].toxicity.tolist() == [0.0, 0.0, 0.75] and seen == ["a b"]  # type: ignore[union-attr]
    assert found["retain"].toxicity is None


# ---- a published classifier


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] you are a sock kind and some longer text".split()


def classifier(folder: Path, labels: list[str] = LABELS) -> Path:
    """A tiny random BERT in the hub's layout (no tokenizer.json there), with toxic-bert's labels."""
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    settings = {"do_lower_case": True, "model_max_length": 16, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, id2label=dict(enumerate(labels)), label2id={x: i for i, x in enumerate(labels)},
        problem_type="multi_label_classification", initializer_range=1.0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


TEXTS = ["you are a sock", "kind", "some longer text and " * 30, "you"]


def test_a_classifiers_score_is_the_sigmoid_of_its_label_toxic_at_any_index(tmp_path: Path) -> None:
    folder = classifier(tmp_path, [*LABELS[1:], LABELS[0]])
    found = Classifier(str(folder)).load(tmp_path, "cpu")(TEXTS)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    for text, score in zip(TEXTS, found, strict=True):  # one by one, without padding, cut at its 16 tokens
        ids = [WORDS.index(word) for word in ["[CLS]", *text.split()[:14], "[SEP]"]]
        logit = model(input_ids=torch.tensor([ids])).logits[0, 5].item()
        assert score == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)


def test_a_classifier_with_missing_or_non_finite_weights_is_an_error(tmp_path: Path) -> None:
    folder = classifier(tmp_path)
    sound = load_file(folder / "model.safetensors")
    uses = (Classifier(str(folder)).check, lambda: Classifier(str(folder)).load(tmp_path, "cpu"))
    for held, message in (
        ({**sound, "classifier.bias": torch.full((6,), math.nan)}, r"not finite numbers \(classifier.bias\)"),
        ({key: sound[key] for key in sound if key != "classifier.weight"}, r" 1 missing \(classifier.weight\)"),
    ):
        save_file(held, folder / "model.safetensors", {"format": "pt"})
        for use in uses:
            with pytest.raises(UsageError, match=f"task.scorer=.*{message}"):
                use()


def test_a_classifier_without_its_own_tokenizer_is_an_error(tmp_path: Path) -> None:
    """Without its files, the library makes an empty one: every word is unknown, every text gets the same score."""
    folder = classifier(tmp_path)
    words, uses = (
        folder / "vocab.txt",
        (Classifier(str(folder)).check, lambda: Classifier(str(folder)).load(tmp_path, "cpu")),
    )
    words.write_text("\n".join([*WORDS, "one", "more"]))
    for message in (rf"{len(WORDS) + 2} tokens for an embedding of {len(WORDS)} rows", "no tokenizer: save its own"):
        for use in uses:
            with pytest.raises(UsageError, match=message):
                use()
        for path in (words, folder / "tokenizer_config.json"):
            path.unlink(missing_ok=True)


def test_damaged_files_of_the_scorer_in_the_cache_are_replaced(tmp_path: Path) -> None:
    texts = [(f"{word} number {i}", word == "sock") for i in range(20) for word in ("sock", "kind")]
    given = Own(tuple(texts), tuple(texts[:8]))
    expected = given.load(tmp_path, "cpu")(["a sock"]), scorers.auc(given, tmp_path, "cpu")
    for path in (tmp_path / "scorers").iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    assert (given.load(tmp_path, "cpu")(["a sock"]), scorers.auc(given, tmp_path, "cpu")) == expected


def test_its_scores_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    given = Classifier(str(classifier(tmp_path)))
    one, all_at_once = (replace(given, batch_size=size).load(tmp_path, "cpu")(TEXTS) for size in (1, 4))
    assert one == pytest.approx(all_at_once, abs=1e-6) and len(set(one.round(4))) == 4


def test_a_scorer_waits_for_no_other_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rank 0 computes the AUC, so a collective operation would wait forever."""
    test = [(text, i % 2 == 0) for i, text in enumerate(TEXTS)]
    given = Classifier(str(classifier(tmp_path)), test=test)
    alone = scorers.auc(given, tmp_path / "alone", "cpu")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    for name in ("all_gather_object", "broadcast_object_list", "barrier", "all_reduce"):
        monkeypatch.setattr(dist, name, lambda *_, name=name, **__: pytest.fail(f"{name} waits for the other ranks"))
    assert scorers.auc(given, tmp_path / "one of two", "cpu") == alone


def test_a_classifier_is_loaded_whole_in_a_process_that_trained_under_zero3(tmp_path: Path) -> None:
    from transformers.integrations import HfDeepSpeedConfig

    given = Classifier(str(classifier(tmp_path)))
    expected = given.load(tmp_path, "cpu")(TEXTS)
    remembered = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert given.load(tmp_path, "cpu")(TEXTS).tolist() == expected.tolist() and remembered is not None


def test_a_scorer_that_cannot_work_is_an_error_when_the_task_is_built(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"task.scorer=toxicbert is unknown: choose own, unitary/toxic-bert, or a fol"):
        detox(scorer="toxicbert")
    (tmp_path / "other").mkdir()
    other = classifier(tmp_path / "other", ["positive", "negative"])
    with pytest.raises(UsageError, match="has the labels positive, negative: expected one named 'toxic'"):
        detox(scorer=str(other))
    (tmp_path / "pickled").mkdir()
    pickled = classifier(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"has no \*.safetensors: convert"):
        detox(scorer=str(pickled))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty cannot be read .*type task.scorer=own"):
        detox(scorer=str(tmp_path / "empty"))


def test_the_own_scorer_needs_twenty_texts_of_each_label(tmp_path: Path) -> None:
    path = comments(tmp_path, many(100))
    with pytest.raises(UsageError, match=r"scorer-train has .* toxic and .* other texts, expected 20 of each"):
        detox(str(path), num_forget=5, num_prompts=2, num_polite=2)


def test_toxic_bert_has_a_pinned_revision_that_an_option_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "check", lambda self: None)  # which would reach the hub
    for given, expected in ((None, REVISION), ("main", "main")):
        found = make_scorer("unitary/toxic-bert", given, [], [])
        assert found.identity() == ["unitary/toxic-bert", expected]
    assert make_scorer("someone/else", None, [], []).identity() == ["someone/else", None]


def test_the_folder_of_cached_answers_depends_on_the_scorer(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    models = build_models(composed(tmp_path, "task=detox"))
    tasks = [detox(), detox(scorer=str(classifier(tmp_path / "bert"))), detox()]
    places = [answer_cache.folder_of(replace(models, task=task), Checkpoint("someone/model")) for task in tasks]
    assert places[0] == places[2] != places[1]


def test_examined_scores_the_probes_that_the_task_names(lm: LanguageModel, tmp_path: Path) -> None:
    probe = Probe(items(3), generate=True)
    task = replace(detox(), prefix=(), probes={"forget": probe, "retain": probe}, scored=("forget",))
    models = build_models(composed(tmp_path, "task=detox", "utility_suite=none"))
    models = replace(models, cache=tmp_path, task=task, evaluation=Evaluation(2, 3))
    found = answer_cache.answers_of(lm, models, "test")
    assert found["forget"].toxicity is not None and found["retain"].toxicity is None
    texts = [" ".join(text.split()) for text in found["forget"].generation or ()]
    expected = [scored(task, [text], tmp_path)[0] if re.search("[^\\W\\d_]", text) else 0.0 for text in texts]
    assert found["forget"].toxicity == pytest.approx(expected)


# ---- the command line

SMALL = [
    "task=detox", "task.num_forget=16", "task.num_prompts=8", "task.num_polite=8", "task.num_retain_passages=4",
    "task.num_rtp_prompts=4", "prepare.epochs=1", "evaluate.max_new_tokens=4", "train.max_steps=3",
    "train.logging_steps=1", "wandb.mode=disabled",
]  # fmt: skip


def test_a_run_reports_numbers_of_all_three_models_and_the_scorers_auc(place: Path) -> None:
    run = type_(place, *SMALL, "name=own", "save=best", "train.save_steps=2")
    assert run.returncode == 0, run.stderr
    folder = next((place / "runs" / "own").rglob("results.json")).parent
    found = read(folder)
    assert found is not None and found.scorer is not None and found.scorer["name"] == "own"
    assert found.scorer["auc"] == scorers.auc(detox().scorer, place / "cache", "cpu")  # type: ignore[arg-type]
    assert any(f"AUC is {found.scorer['auc']:.3f} on 200 texts" in note for note in found.notes)
    for model in ("original", "unlearned", "retrained"):
        assert None not in found.metrics[model].values()
    records = read_records(folder / "records" / "unlearned" / "holdout.jsonl")
    assert found.metrics["unlearned"]["prompts_toxicity"] == records.numbers("toxicity").mean()
    assert "scorer" in found.data_hashes and found.metrics["retrained"]["forget_quality"] == 1.0
    (place / "bert").mkdir()
    other = type_(place, *SMALL, "name=bert", f"task.scorer={classifier(place / 'bert')}", "stages=[prepare]")
    assert other.returncode == 0, other.stderr


def test_a_real_model_is_the_target_as_it_is_and_has_no_forget_quality(place: Path) -> None:
    given = next((place / "cache" / "models").glob("*/prepared.json")).parent
    line = [*SMALL, f"model.path={given}", "model.knows_general=true", "loss=po", "name=given"]
    run = type_(place, *line)
    assert run.returncode == 0, run.stderr
    found = read(next((place / "runs" / "given").rglob("results.json")).parent)
    assert found is not None and set(found.metrics) == {"original", "unlearned"} and found.forget_quality is None
    assert found.reasons["forget_quality"].startswith("no retrained model, as model.path is the target as it is")
    assert found.metrics["unlearned"]["prompts_toxicity"] is not None and found.utility is not None
