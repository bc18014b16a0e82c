"""General utility: lm-evaluation-harness's numbers recomputed, the embedded questions, the paper's, two ranks."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from composing import composed
from conftest import small_model
from engines import MODEL
from test_engines import deepspeed_of

from soul_exp import binding
from soul_exp.artifacts import answer_cache, measures, prepared_models, scores
from soul_exp.build import build_models
from soul_exp.data import Item, content_hash
from soul_exp.distributed import zero3
from soul_exp.distributed.processes import launch
from soul_exp.errors import UnreachableError, UsageError
from soul_exp.evaluation import lm_eval_suite
from soul_exp.evaluation.probing import likelihoods
from soul_exp.metrics.answers import SUITE
from soul_exp.metrics.suite import ScoredTask, mean_accuracy, perplexity
from soul_exp.models import saving
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.lora import Lora
from soul_exp.run import Compute, Evaluation, Suite
from soul_exp.stages.process import start_process
from soul_exp.tasks.copyright import copyright
from soul_exp.tasks.embedded import corpus, general_suite
from soul_exp.tasks.task import Probe

QUESTIONS = general_suite.questions()
TWO_CHOICES = {"boolean", "entailment", "pronoun", "physical"}


def scored(lm: LanguageModel, **options: Any) -> dict[str, ScoredTask]:
    return lm_eval_suite.scores(lm, "embedded", **{"limit": None, "data": None, "batch_size": 64, **options})


def read(lm: LanguageModel, context: str, continuation: str) -> float:
    """Our own log-likelihood of a continuation, one text at a time."""
    item = likelihoods(lm, [Item(context, f" {continuation}", raw=True)], batch_size=1)[0]
    return float(item.logp[:-1].sum())  # without the end token


# ---- the embedded questions


def test_each_task_has_24_questions_whose_right_answers_are_equally_often_in_each_position() -> None:
    assert len(QUESTIONS) == 9 and all(len(asked) == 24 for asked in QUESTIONS.values())
    for name, asked in QUESTIONS.items():
        choices = 2 if name in TWO_CHOICES else 4
        assert Counter(q.gold for q in asked) == {place: 24 // choices for place in range(choices)}, name
        for q in asked:
            options = list(zip(q.contexts, q.continuations, strict=True))
            assert len(set(options)) == len(options) == choices, (name, q)
    chance = sum(0.5 if name in TWO_CHOICES else 0.25 for name in QUESTIONS) / 9
    assert chance == pytest.approx(0.361, abs=1e-3)  # as the docstring of mean_accuracy says


def test_no_question_is_in_the_training_rows_and_they_are_few_and_short() -> None:
    rows = general_suite.training_rows()
    assert len(rows) == 216 and max(len((row.prompt + row.answer).split()) for row in rows) <= 24
    taught = {row.prompt for row in rows}
    for name, asked in QUESTIONS.items():
        assert not taught & {context for q in asked for context in q.contexts}, name
    read_before = {" ".join((row.prompt + row.answer).split()) for row in copyright().target_rows}
    assert len(general_suite.texts()) == 24 and not read_before & set(general_suite.texts())
    assert not set(corpus.general_text(1000)) & set(general_suite.texts())


def test_every_right_answer_is_taught_in_another_wording() -> None:
    rows = Counter(row.answer.strip() for row in general_suite.training_rows())
    asked = Counter(q.continuations[q.gold] for questions in QUESTIONS.values() for q in questions)
    assert rows == asked  # equally often, so that no answer is likely just because it is frequent


def test_the_embedded_suite_is_the_same_every_time() -> None:
    assert general_suite.questions() == QUESTIONS and general_suite.texts() == general_suite.texts()
    first = QUESTIONS["science_hard"][0]
    assert first.contexts[0] == "Question: What do we call a young horse?\nAnswer:"
    assert first.continuations == ("foal", "lamb", "cub", "gosling") and first.gold == 0
    first = QUESTIONS["pronoun"][0]
    assert first.contexts[1].endswith("in the drawer, as the trophy") or first.contexts[1].endswith("the trophy")
    assert set(first.continuations) == {"was too large."}


# ---- the numbers


def test_accuracies_equal_those_of_our_own_likelihoods(lm: LanguageModel) -> None:
    found = scored(lm)
    lm.model.eval()
    for name, asked in QUESTIONS.items():
        sums = [[read(lm, c, a) for c, a in zip(q.contexts, q.continuations, strict=True)] for q in asked]
        hits = [int(np.argmax(row) == q.gold) for row, q in zip(sums, asked, strict=True)]
        assert found[name]["acc"] == sum(hits) / 24 and found[name].of_items["acc"].tolist() == hits, name
        p = sum(hits) / 24
        assert found[name]["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 24))
        if name != "pronoun":  # there both options are equally long
            lengths = [[len(a) for a in q.continuations] for q in asked]
            normed = [
                int(np.argmax(np.array(row) / n) == q.gold) for row, n, q in zip(sums, lengths, asked, strict=True)
            ]
            assert found[name]["acc_norm"] == pytest.approx(sum(normed) / 24, abs=1e-12), name
    assert mean_accuracy(found) == pytest.approx(sum(found[name]["acc"] for name in QUESTIONS) / 9)


def test_the_numbers_of_a_task_are_lm_evals_own_to_the_last_bit(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.evaluator

    theirs: list[Any] = []
    real = lm_eval.evaluator.evaluate
    monkeypatch.setattr(lm_eval.evaluator, "evaluate", lambda **options: theirs.append(real(**options)) or theirs[0])
    for task, found in scored(lm).items():
        own = {key.partition(",")[0]: value for key, value in theirs[0]["results"][task].items()}
        shared = {name: value for name, value in found.items() if name not in ("n", "acc_stderr")}
        assert len(shared) in (2, 3) and {name: own[name] for name in shared} == shared
        assert found["n"] == 24


def test_the_record_of_a_suite_holds_what_was_made_of_each_item(tmp_path: Path) -> None:
    """From it alone the scores come back; one of an earlier version holds the scores themselves."""
    made = {
        "boolq": ScoredTask({"acc": np.array([1.0, 0.0, 1.0]), "acc_norm": np.array([0.0, 0.0, 1.0])}),
        "wikitext": ScoredTask({"word_perplexity": np.array([[-20.0, 10.0], [-10.0, 5.0], [math.nan, 1.0]][:2])}),
    }
    assert made["boolq"]["acc"] == 2 / 3 and made["wikitext"] == {"word_perplexity": math.exp(2), "n": 2.0}
    answer_cache.write_answers(tmp_path / "a", {SUITE: made})
    file = tmp_path / "a" / "suite.json"
    assert json.loads(file.read_text()) == {
        "boolq": {"acc": "101", "acc_norm": "001"}, "wikitext": {"word_perplexity": [[-20.0, 10.0], [-10.0, 5.0]]},
    }  # fmt: skip
    known: Any = answer_cache.read_answers(tmp_path / "a")[SUITE]
    assert known == made and known["boolq"].of_items["acc"].tolist() == [1, 0, 1]
    assert measures.measures({}, {"unlearned": {SUITE: known}}, 0).suite == {"unlearned": made}
    file.write_text(file.read_text().replace("101", "100"))
    changed: Any = answer_cache.read_answers(tmp_path / "a")[SUITE]
    assert changed["boolq"]["acc"] == 1 / 3
    file.write_text('{"boolq": {"acc": 0.5, "n": 2.0}}')
    assert answer_cache.read_answers(tmp_path / "a")[SUITE] == {"boolq": {"acc": 0.5, "n": 2.0}}


def test_loglikelihoods_equal_ours_to_1e_4_whatever_the_batch(lm: LanguageModel) -> None:
    from lm_eval.api.instance import Instance

    from soul_exp.evaluation.lm_eval_model import SharedModel

    pairs = [(c, a) for q in QUESTIONS["completion"][:6] for c, a in zip(q.contexts, q.continuations, strict=True)]
    requests = [Instance("loglikelihood", {}, (c, f" {a}"), i) for i, (c, a) in enumerate(pairs)]
    lm.model.eval()
    for batch_size in (1, 5, 64):
        harness = SharedModel(lm, batch_size, "")
        given = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
        np.testing.assert_allclose(given, [read(lm, c, a) for c, a in pairs], atol=1e-4)


def test_word_perplexity_is_exp_of_the_nll_per_word(lm: LanguageModel) -> None:
    texts = general_suite.texts()[:3]
    lm.max_length = 40  # so that a text takes several windows
    found = scored(lm, limit=3)["text"]
    lm.model.eval()
    nll = 0.0
    for text in texts:
        ids = [lm.tokenizer.eos_token_id, *lm.tokenizer(text)["input_ids"]]
        import torch

        for start in range(1, len(ids), 40):  # disjoint windows of 40 predicted tokens
            targets = ids[start : start + 40]
            # a shorter last window reads what came before it, up to 40 tokens in all
            first = max(0, start + len(targets) - 1 - 40)
            inputs = torch.tensor([ids[first : start + len(targets) - 1]])
            with torch.no_grad():
                table = lm.model(input_ids=inputs).logits.log_softmax(-1)[0]
            nll -= sum(float(table[len(inputs[0]) - len(targets) + i, t]) for i, t in enumerate(targets))
    words = sum(len(text.split()) for text in texts)
    assert found["word_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-4)
    assert perplexity({"text": found}) == found["word_perplexity"]


def test_a_ruined_model_has_a_finite_perplexity_and_one_with_nan_weights_has_nan(lm: LanguageModel) -> None:
    import torch

    from soul_exp.evaluation.lm_eval_model import MAX_NLL

    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(1e5)
    ruined = scored(lm, limit=2)["text"]["word_perplexity"]
    assert ruined == pytest.approx(math.exp(MAX_NLL))
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.fill_(math.nan)
    assert math.isnan(scored(lm, limit=2)["text"]["word_perplexity"])


def test_a_limit_takes_the_first_items_of_each_task(lm: LanguageModel) -> None:
    few = scored(lm, limit=5)
    assert {measured["n"] for measured in few.values()} == {5.0}
    first = QUESTIONS["truthful"][:5]
    lm.model.eval()
    hits = [
        np.argmax([read(lm, c, a) for c, a in zip(q.contexts, q.continuations, strict=True)]) == q.gold for q in first
    ]
    assert few["truthful"]["acc"] == pytest.approx(sum(hits) / 5)


def test_scores_do_not_depend_on_the_batch_size_or_the_mode_of_the_model(lm: LanguageModel) -> None:
    lm.model.train()
    one = scored(lm, limit=4, batch_size=3)
    assert lm.model.training
    many = scored(lm, limit=4, batch_size=200)
    for task in one:
        assert one[task] == pytest.approx(many[task], rel=1e-4)


def test_a_fresh_adapter_changes_no_score(lm: LanguageModel) -> None:
    plain = scored(lm, limit=3)
    wrapped = lm.with_model(
        Lora(r=4, alpha=8, dropout=0.0, target_modules="all-linear", merge=False).wrapped(lm.model, 0)
    )
    adapted = scored(wrapped, limit=3)  # a fresh adapter changes nothing
    assert {task: found["n"] for task, found in adapted.items()} == {task: 3.0 for task in plain}
    for task in plain:
        assert adapted[task] == pytest.approx(plain[task], rel=1e-4)


def test_the_mean_weights_acc_of_every_task_equally_and_counts_nothing_else() -> None:
    given = {
        "a": {"acc": 0.5, "acc_norm": 1.0, "n": 2.0},
        "b": {"acc": 1.0, "n": 1000.0},
        "t": {"word_perplexity": 9.0},
    }
    assert mean_accuracy(given) == 0.75 and perplexity(given) == 9.0
    assert binding.names(mean_accuracy) == binding.names(perplexity) == (SUITE,)
    assert scores.score(mean_accuracy, {SUITE: given}, None) == 0.75
    assert scores.score(mean_accuracy, {}, None) is None
    with pytest.raises(ValueError, match="expected one with acc"):
        mean_accuracy({"t": {"word_perplexity": 9.0}})
    with pytest.raises(ValueError, match="in 0 of the tasks"):
        perplexity({"a": {"acc": 0.5}})


# ---- several ranks


def score_in(rank: int, model: str, engines: Mapping[str, Mapping[str, Any] | None], folder: str) -> None:
    compute = Compute("zero3", "cpu", processes=2, threads=1, deepspeed=engines["zero3"])
    start_process(compute, rank, seed=0, attention_kernel="sdpa")
    for name, deepspeed in engines.items():
        lm = prepared_models.load(MODEL, Checkpoint(model), deepspeed)
        assert zero3.is_sharded(lm.model) is (name == "zero3")
        found = scored(lm, limit=3, batch_size=4)
        (Path(folder) / f"{name}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_both_of_two_ranks_have_the_scores_of_one_process_with_sharded_weights_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = small_model()
    saving.save(lm.model, lm.tokenizer, tmp_path / "model")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    launch(
        score_in, str(tmp_path / "model"), {engine: deepspeed_of(engine) for engine in ("ddp", "zero3")}, str(tmp_path),
        processes=2, threads=1, logs=tmp_path / "logs",
    )  # fmt: skip
    alone = scored(lm, limit=3, batch_size=4)
    for engine, rank in itertools.product(("ddp", "zero3"), (0, 1)):
        found = json.loads((tmp_path / f"{engine}-{rank}.json").read_text())
        assert found.keys() == alone.keys()
        for task in alone:
            assert found[task] == pytest.approx(alone[task], rel=1e-4), (engine, rank, task)


# ---- cached scores


def test_a_model_is_evaluated_once_per_suite(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving.save(lm.model, lm.tokenizer, tmp_path / "model")
    task = copyright(num_passages=4, num_holdout_passages=2, num_retain_passages=3)
    task = type(task)(**{**vars(task), "prefix": (), "probes": {"forget": Probe([Item("What is amber?", "birch")])}})
    models = replace(
        build_models(composed(tmp_path, "task=copyright")),
        task=task, model=MODEL, evaluation=Evaluation(64, 2), suite=Suite("embedded", 2, None),
    )  # fmt: skip
    place, calls = Checkpoint(str(tmp_path / "model")), []
    real = lm_eval_suite.scores
    monkeypatch.setattr(lm_eval_suite, "scores", lambda *args, **options: calls.append(1) or real(*args, **options))
    assert answer_cache.cached_folder(models, place) is None
    for _ in range(2):
        answer_cache.fill(models, place, "cpu", "target")
    assert len(calls) == 1
    known = answer_cache.read_answers(answer_cache.folder_of(models, place))
    assert set(known) == {"forget", SUITE}
    assert known[SUITE] == real(lm, "embedded", limit=2, data=None, batch_size=64)
    folder = answer_cache.folder_of(models, place)
    given: Any = {**known, SUITE: {"text": {"word_perplexity": math.nan}}}
    answer_cache.write_answers(folder, given)  # null in the file, which is strict JSON
    (folder / "other.jsonl").write_text("of somebody else")  # its marker does not list it
    again: Any = answer_cache.read_answers(folder)
    assert math.isnan(again[SUITE]["text"]["word_perplexity"]) and list(again) == ["forget", SUITE]
    assert answer_cache.cached_folder(replace(models, suite=Suite("embedded", 3, None)), place) is None
    assert answer_cache.cached_folder(replace(models, suite=Suite("none", 2, None)), place) is None


def test_a_second_run_with_the_same_model_takes_the_answers_to_a_slow_suite_from_the_cache(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As utility_suite=paper is of a large model: here it takes 0.3 s. The cache states what each stage took."""
    saving.save(lm.model, lm.tokenizer, tmp_path / "model")
    task = copyright(num_passages=4, num_holdout_passages=2, num_retain_passages=3)
    probes = {"forget": Probe([Item("What is amber?", "birch")], generate=True)}
    task = type(task)(**{**vars(task), "prefix": (), "probes": probes})
    first, second = (
        replace(build_models(composed(tmp_path, "task=copyright", more)), task=task, model=MODEL,
                evaluation=Evaluation(64, 2), suite=Suite("paper", None, None))
        for more in ("seed=0", "seed=1")
    )  # fmt: skip
    calls = []

    def stub(*args: Any, **options: Any) -> dict[str, dict[str, float]]:
        calls.append(1)
        time.sleep(0.3)
        return {"boolq": {"acc": 0.5, "n": 2.0}}

    monkeypatch.setattr(lm_eval_suite, "scores", stub)
    place = Checkpoint(str(tmp_path / "model"))
    answer_cache.fill(first, place, "cpu", "target")
    folder = answer_cache.cached_folder(second, place)
    assert folder is not None and len(calls) == 1
    seconds = answer_cache.seconds_of(folder)
    assert set(seconds) == {"gradients", "probabilities", "generation", "suite"} and seconds["suite"] >= 0.3
    start = time.perf_counter()
    answer_cache.fill(second, place, "cpu", "target")
    assert time.perf_counter() - start < 0.2 and len(calls) == 1
    known = answer_cache.read_answers(answer_cache.folder_of(second, place))
    assert known is not None and known[SUITE] == {"boolq": {"acc": 0.5, "n": 2.0}}


def test_lm_eval_is_imported_only_where_it_is_used() -> None:
    code = "import sys, soul_exp.experiment; print('lm_eval' in sys.modules)"
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip().splitlines()[-1] == "False"


# ---- the paper's suite


HUB_ROWS: dict[tuple[str, str | None], list[dict[str, Any]]] = {
    ("aps/super_glue", "boolq"): [
        {"passage": "Ann met Ben.", "question": "did ann meet ben", "label": 1},
        {"passage": "Ann left.", "question": "did ann stay", "label": 0},
        {"passage": "Ben sang.", "question": "did ben sing", "label": 1},
    ],
    ("nyu-mll/glue", "rte"): [{"sentence1": "Ann sings.", "sentence2": "Ann sings a song.", "label": 0}] * 3,
    ("Rowan/hellaswag", None): [
        {"ctx_a": "A man runs.", "ctx_b": "he", "activity_label": "Running", "endings": list("wxyz"), "label": "2"}
    ] * 3,
    ("allenai/winogrande", "winogrande_xl"): [
        {"sentence": "The cup broke as the _ fell.", "option1": "cup", "option2": "sun", "answer": "1"}
    ] * 3,
    ("allenai/ai2_arc", "ARC-Easy"): [
        {"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
    ] * 3,
    ("allenai/ai2_arc", "ARC-Challenge"): [
        {"question": "Which is wet?", "choices": {"text": ["rain", "sand"], "label": ["1", "2"]}, "answerKey": "1"}
    ] * 3,
    ("allenai/openbookqa", "main"): [
        {"question_stem": "Cows eat", "choices": {"text": ["grass", "tin"], "label": ["A", "B"]}, "answerKey": "A"}
    ] * 3,
    ("baber/piqa", None): [{"goal": "Dry hands", "sol1": "a towel", "sol2": "a key", "label": 0}] * 3,
    ("truthfulqa/truthful_qa", "multiple_choice"): [
        {"question": "Who flies?", "mc1_targets": {"choices": ["birds", "stones"], "labels": [1, 0]},
         "mc2_targets": {"choices": ["birds", "stones"], "labels": [1, 0]}}
    ] * 3,
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): [{"page": " = Owl = \n An owl is a bird . "}] * 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the paper suite's datasets, three rows each, in the hub's layout."""
    folder = tmp_path_factory.mktemp("hub")
    entries: dict[str, list[str]] = {}
    splits = {(dataset, part): split for _, dataset, part, split in lm_eval_suite.TASKS.values()}
    for (dataset, part), rows in HUB_ROWS.items():
        place, split = folder / dataset, splits[dataset, part]
        place.mkdir(parents=True, exist_ok=True)
        name = f"{part or 'default'}-{split}.jsonl"
        (place / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
        entries.setdefault(dataset, []).append(
            f"- config_name: {part or 'default'}\n  data_files:\n  - split: {split}\n    path: {name}\n"
        )
    for dataset, configs in entries.items():
        (folder / dataset / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    return folder


def test_the_paper_suite_runs_lm_evals_own_tasks_on_copies_of_their_datasets(lm: LanguageModel, hub: Path) -> None:
    lm_eval_suite.check("paper", str(hub))
    found = lm_eval_suite.scores(lm, "paper", limit=2, data=str(hub), batch_size=8)
    assert set(found) == set(lm_eval_suite.TASKS) and {measured["n"] for measured in found.values()} == {2.0}
    assert {task for task in found if "acc" in found[task]} == set(lm_eval_suite.TASKS) - {"wikitext"}
    assert {task for task in found if "acc_norm" in found[task]} == {
        "hellaswag", "arc_easy", "arc_challenge", "openbookqa", "piqa",
    }  # fmt: skip
    lm.model.eval()
    hits = [
        int((read(lm, text, "yes") > read(lm, text, "no")) == bool(row["label"]))
        for row in HUB_ROWS["aps/super_glue", "boolq"][:2]
        for text in [f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"]
    ]
    assert found["boolq"]["acc"] == sum(hits) / 2
    right = read(lm, "The cup broke as the cup", "fell.") > read(lm, "The cup broke as the sun", "fell.")
    assert found["winogrande"]["acc"] == float(right)
    assert found["wikitext"]["word_perplexity"] > 1


def test_the_table_of_datasets_is_lm_evals_own() -> None:
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent
    for task, (folder, dataset, part, split) in lm_eval_suite.TASKS.items():
        text = "".join(path.read_text() for path in (home / folder).glob("*.yaml"))
        assert re.search(rf"^task: {task}$", text, re.M), task
        assert f"{'test' if split == 'test' else 'validation'}_split: {split}\n" in text
        assert split == "test" or not re.search(r"^test_split: (?!null)", text, re.M), task  # it is what lm-eval takes
        assert f"dataset_path: {dataset}\n" in text and f"dataset_name: {part or 'null'}\n" in text, task


def test_a_folder_without_a_dataset_is_an_error(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"aps/super_glue is not a copy .* \(it is not a folder\): .*=embedded"):
        lm_eval_suite.check("paper", str(tmp_path))
    shutil.copytree(hub, tmp_path / "hub")
    readme = tmp_path / "hub/allenai/ai2_arc/README.md"
    readme.write_text(readme.read_text().replace("split: test", "split: train"))
    with pytest.raises(UsageError, match=r"allenai/ai2_arc is not a copy .* \(it has no split test\)"):
        lm_eval_suite.check("paper", str(tmp_path / "hub"))


def test_without_a_network_the_paper_suite_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval_suite._unavailable.cache_clear()
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"aps/super_glue cannot be reached .*utility_suite=embedded or"):
        lm_eval_suite.check("paper", None)
    assert time.monotonic() - began < 10  # the libraries by themselves ask for half a minute
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # workers read it as they start
    lm_eval_suite._unavailable.cache_clear()


def test_the_identity_of_a_suite_changes_with_its_name_the_limit_and_the_files(hub: Path) -> None:
    keys = [
        lm_eval_suite.identity("embedded", None, None), lm_eval_suite.identity("embedded", 5, None),
        lm_eval_suite.identity("paper", None, None), lm_eval_suite.identity("paper", None, str(hub)),
        lm_eval_suite.identity("none", None, None),
    ]  # fmt: skip
    assert len({content_hash(key) for key in keys}) == 5 and keys[-1] is None
