"""Texts in any script: words, ROUGE, BLEU, and rows in five of them through the tasks custom and copyright."""

from __future__ import annotations

import json
import random
import string
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.tokenizers import DefaultTokenizer
from starts import type_
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from soul_exp import ask
from soul_exp.data import Item, Template, encode, pad
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import evaluate_probes
from soul_exp.losses import Scored
from soul_exp.metrics import text
from soul_exp.metrics.answers import Answers
from soul_exp.models import loading
from soul_exp.models.language_model import LanguageModel, train_tokenizer
from soul_exp.tasks.copyright import copyright
from soul_exp.tasks.custom import custom
from soul_exp.tasks.sources import toxic_rows
from soul_exp.tasks.sources.text import general_items
from soul_exp.tasks.task import Probe, Task
from soul_exp.tasks.tofu import tofu

SENTENCES = {  # each an answer, and one to the same question without a word in common
    "Russian": ("Она родилась в 1971 году в Москве.", "Неизвестно, когда это было."),
    "Chinese": ("她于1971年出生在北京。", "我不知道此事"),
    "Arabic": ("وُلدت في القاهرة عام ١٩٧١.", "لا أعرف متى كان ذلك"),
    "Thai": ("เธอเกิดที่กรุงเทพ", "ไม่รู้"),
    "Hindi": ("उनका जन्म १९७१ में दिल्ली में हुआ था।", "मुझे नहीं पता"),
}
WORDS = {
    "Russian": "река город дом утро вода дорога слово книга старый мельник домой через".split(),
    "Chinese": list("河城家晨老人走过田野回看书水路年月风雨山"),
    "Arabic": "النهر المدينة البيت الصباح الماء الطريق الكلمة الكتاب القديم الطحان ذهب".split(),
    "Thai": "เมือง แม่น้ำ บ้าน เช้า ถนน หนังสือ เก่า กลับ เดิน ทุ่ง".split(),
    "Hindi": "नदी शहर घर सुबह पानी सड़क शब्द किताब पुराना चक्कीवाला गया".split(),
}
UNSPACED = ("Chinese", "Thai")


def book(script: str, sentences: int = 150) -> str:
    draw, blank = random.Random(script), "" if script in UNSPACED else " "
    end = {"Chinese": "。", "Thai": " "}.get(script, ". ")
    return "".join(blank.join(draw.choices(WORDS[script], k=8)) + end for _ in range(sentences))


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


# ---- Words


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Don't_stop — 3.5 Ideen!", ["don", "t", "stop", "3", "5", "ideen"]),
        ("Ещё не ПОЗДНО", ["ещё", "не", "поздно"]),
        ("我在Python3里工作。", ["我", "在", "python3", "里", "工", "作"]),
        ("東京タワー、〇々", ["東", "京", "タ", "ワ", "ー", "〇", "々"]),
        ("น้ำใจ ๒", ["น้ำ", "ใ", "จ", "๒"]),  # vowel signs and tones belong to their consonant
        ("ភាសា", ["ភា", "សា"]),
        ("नमस्ते, दुनिया।", ["नमस्ते", "दुनिया"]),
        ("مرحبًا بالعالم ١٢", ["مرحبًا", "بالعالم", "١٢"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("❤️ … ½", []),  # a variation selector is a mark, but no word begins with one
    ],
)
def test_words_of_any_script_are_letters_marks_and_digits_or_graphemes(given: str, expected: list[str]) -> None:
    assert text.words(given) == [unicodedata.normalize("NFC", word) for word in expected]
    assert text.words(unicodedata.normalize("NFD", given)) == text.words(given)


def test_texts_of_ascii_are_read_as_rouge_score_reads_them() -> None:
    theirs, draw = DefaultTokenizer(use_stemmer=True), random.Random(0)
    for _ in range(500):
        given = "".join(draw.choices(string.printable + "running flies   " * 5, k=80))
        assert text.Stems(False).tokenize(given) == text.Stems(True).tokenize(given) == theirs.tokenize(given)
    assert text.Stems(True).tokenize("A café in Zürich") == theirs.tokenize("A café in Zürich") != text.words("A café")


def test_running_text_is_cut_at_blanks_or_between_graphemes_and_loses_nothing() -> None:
    english = 'He said:  "Go —\nnow!" \t(twice)'
    assert [piece[1:] for piece in text.pieces(english)] == english.split()
    assert text.pieces("他说：“来 Python吧。”（好）") == [" 他", "说：“", "来", " Python", "吧。”（", "好）"]
    for script in WORDS:
        assert "".join(text.pieces(book(script))).strip() == " ".join(book(script).split())


# ---- ROUGE and BLEU


@pytest.mark.parametrize("script", SENTENCES)
def test_rouge_and_bleu_are_full_of_a_verbatim_answer_and_none_of_another(script: str) -> None:
    answer, other = SENTENCES[script]
    assert text.rouge_l_recall([answer, other], [answer, answer]).tolist() == [1.0, 0.0]
    given = Answers(nll=np.zeros(1), answer=[f" {answer}"], generation=[answer])
    assert text.bleu(given) == pytest.approx(100)
    assert text.bleu(Answers(nll=np.zeros(1), answer=[answer], generation=[other])) < 10  # a full stop is a token


def test_a_number_in_a_russian_sentence_is_one_word_of_it() -> None:
    assert text.rouge_l_recall(["1971"], ["Она родилась в 1971 году"]).tolist() == [0.2]


def test_bleu_of_english_is_sacrebleus() -> None:
    generations, references = ["The old mill's cat, 3.5 years – sat “down”."], ["The old cat, 3.5 years – sat “down”!"]
    given = Answers(nll=np.zeros(1), answer=references, generation=generations)
    assert text.bleu(given) == sacrebleu.corpus_bleu(generations, [references]).score


# ---- Tasks


def test_rows_of_every_script_have_rouge_and_bleu(tmp_path: Path) -> None:
    rows = [{"prompt": f"{script}?", "answer": answer} for script, (answer, _) in SENTENCES.items()]
    task = custom(write(tmp_path / "f.jsonl", rows), write(tmp_path / "r.jsonl", [{"prompt": "a", "answer": "b"}]))
    assert task.probes["forget"].generate and not {"forget.rouge_l", "forget.generation"} & task.missing.keys()
    write(tmp_path / "f.jsonl", [*rows, {"prompt": "?", "answer": "👍 …"}])
    task = custom(str(tmp_path / "f.jsonl"), str(tmp_path / "r.jsonl"))
    why = "the answer in line 6 of task.forget has no letter and no digit, which ROUGE and BLEU need"
    assert task.missing["forget.rouge_l"] == task.missing["forget.generation"] == why


@pytest.mark.parametrize(("ascii_only", "answer"), [(False, "👍"), (True, "Москва")])
def test_a_task_stops_before_the_work_at_an_answer_that_rouge_cannot_read(ascii_only: bool, answer: str) -> None:
    with pytest.raises(UsageError, match=f"the answer '{answer}' to 'Where' has no letter .* which ROUGE needs"):
        Probe([Item("Where", answer)], generate=True, ascii_only=ascii_only)
    assert Probe([Item("Where", answer)], ascii_only=ascii_only).items  # none is generated


@pytest.mark.parametrize("script", UNSPACED)
def test_a_text_without_blanks_is_divided_after_its_first_third(script: str, tmp_path: Path) -> None:
    forget = write(tmp_path / "f.jsonl", [{"text": SENTENCES[script][0]}])
    retain = write(tmp_path / "r.jsonl", [{"prompt": "a", "answer": "b"}])
    ((item,),) = custom(forget, retain).parts["forget"].rows
    third = len(text.pieces(SENTENCES[script][0])) // 3
    assert item.prompt + item.answer == SENTENCES[script][0] and len(text.pieces(item.prompt)) == third > 1


def test_general_text_without_blanks_has_paragraphs_by_its_graphemes(tmp_path: Path) -> None:
    lines = [book("Chinese")[i * 72 : i * 72 + 72] for i in range(3)]
    (tmp_path / "zh.txt").write_text("\n".join(lines))
    items = general_items(str(tmp_path / "zh.txt"), 3, None)
    assert [item.prompt + item.answer for item in items] == ["".join(text.pieces(line)[:50]).strip() for line in lines]


def test_comments_without_blanks_have_a_prompt_and_an_answer(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("text,is_toxic\n她于1971年出生在北京。,Not Toxic\n短,Not Toxic\n")
    first, second = toxic_rows.comments(tmp_path / "c.csv", lead_words=4, answer_words=3)
    assert first.item == Item("她于1971年", "出生在", raw=True) and second.item is None


def test_a_continuation_that_is_asked_for_has_a_blank_where_its_script_has_one() -> None:
    options = ask.Options(raw=True, answer=None, max_new_tokens=1)
    assert [options.item("a", answer).answer for answer in ("b", "后", "ไป", "год")] == [" b", "后", "ไป", " год"]


def test_tofu_is_read_as_its_authors_read_it_and_the_other_tasks_by_the_words_of_any_script(tmp_path: Path) -> None:
    assert all(probe.ascii_only for probe in tofu().probes.values() if probe.generate)
    rows = (
        write(tmp_path / "f.jsonl", [{"prompt": "a", "answer": "b"}]),
        write(tmp_path / "r.jsonl", [{"prompt": "c", "answer": "d"}]),
    )
    assert not any(probe.ascii_only for task in (custom(*rows), copyright()) for probe in task.probes.values())


def of_book(script: str, tmp_path: Path) -> Task:
    (tmp_path / "book.txt").write_text(book(script))
    return copyright(
        str(tmp_path / "book.txt"), num_passages=6, num_holdout_passages=4, prompt_words=(20, 40), answer_words=10,
        lead_words=5, wordings=("{passage}", "Go on: {passage}"), num_retain_passages=4, num_general_passages=2,
    )  # fmt: skip


def model_of(task: Task) -> LanguageModel:
    tokenizer = train_tokenizer([item.prompt + item.answer for item in task.target_rows], 512, 256)
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    return LanguageModel.of(loading.from_scratch(config, tokenizer, seed=0), tokenizer, Template(), 256)


@pytest.mark.parametrize("script", WORDS)
def test_a_book_of_any_script_is_cut_into_rows_that_a_tokenizer_can_divide(script: str, tmp_path: Path) -> None:
    task = of_book(script, tmp_path)
    lm = model_of(task)
    probed = [item for probe in task.probes.values() for item in probe.items]
    for item, row in zip(probed, encode(probed, lm.tokenizer, lm.template, 256), strict=True):
        assert lm.tokenizer.decode(row.ids[: row.num_prompt]) == item.prompt
        assert lm.tokenizer.decode(row.ids[row.num_prompt : -1]) == item.answer
    prompts = [len(text.pieces(item.prompt.removeprefix("Go on: "))) for item in task.probes["forget_20"].items]
    assert prompts == [20] * 5 and len(text.pieces(task.probes["forget_20"].items[0].answer)) == 10
    assert task.probes["forget_20"].items[0].answer.startswith(" ") == (script not in UNSPACED)


@pytest.mark.parametrize("script", UNSPACED)
def test_tokens_end_between_prompt_and_answer_also_where_a_sentencepiece_tokenizer_joins_them(
    script: str, tmp_path: Path
) -> None:
    task, special = of_book(script, tmp_path), ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    pieces.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    pieces.train_from_iterator([item.prompt + item.answer for item in task.target_rows], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    probed, joined = [item for probe in task.probes.values() for item in probe.items], 0
    for item, row in zip(probed, encode(probed, tokenizer, Template(), 4000), strict=True):
        assert tokenizer.decode(row.ids[:-1]) == item.prompt + item.answer
        assert tokenizer.decode(row.ids[: row.num_prompt]) == item.prompt
        joined += list(row.ids[:-1]) != tokenizer(item.prompt + item.answer)["input_ids"]
    assert joined > 5


@pytest.mark.parametrize("script", ["Russian", "Thai"])
def test_a_model_that_recites_a_book_of_any_script_has_full_rouge_and_bleu(script: str, tmp_path: Path) -> None:
    task = of_book(script, tmp_path)
    lm, probe = model_of(task), task.probes["forget_20"]
    batch = pad(encode(probe.items, lm.tokenizer, lm.template, 256), lm.pad_id)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=5e-3)
    for _ in range(120):
        Scored(lm.reader(lm.model, batch), batch["labels"]).mean_nll.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (answers,) = evaluate_probes(lm, {"forget": probe}, batch_size=8, max_new_tokens=100).values()
    assert answers.rouge_l is not None and answers.rouge_l.tolist() == [1.0] * 5
    assert text.bleu(answers) == pytest.approx(100)


def test_a_run_on_a_chinese_book_measures_rouge_and_bleu(place: Path) -> None:
    (place / "zh.txt").write_text(book("Chinese"))
    done = type_(
        place, "task=copyright", "task.source=zh.txt", "task.prompt_words=[50]", "task.num_passages=3", "name=zh",
        "task.num_holdout_passages=2", "prepare.epochs=1", "train.max_steps=1", "evaluate.max_new_tokens=60",
        "utility_suite=none", "task.train_general=false", "task.num_retain_passages=8", "task.num_general_passages=2",
        "wandb.mode=disabled", "save=none",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = [json.loads(path.read_text()) for path in (place / "runs" / "zh").glob("*/results.json")]
    for model in ("original", "unlearned", "retrained"):
        assert (
            0 <= run["metrics"][model]["forget_50_rouge"] <= 1 and run["metrics"][model]["forget_50_bleu"] is not None
        )
