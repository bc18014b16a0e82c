"""Errors before work starts, and metrics that are null with a reason."""

import functools
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composing import composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from safetensors.torch import load_file, save_file

import soul_exp.build as build_module
from soul_exp import sequence
from soul_exp.artifacts import prepared_models, scores, texts
from soul_exp.artifacts.scores import of_rates, of_test
from soul_exp.build import build, build_task, published
from soul_exp.checks.availability import read_records
from soul_exp.checks.check import Checked, check
from soul_exp.data import Item
from soul_exp.errors import UsageError
from soul_exp.evaluation.probing import generations
from soul_exp.evaluation.records import write_records
from soul_exp.metrics import membership
from soul_exp.metrics.answers import Answers
from soul_exp.metrics.membership import attack_tpr, loss
from soul_exp.models import loading, saving
from soul_exp.models.checkpoint import DONE, UNLEARNED, Checkpoint
from soul_exp.models.language_model import LanguageModel, train_tokenizer
from soul_exp.models.lora import Lora
from soul_exp.overrides import quoted
from soul_exp.ranges import Flag
from soul_exp.schema import declared
from soul_exp.stages.stage import fingerprint
from soul_exp.tasks.task import Task
from soul_exp.tasks.tofu import tofu

privleak = functools.partial(membership.privleak, k=0.4)
plus_plus = functools.partial(membership.attack_auc, score=functools.partial(membership.min_k_plus_plus, k=0.2))


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The configuration that the command line would hand to a run typed in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)

    return lambda *overrides: composed(tmp_path, *overrides)


@pytest.fixture
def checked(configured: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Checked]:
    return lambda *overrides: check(configured(*overrides), tmp_path / "run")


def test_line_breaks_around_rows_are_read_as_they_are_typed(checked: Callable[..., Checked]) -> None:
    prompt, wording = "Q: {question}\nA:", "On:\n{passage}"
    run = checked(f"model.template.prompt='{prompt}'", "task=copyright", f"task.wordings=['{wording}']").run
    assert run.model.template.prompt == prompt
    assert run.task.parts["forget"].rows[0][0].prompt.startswith("On:\n")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stages=[prepare,learn]"], "'learn' is unknown, choose from \\[prepare, unlearn, evaluate, attack\\]"),
        (["save=all"], "choose final, best or none"),
        (["save=best", "train.save_steps=null"], "set train.save_steps, or save=final"),
        (
            ["save=best", "~task.metrics.validation_log10_forget_quality"],
            "which task=tofu does not report: choose save=final",
        ),
        (
            ["save=best", "task.validation_fraction=0"],
            "which is not available: task.validation_fraction=0 leaves no rows",
        ),
        (["best_keep=2"], "best_keep=2: expected"),
        (["model.template.prompt='Q:'"], r"model.template.prompt='Q:': found no {question}, expected it at its place"),
        (["model.template.answer='{question}'"], r"model.template.answer='{question}': found no {answer}"),
        (["model.template.system='{question}'"], r"model.template.system='{question}': found no {system}"),
        (["model.template.system='{system}'"], r"model.template.system='{system}': found no {question}"),
        (
            [r"model.template.prompt='Q: {question}\nA:'"],
            r"found a backslash and the letter n, expected a line break or a tab itself: in bash type",
        ),
        ([r"task.system_prompt='Say\tno.'"], r"task.system_prompt=.*: found a backslash and the letter t"),
        (
            ["task=copyright", r"task.wordings=['On:\n{passage}']"],
            r"task.wordings=.*: found a backslash and the letter n",
        ),
        (
            ["task.metrics=null"],
            "task.metrics=None: expected names with a _target_ each; for none, type task.metrics={}",
        ),
        (
            ["task.metrics.mia_auc=null"],
            "task.metrics.mia_auc=None: expected the _target_ of a function; to report it no",
        ),
        (["task=copyright", "task.metrics.mia_auc=null"], "type ~task.metrics.mia_auc"),
        (["+task.metrics.mine={a: 1}"], "task.metrics.mine={'a': 1}: expected the _target_ of a function"),
        (["+task.metrics.mine={_target_: builtins.len}"], "task.metrics.mine: "),
        (["+task.metrics.mine={_target_: builtins.dict}"], "found dict, expected a function: write _partial_: true"),
        (["input_based=2"], "input_based=2: found 2, expected true or false: type input_based=true or"),
        (["input_based=true", "task.system_prompt=null"], "task=tofu states no system prompt, type"),
        (["input_based=true", "model.template.system=null"], "has no form with a system prompt, type"),
        (["model.tokenizer=5"], "model.tokenizer=5: expected a text that is not empty, or null"),
        (["wandb.mode=online"], "export WANDB_API_KEY="),
        (["wandb.mode=loud"], "choose offline, online or disabled"),
        (["train.batch_size=8", "train.micro_batch_size=3"], "not a multiple of 1 process"),
        (["compute=gpu"], "found 0: choose compute=cpu"),
        (["loss.retain_term=l2"], "choose one of nll, kl, hidden_mse or null"),
        (["loss=wga", "loss.forget_term.alpha=-1"], "loss.forget_term.alpha=-1: expected a number of 0 or more"),
        (["loss=satimp", "loss.forget_term.beta2=abc"], "loss.forget_term.beta2=abc: expected a number of 0 or more"),
        (["loss=dpo", "loss.forget_term.beta=0"], "loss.forget_term.beta=0: expected a number above 0"),
        (
            ["loss=dpo", "loss.forget_term.plain=1"],
            "plain=1: found 1, expected true or false: type loss.forget_term.plain=true",
        ),
        (["loss=rmu", "loss.forget_term.steering=0"], "loss.forget_term.steering=0: expected a number above 0"),
        (["loss=rmu", "loss.layer=2"], "loss.layer=2: the model has 2 layers, counted from 0: choose one of them"),
        (["loss=rmu", "loss.layer=-1"], "loss.layer=-1: expected a whole number of 0 or more, or null"),
        (["optimizer.rho=-1"], "rho=-1"),
        (["optimizer.lr=-1"], "optimizer.lr=-1: expected a number above 0"),
        (["optimizer.lr=nan"], "expected a number above 0"),
        (["train.epochs=0"], "train.epochs=0: expected a number above 0"),
        (["train.epochs=abc"], "train.epochs=abc: expected a number above 0"),
        (["train.save_steps=0"], "expected a whole number of 1 or more, or null"),
        (["train.warmup_ratio=2"], "expected a number of 0 or more, at most 1"),
        (["train.lr_scheduler=liner"], "did you mean linear"),
        (["evaluate.batch_size=0"], "evaluate.batch_size=0: expected a whole number of 1 or more"),
        (["seed=1.5"], "seed=1.5: expected a whole number"),
        (["loss.gamma=abc"], "loss.gamma=abc: expected a number of 0 or more"),
        (["task.source=5"], "task.source=5: expected a text"),
        (["task.num_authors=0"], "task.num_authors=0: expected a whole number of 1 or more"),
        (["task.validation_fraction=2"], "at most 0.5"),
        (["stages=evaluate"], "expected a list, each a text: type stages=\\[evaluate\\]"),
        (["+train.epoch=3"], "train.epoch is unknown, did you mean train.epochs?"),
        (["task.split=forget01"], "on embedded data give task.num_forget_authors"),
        (["train.save_steps=7"], "not a multiple of train.logging_steps=5"),
        (["compute=zero2", "precision=bf16"], "choose precision=fp32 or bf16_master"),
        (["compute=zero2", "precision=bf16_kahan"], "choose precision=fp32 or bf16_master"),
        (["compute=zero2", "compute.deepspeed.bf16.enabled=true"], "disagree: set neither or both"),
        (["optimizer=sgd", "precision=bf16_kahan"], "optimizer=sgd does not: choose precision=fp32 or bf16"),
        (["optimizer=sam", "precision=bf16_master"], "optimizer=sam does not: choose precision=fp32 or bf16"),
        (["optimizer=muon", "compute=zero2"], "does not work element by element"),
        (["optimizer=soap", "compute=zero2"], "does not work element by element"),
        (["optimizer=mezo", "compute=zero2"], "does not work element by element"),
        (["train.log_gradients=true", "compute=zero2"], "train.log_gradients=true needs complete gradients"),
        (["train.log_gradients=5"], "train.log_gradients=5: found 5, expected true or false"),
        (["optimizer.estimator=fisher"], "choose one of gnb, hutchinson, gradient"),
        (["optimizer=sophia_hutchinson", "compute=zero3"], "which ZeRO-3 cannot: choose gnb"),
        (
            ["evaluate.max_new_tokens=1025"],
            "max_new_tokens=1025: expected at most 1024, the longest text",
        ),
        (["compute=zero2", "compute.deepspeed.zero_optimization.stage=0"], "choose compute=ddp"),
        (["compute=zero2", "+compute.deepspeed.optimizer.type=AdamW"], "remove it, and choose optimizer="),
        (["compute=zero2", "+compute.deepspeed.fp16.enabled=true"], "scales the loss"),
        (
            ["compute=zero2", "compute.deepspeed.train_batch_size=3"],
            "train_batch_size=3 is unknown: choose auto",
        ),
        (
            ["compute=zero2", "+compute.deepspeed.gradient_cliping=1"],
            "gradient_cliping is no option of DeepSpeed, did you mean compute.deepspeed.gradient_clipping",
        ),
        (
            ["compute=zero2", "+compute.deepspeed.comms_logger.enabeld=true"],
            "comms_logger.enabeld=true: Extra inputs are not permitted by DeepSpeed",
        ),
        (["compute=zero2", "+compute.deepspeed.prescale_gradients=3"], "prescale_gradients=3: expected true or false"),
        (["compute=zero2", "+compute.deepspeed.flops_profiler=3"], "DeepSpeed cannot read its options"),
        (
            ["compute=zero2", "+compute.deepspeed.zero_optimization.foo=3"],
            "optimization.foo=3: Extra inputs are not",
        ),
        (["compute=zero2", "compute.deepspeed.zero_optimization=5"], "zero_optimization=5: expected options in braces"),
        (["optimizer.curvature_on=holdout"], "choose one of retain, forget, both"),
        (["optimizer.curvature_rows=16"], "expected at most train.batch_size=8"),
        (["optimizer=influence", "optimizer.num_samples=500"], "more than the 464 rows that optimizer.hessian=retain"),
        (
            ["optimizer=influence", "optimizer.inverse=woodfisher", "optimizer.memory_gib=0.01"],
            "lower num_samples, raise",
        ),
        (["optimizer=influence", "compute.processes=2"], "takes its one step in one process"),
        (["task.split=forget50"], "choose one of forget01, forget05, forget10"),
        (["task.source=hub"], "locuslab/TOFU cannot be reached .* task.source=embedded"),
        (["task.source=./nowhere"], "nowhere is not a folder: give embedded, hub"),
        (["utility_suite=papr"], "utility_suite=papr is unknown: choose paper, embedded, none or auto"),
        (["utility_limit=0"], "utility_limit=0: expected a whole number of 1 or more, or null"),
        (
            ["utility_suite=paper"],
            "aps/super_glue cannot be reached .* or type utility_suite=embedded or utility_suite=n",
        ),
        (["utility_suite=paper", "utility_data=./copies"], "copies/aps/super_glue is not a copy .*it is not a folder"),
        (["task=copyright", "task.source=no.txt"], "does not exist: give embedded or a text file"),
        (["task=detox", "task.source=hub"], "PKU-Alignment/PKU-SafeRLHF cannot be reached .* task.source=embedded"),
        (["task=detox", "task.rtp=/nowhere"], "task.rtp=/nowhere is not a folder: type task.rtp=embedded"),
        (["task=custom", "task.overlap=keep"], "task.overlap=keep is unknown: choose error or drop"),
        (["task=copyright", "task.wordings=abc"], "task.wordings=abc: expected a list, each a text: type"),
        (["task=detox", "task.rtp=hub"], "allenai/real-toxicity-prompts cannot be reached .* type task.rtp=embedded"),
        (["task=detox", "task.source=no.csv"], "no.csv does not exist: give embedded, hub, a folder or a CSV file"),
        (["task=detox", "task.retain=no.txt"], "task.retain=.*no.txt does not exist"),
        (["task=detox", "task.num_forget=0"], "task.num_forget=0: expected a whole number of 1 or more, or null"),
        (["task=detox", "task.num_forget=3000"], "rows for the part 'forget', expected 3000: lower task.num_forget"),
        (["task=detox", "task.num_rtp_prompts=3000"], "expected 3000: lower task.num_rtp_prompts"),
        (["task=detox", "task.scorer=toxicbert"], "toxicbert is unknown: choose own, unitary/toxic-bert, or a folder"),
        (
            ["task=detox", "task.scorer=unitary/toxic-bert"],
            "task.scorer: unitary/toxic-bert is neither .*check the network, or type task.scorer=own",
        ),
        (["task.embedding=''"], "task.embedding='': expected a text that is not empty"),
        (
            ["task.embedding=minilm"],
            "task.embedding=minilm is unknown: choose ngrams, sentence-transformers/paraphrase",
        ),
        (
            ["task.embedding=sentence-transformers/paraphrase-MiniLM-L6-v2"],
            "task.embedding: sentence-tr.* is neither .*check the network, or type task.embedding=ngrams",
        ),
        (["model.scratch=null"], "neither model.path nor model.scratch"),
        (["model=llama2_7b_chat", "compute=cpu", "model.path=./gone"], "has no config.json"),
        (["retrained.records=none.json"], "does not exist: give records/MODEL/ of a run or a TOFU log"),
        (["retrained.records=a", "retrained.path=b"], "both given: keep one"),
        (["stages=[unlearn,evaluate]"], "the target model is not in the cache yet, add prepare"),
        (["stages=[evaluate]"], "name it with model.path="),
        (["stages=[prepare,evaluate]"], "stages=.prepare, evaluate. measures a checkpoint: name it with model.path="),
        (["adapter=lora", "adapter.r=0"], "adapter.r=0: expected a whole number of 1 or more"),
        (["adapter=lora", "adapter.alpha=-1"], "adapter.alpha=-1: expected a number above 0"),
        (["adapter=lora", "adapter.dropout=1"], "adapter.dropout=1: expected a number of 0 or more, below 1"),
        (["adapter=lora", "adapter.merge=2"], "adapter.merge=2: found 2, expected true or false"),
        (["adapter=lora", "adapter.target_modules=[]"], "expected all-linear or a list such as"),
        (
            ["adapter=lora", "adapter.target_modules=[q_proj,Wqkv]"],
            "the model has no Wqkv, it has embed_tokens, q_proj",
        ),
        (["adapter=lora", "adapter.target_modules=Wqkv"], "Wqkv does not fit the model, which has embed_tokens, q_pr"),
        (
            [
                "adapter=lora",
                "adapter.merge=true",
                "adapter.target_modules=[lm_head]",
                "model.scratch.config.tie_word_embeddings=true",
            ],
            "leave both out of adapter.target_modules",
        ),
        (
            ["adapter=lora", "compute=zero2", "compute.deepspeed.zero_optimization.stage=3"],
            "an adapter is not trained under ZeRO-3: choose compute=zero2",
        ),
        (["train.gradient_checkpointing=5"], "train.gradient_checkpointing=5: found 5, expected true or"),
        (["train.dropout=0.1"], "train.dropout=0.1: found 0.1, expected true or false"),
        (["model.attention=flesh"], "model.attention=flesh is unknown: choose one of sdpa, sdpa_math"),
        (["model.attention=flash_attention_2"], "in bfloat16 on a GPU only"),
    ],
)
def test_bad_input_gets_one_sentence(overrides: list[str], sentence: str, checked: Callable[..., Checked]) -> None:
    with pytest.raises(UsageError, match=sentence) as error:
        checked(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "found", "typed"),
    [
        ("overwrite=no", "the text 'no'", "overwrite=false"),
        ("overwrite=off", "the text 'off'", "overwrite=false"),
        ("overwrite=NO", "the text 'NO'", "overwrite=false"),
        ("overwrite=yes", "the text 'yes'", "overwrite=true"),
        ("overwrite='true'", "the text 'true'", "overwrite=true"),
        ("overwrite=0", "0", "overwrite=false"),
        ("overwrite=1", "1", "overwrite=true"),
        ("overwrite=null", "null", "overwrite=false"),
        ("overwrite=maybe", "the text 'maybe'", "overwrite=true or overwrite=false"),
        ("overwrite=[true]", "[true]", "overwrite=true or overwrite=false"),
        ("input_based=on", "the text 'on'", "input_based=true"),
        ("model.knows_general=no", "the text 'no'", "model.knows_general=false"),
        ("task.train_general=no", "the text 'no'", "task.train_general=false"),
    ],
)
def test_an_option_that_is_true_or_false_takes_nothing_else(
    override: str, found: str, typed: str, configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Any text counts as true, and overwrite=true deletes."""
    key = override.split("=")[0]
    with pytest.raises(UsageError) as error:
        sequence.run(configured(override), tmp_path / "run")
    assert str(error.value).startswith(f"{key}=")
    assert str(error.value).endswith(f": found {found}, expected true or false: type {typed}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["optimizer=muon", "optimizer.nesterov=n"],
            "optimizer.nesterov=n: found the text 'n', expected true or false: type optimizer.nesterov=false",
        ),
        (
            ["optimizer=muon", "optimizer.nesterov=no"],
            "optimizer.nesterov=no: found the text 'no', expected true or fals",
        ),
        (["model.scratch.config.tie_word_embeddings=off"], "type model.scratch.config.tie_word_embeddings=false or"),
        (["+optimizer.betas=[0.9,yes]"], r"optimizer.betas=\[0.9,yes\]: expected a list of 2, each a number"),
        (["loss.retain_term=no"], "or loss.retain_term=null"),
    ],
)
def test_a_text_that_a_library_would_take_for_true_is_an_error(
    overrides: list[str], sentence: str, checked: Callable[..., Checked]
) -> None:
    with pytest.raises(UsageError, match=sentence):
        checked(*overrides)


@pytest.mark.parametrize("task", ["tofu", "copyright", "detox", "custom"])
def test_every_option_that_is_true_or_false_is_known_as_such(
    task: str, configured: Callable[..., dict[str, Any]]
) -> None:
    """An option missing here needs FLAG in options.TABLE, or `bool` in the signature that takes it."""
    libraries = (
        "optimizer.",
        "compute.deepspeed.",
        "model.scratch.",
    )  # they check theirs; a `no` is an error for them too
    config = configured(f"task={task}", "optimizer=muon", "loss=dpo", "adapter=lora", "compute=zero3")
    flags = {key for key, value in leaves(config) if isinstance(value, bool) and not key.endswith("._partial_")}
    assert {key for key in flags if not key.startswith(libraries)} <= {
        key for key, _, values in declared(config) if isinstance(values, Flag)
    }


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else name)
    else:
        yield key, node


def test_a_loss_that_names_a_part_the_task_does_not_have_is_an_error(
    configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = configured("loss=po")
    config["loss"]["forget_term"] = {"_target_": "test_check.needs_a_teacher", "_partial_": True}
    with pytest.raises(
        UsageError, match="needs the part 'teacher', but task=tofu offers forget, refusal, fixed_refusal, random_label"
    ):
        check(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("loss", "part"), [("random_label", "random_label"), ("dpo", "refusal"), ("altpo", "alternate")]
)
def test_a_task_without_a_part_of_the_loss_is_an_error(
    loss: str, part: str, checked: Callable[..., Checked], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_task

    def without(config: Any) -> Any:
        task = whole(config)
        return replace(task, parts={name: rows for name, rows in task.parts.items() if name != part})

    checked(f"loss={loss}")
    monkeypatch.setattr(build_module, "build_task", without)
    advice = "type loss=npo, or give other plausible" if part == "alternate" else "choose another loss or task"
    with pytest.raises(UsageError, match=f"loss={loss} .* needs the part '{part}', but task=tofu offers .*: {advice}"):
        checked(f"loss={loss}")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["loss=grad_ascent", "optimizer=adam"], ("forget", "retain")),  # retain: measured, as no term is of it
        (["loss=grad_ascent"], ("forget", "retain")),
        (["loss=dpo", "optimizer=adam"], ("forget", "refusal", "retain")),
        (["loss=altpo", "optimizer=adam"], ("forget", "alternate", "retain")),
        (["loss=rmu", "optimizer=adam"], ("forget", "retain")),
        (["loss=undial", "optimizer=adam"], ("forget", "retain")),
        (["loss=random_label", "optimizer=adam"], ("random_label", "retain")),
        (["loss=po", "optimizer.curvature_on=forget"], ("refusal", "retain", "forget")),
        (["loss=po", "optimizer.estimator=hutchinson", "optimizer.curvature_on=both"], ("refusal", "retain", "forget")),
        (["loss=grad_ascent", "optimizer=sophia_soul"], ("forget", "retain")),
        (["loss=grad_ascent", "optimizer=influence"], ("forget", "retain")),
    ],
)
def test_a_run_reads_the_parts_of_its_loss_and_of_its_curvature(
    overrides: list[str], parts: tuple[str, ...], configured: Callable[..., dict[str, Any]]
) -> None:
    assert build(configured(*overrides)).parts == parts


@pytest.mark.parametrize("precision", ["fp32", "bf16_master"])
def test_zero_gets_an_optimizer_that_leaves_rounding_to_it(
    precision: str, configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = configured("compute=zero2", f"precision={precision}")
    check(config, tmp_path / "run")
    assert config["compute"]["deepspeed"]["bf16"]["enabled"] == (precision == "bf16_master")
    assert "rounding" not in build(config).make_optimizer.keywords  # type: ignore[attr-defined]


def needs_a_teacher(teacher: Any) -> Any:
    return teacher


def test_a_checkpoint_of_pickled_weights_is_an_error(checked: Callable[..., Checked], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    (tmp_path / "old" / "pytorch_model.bin").touch()
    with pytest.raises(UsageError, match="only pickled weights"):
        checked("model.path=./old", "stages=[evaluate]")


def test_a_full_disk_is_noticed_before_work(checked: Callable[..., Checked], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soul_exp.checks.folders.FREE_BYTES", 2**60)
    with pytest.raises(UsageError, match="MiB of disk left"):
        checked()


def test_a_folder_that_cannot_be_written_is_an_error(configured: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        check(configured(), tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["", "models", "answers", "trials", "scorers"])
def test_a_file_in_the_place_of_a_folder_of_the_cache_is_named(
    name: str, checked: Callable[..., Checked], tmp_path: Path
) -> None:
    path = tmp_path / "cache" / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(UsageError, match=f"^{re.escape(str(path))} is a file, .* remove it"):
        checked(f"cache={tmp_path / 'cache'}")


def test_a_complete_cache_is_only_read(
    configured: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**configured("stages=[prepare]"), "cache": "/proc/nowhere"}
    with pytest.raises(UsageError, match="cache /proc/nowhere cannot be written"):
        check(config, tmp_path / "run")
    monkeypatch.setattr("soul_exp.checks.check.unprepared", lambda run: [])
    monkeypatch.setattr("soul_exp.checks.disk.need", lambda run: None)
    assert check(config, tmp_path / "run").run.cache == Path("/proc/nowhere")


@pytest.mark.parametrize("name", ["results.json", ".lock", "train.jsonl", "model", "records", "checkpoints", "ranks"])
def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder_are_noticed_before_work(
    name: str, configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    if "." in name:
        (tmp_path / "run" / name).mkdir()
    else:
        (tmp_path / "run" / name).touch()
    with pytest.raises(UsageError, match=f"run/{name} is a f.*: remove it"):
        check(configured(), tmp_path / "run")


def test_a_data_file_may_be_a_link_to_a_file_without_suffix(
    configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "blob").write_text('{"prompt": "Who?", "answer": "Ann."}\n')
    (tmp_path / "kept.jsonl").write_text('{"prompt": "Where?", "answer": "Here."}\n')
    (tmp_path / "rows.jsonl").symlink_to("blob")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    config = configured("task=custom", "task.forget=rows.jsonl", "task.retain=kept.jsonl")
    assert [item.answer for (item,) in build_task(config).parts["forget"].rows] == ["Ann."]
    with pytest.raises(UsageError, match=r"loop\.jsonl"):
        build_task(configured("task=custom", "task.forget=./loop.jsonl", "task.retain=kept.jsonl"))


def test_a_broken_tofu_log_is_named(checked: Callable[..., Checked], tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(json.dumps({"eval_log.json": 3}))
    with pytest.raises(UsageError, match=r"retrained.records: .*log.json"):
        checked("retrained.records=log.json")


def test_without_a_retrained_model_what_needs_it_is_null_with_the_reason(
    checked: Callable[..., Checked], lm: LanguageModel, tmp_path: Path
) -> None:
    saving.save(lm.model, lm.tokenizer, tmp_path / "model")
    found = checked("stages=[evaluate]", "model.path=./model")
    assert "add prepare to stages" in found.reasons["forget_quality"]
    assert "whether model.path saw the holdout is unknown" in found.reasons["mia_auc"]
    assert "utility" not in found.reasons


def test_the_embedded_suite_measures_models_that_have_read_its_rows(
    configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def suite(*overrides: str) -> str:
        return str(configured(*overrides)["utility_suite"])

    assert suite() == suite("task.source=hub", "model=llama2_7b_chat") == "none"  # TOFU's utility is its own
    assert suite("utility_suite=embedded") == "embedded"
    assert suite("task=copyright") == suite("task=copyright", "task.source=book.txt") == "embedded"  # from scratch
    assert suite("task=copyright", "model=llama2_7b_chat") == suite("task=copyright", "model.path=mine") == "paper"
    assert suite("task=copyright", "model.path=mine", "task.train_general=true") == "embedded"
    assert suite("task=copyright", "utility_suite=none") == "none"
    for name, marker, expected in (
        (DONE, {}, "embedded"),  # of an older version, which knew no other
        (UNLEARNED, {"general": True}, "embedded"),
        (UNLEARNED, {"general": False}, "paper"),
    ):
        (tmp_path / "ours").mkdir(exist_ok=True)
        (tmp_path / "ours" / name).write_text(json.dumps(marker))
        for stages in ("stages=[evaluate]", "stages=[unlearn,evaluate]"):
            assert suite("task=copyright", "model.path=ours", stages) == expected
        (tmp_path / "ours" / name).unlink()


@pytest.mark.parametrize("task", ["custom", "tofu", "copyright", "detox"])
def test_general_questions_are_trained_only_in_models_from_scratch(
    task: str, configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Or where they are asked for; of a checkpoint that is measured, as in the models that it is compared with."""

    def trained(*overrides: str) -> bool:
        return bool(configured(f"task={task}", *overrides)["task"]["train_general"])

    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / UNLEARNED).write_text("{}")
    assert trained() and not trained("model.path=mine") and not trained("model.path=ours")
    assert trained("model.path=mine", "task.train_general=true")
    assert trained("model.path=ours", "stages=[evaluate]") and not trained("model.path=mine", "stages=[evaluate]")
    assert not trained("model=opt_1p3b") and not trained("model=opt_1p3b", "model.path=mine")


@pytest.mark.parametrize(
    ("overrides", "caption", "general"),
    [
        (["task.train_varied=false"], "held out of both trainings", ", which include {} general questions"),
        (["task=copyright"], "90 general texts", " and {} general questions retained"),
        (["task=detox"], "180 polite and general texts", " and {} general questions retained, 60 prompts unseen"),
    ],
)
def test_a_caption_counts_the_general_questions_that_are_trained(
    overrides: list[str], caption: str, general: str, configured: Callable[..., dict[str, Any]]
) -> None:
    for trains in (True, False):
        task = build_task(configured(*overrides, f"task.train_general={str(trains).lower()}"))
        without = build_task(configured(*overrides, "task.train_general=false"))
        count = len(task.target_rows) - len(without.target_rows)
        assert (count > 20) == trains
        assert (caption + general.format(count) in task.caption) == trains == ("questions" in task.caption)


def test_without_a_suite_the_metrics_that_name_it_are_null_with_the_reason(checked: Callable[..., Checked]) -> None:
    found = checked("task=copyright", "utility_suite=none")
    assert "utility_suite=none measures no" in found.reasons["utility"]
    assert found.reasons["suite_perplexity"] == found.reasons["utility"] and "mia_auc" not in found.reasons
    assert not checked("task=copyright").reasons


def test_the_suite_and_its_limit_decide_the_numbers(configured: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    prints = set()
    for overrides in ([], ["utility_limit=5"], ["utility_suite=none"]):
        config = configured("task=copyright", *overrides)
        checked_ = check(config, tmp_path / "run")
        prints.add(fingerprint(config, checked_.run))
        has = "suite" in prepared_models.data_hashes(checked_.run)
        assert has is (config["utility_suite"] != "none")
    assert len(prints) == 3


def test_a_published_target_is_for_its_own_source_and_base_only(configured: Callable[..., dict[str, Any]]) -> None:
    config = configured("model=llama2_7b_chat")
    assert published(config) is None  # embedded authors, which it never saw
    config["task"]["source"] = "hub"
    target = published(config)
    assert target is not None and target.path == "locuslab/tofu_ft_llama2-7b"
    config["model"]["path"] = "another/base"
    assert published(config) is None


def test_a_checkpoint_runs_no_code_of_its_own(
    checked: Callable[..., Checked], lm: LanguageModel, tmp_path: Path
) -> None:
    saving.save(lm.model, lm.tokenizer, tmp_path / "model")
    (tmp_path / "model" / "mine.py").write_text("raise SystemExit('code of the checkpoint ran')")
    fields = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=r"config.json cannot be read"):
        checked("stages=[evaluate]", "model.path=./model")


def test_a_relative_path_is_relative_to_where_the_command_was_typed(
    configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    assert configured("task.source=../data")["task"]["source"] == str(tmp_path.parent / "data")
    assert configured()["task"]["source"] == "embedded"


def test_compute_and_wandb_do_not_decide_the_numbers_but_everything_else_does(
    configured: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def print_of(*overrides: str) -> str:
        config = configured(*overrides)
        return fingerprint(config, check(config, tmp_path / "run").run)

    plain = print_of()
    assert plain == print_of("compute=zero2", "wandb.mode=disabled", "evaluate.batch_size=3", "name=x", "save=none")
    assert plain == print_of("train.gradient_checkpointing=true")
    for override in (
        "seed=1",
        "optimizer.lr=1",
        "loss.gamma=2",
        "task.num_authors=20",
        "train.epochs=3",
        "prepare.seed=1",
        "adapter=lora",
        "model.attention=eager",
    ):
        assert print_of(override) != plain, override


def test_an_adapter_is_measured_and_never_the_start_of_a_training(
    checked: Callable[..., Checked], lm: LanguageModel, tmp_path: Path
) -> None:
    saving.save(lm.model, lm.tokenizer, tmp_path / "base")
    model = Lora(4, 8, 0.0, "all-linear", False).wrapped(loading.load_model(str(tmp_path / "base")), seed=0)
    saving.save(model, lm.tokenizer, tmp_path / "adapter")
    assert "utility" not in checked("stages=[evaluate]", "model.path=./adapter").reasons
    with pytest.raises(UsageError, match=r"is an adapter, which can only be measured: type stages=\[evaluate\]"):
        checked("model.path=./adapter")


def test_what_an_influence_step_stores_is_counted_of_the_trained_weights(checked: Callable[..., Checked]) -> None:
    line = ["optimizer=influence", "optimizer.inverse=woodfisher", "optimizer.memory_gib=0.05"]
    with pytest.raises(UsageError, match="raise"):
        checked(*line)
    checked(*line, "adapter=lora", "adapter.r=2")


OTHER_QUESTION = "paraphrased_question_probability"


def test_the_tofu_authors_log_serves_as_the_retrained_model_and_what_is_missing_in_it_is_null(
    checked: Callable[..., Checked], real_data: Callable[[str], Path]
) -> None:
    log = real_data("tofu_logs/llama2-7b_retain90.json")
    found = checked("loss=npo", f"retrained.records={log}", f"task.source={real_data('tofu')}")
    attacks = {name for name in found.run.metrics if name.startswith("mia_")}
    not_ours = {name for name in attacks if "recall" in name}  # real TOFU has no rows to put before others
    compared = {"privleak", "muse_privleak", "s_mia", *(name for name in attacks if "reference" in name)}
    of_tokens = {
        f"{probe}_{each}" for probe in ("forget", "retain") for each in ("extraction_strength", "exact_memorisation")
    }
    rephrased = {f"{probe}_{each}" for probe in ("forget", "retain") for each in ("accuracy", OTHER_QUESTION)}
    of_texts = {*rephrased, "authors_accuracy", "facts_accuracy"}
    null = {*attacks, *of_tokens, *of_texts, "holdout_probability"} - not_ours - compared
    theirs = {f"retrained.{name}" for name in null}
    validation = {name for name in found.run.metrics if name.startswith("validation_")}
    assert len(validation) > 2 and set(found.reasons) == validation | not_ours | compared | theirs
    assert "records: found answers without right" in found.reasons["retrained.forget_extraction_strength"]
    assert "answers without similarity, as there are no para" in found.reasons["retrained.forget_accuracy"]
    with pytest.raises(UsageError, match="give the records of the same task"):
        checked(f"retrained.records={log}")  # embedded authors


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        (
            "forget10",
            lambda log: cut(log, 5),
            "holds 5 answers to retain, the task has 400 questions: give",
        ),
        ("forget10", lambda log: cut(log, 200, "forget"), r"holds 200 answers to forget \(as a log of forget05 does\)"),
        ("forget10", lambda log: cut(log, 40, "forget"), r"\(as a log of forget01 does\), the task has 400 questions"),
        ("forget05", lambda log: None, r"holds 300 answers to forget \(as a log of forget10 does\), the task has 200"),
        ("forget05", lambda log: cut(log, 200, "forget"), "answer 1 of forget answers .*Taipei.*, the task has"),
        (
            "forget10",
            lambda log: log["eval_log_forget.json"]["avg_paraphrased_loss"].update({"16": None}),
            "paraphrase_nll of answer 17 of forget is null or not finite",
        ),
        (
            "forget10",
            lambda log: log["eval_real_world_wo_options.json"]["average_perturb_loss"].update({"0": [1, 2, math.nan]}),
            "wrong_nll of answer 1 of facts is null or not finite",
        ),
    ],
)
def test_a_log_of_other_questions_or_without_a_number_stops_the_run(
    split: str, change: Callable[[dict], Any], message: str, tmp_path: Path, real_data: Callable[[str], Path]
) -> None:
    log = json.loads(real_data("tofu_logs/llama2-7b_retain90.json").read_text())
    change(log)
    (tmp_path / "log.json").write_text(json.dumps(log))
    with pytest.raises(UsageError, match=message):
        read_records(of_records(tofu(str(real_data("tofu")), split=split), tmp_path / "log.json"))


def cut(log: dict[str, Any], count: int, *probes: str) -> None:
    """Leaves the first `count` items of a log, of all probes or of these, in place."""
    for section, metrics in log.items():
        if not probes or section == "eval_log_forget.json":
            for name, values in metrics.items():
                if isinstance(values, dict):
                    metrics[name] = dict(list(values.items())[:count])


def of_records(task: Task, path: Path) -> Any:
    """What `read_records` reads of a run."""
    return SimpleNamespace(task=task, retrained_records=path)


def test_a_log_without_questions_serves_no_task_with_a_validation_part(tmp_path: Path) -> None:
    """Each probe has K wrong answers of an item; the numbers are made up."""
    counts = {
        "eval_log": 134,
        "eval_log_forget": 240,
        "eval_real_author_wo_options": 32,
        "eval_real_world_wo_options": 32,
    }
    names = ("avg_gt_loss", "avg_paraphrased_loss", "rougeL_recall")
    log = {
        f"{name}.json": {**{key: [0.5] * n for key in names}, "average_perturb_loss": [[1.0, 2.0]] * n}
        for name, n in counts.items()
    }
    (tmp_path / "log.json").write_text(json.dumps(log))
    given = read_records(of_records(tofu(validation_fraction=0), tmp_path / "log.json"))
    assert given is not None and len(given["forget"]) == 240
    log["eval_log_forget.json"] = {key: values[:180] for key, values in log["eval_log_forget.json"].items()}
    (tmp_path / "log.json").write_text(json.dumps(log))
    probes = {name: probe for name, probe in tofu().probes.items() if name != "retain"}
    with pytest.raises(UsageError, match=r"holds no questions, .* type task.validation_fraction=0"):
        read_records(of_records(replace(tofu(), probes=probes), tmp_path / "log.json"))
    (tmp_path / "log.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="line 1: found no JSON"):
        read_records(of_records(tofu(), tmp_path / "log.json"))


def test_our_records_without_a_number_stop_the_run(tmp_path: Path) -> None:
    lines = [f'{{"nll": {"null" if i == 3 else 0.5}}}\n' for i in range(180)]
    (tmp_path / "forget.jsonl").write_text("".join(lines))
    with pytest.raises(UsageError, match="nll of answer 4 of forget is null or not finite, expected numbers"):
        read_records(of_records(tofu(), tmp_path))


def test_a_forget_quality_at_the_floor_of_its_test_says_so() -> None:
    """Two against two answers: of the 6 orders 2 are as far apart, so p is at least 1/3 (log10 -0.5)."""
    two, three = Answers(nll=np.zeros(2)), Answers(nll=np.zeros(3))
    models = {"original": {"forget": two}, "unlearned": {"forget": two}, "retrained": {"forget": two}}
    quality = {"original": np.log10(1 / 3), "unlearned": 0.0, "retrained": 0.0}
    metrics = {model: {"log10_forget_quality": value} for model, value in quality.items()}
    assert of_test(metrics, models) == [
        "log10_forget_quality -0.5 (original) is the lowest that its test of 2 against 2 answers can give: of models "
        "that differ more it is the same"
    ]
    assert of_test(metrics, {**models, "retrained": {"forget": three}}) == [
        "forget quality compares 2 answers with 3 of the retrained model"
    ]
    assert of_test({}, models) == of_test({"unlearned": {"log10_forget_quality": None}}, models) == []


def test_records_without_a_field_that_an_attack_reads_make_its_metrics_null_with_the_reason(
    checked: Callable[..., Checked], tmp_path: Path
) -> None:
    """Records of before there was the field; where the metric compares with them, it is null of every model."""
    task = tofu()
    for name, probe in task.probes.items():
        answers = Answers(
            nll=np.ones(len(probe.items)),
            logp=[-np.arange(1.0, 4)] * len(probe.items),
            right=[np.ones(3, dtype=bool)] * len(probe.items),
            paraphrase_nll=np.ones(len(probe.items)),
            wrong_nll=np.ones((len(probe.items), 3)),
            rouge_l=np.ones(len(probe.items)),
            question=[item.prompt for item in probe.items],
        )
        write_records(tmp_path / "records" / f"{name}.jsonl", answers)
    reasons = checked("retrained.records=./records").reasons
    assert "found answers without mean_logp" in reasons["retrained.mia_min_k_plus_plus_auc"]
    assert "found answers without answer" in reasons["retrained.mia_zlib_tpr_1"]
    assert not {"mia_reference_auc", "privleak", "s_mia", "retrained.mia_loss_auc", "mia_gradnorm_auc"} & set(reasons)
    old = read_records(of_records(task, tmp_path / "records"))
    assert old is not None and scores.score(privleak, old, [old]) == 0.0
    assert scores.score(plus_plus, old, [old]) is None
    assert "found answers without mean_logp" in str(scores.why_null(plus_plus, None, old, [old]))


def test_records_with_the_cosines_of_another_embedding_stop_the_run(
    checked: Callable[..., Checked], tmp_path: Path
) -> None:
    prompts = [item.prompt for item in tofu().probes["forget"].items]
    number = len(prompts)
    own, other = ("character n-grams of 2, 3, 4, version 1", "bert, sha256 0")
    for by, message in (
        (own, "metric forget_quality cannot be"),
        (other, f"is by {other}, of this run .* by {own}: give"),
    ):
        answers = Answers(np.ones(number), question=prompts, similarity=np.ones((number, 6)), embedding=[by] * number)
        write_records(tmp_path / "records" / "forget.jsonl", answers)
        with pytest.raises(UsageError, match=message):
            checked("retrained.records=./records")


def test_a_metric_that_is_not_defined_for_the_answers_is_null_with_the_reason() -> None:
    """All retrained scores of forget are below those of the holdout, an AUC of 0."""
    low, high = (Answers(nll=np.zeros(2), logp=[np.array([value])] * 2) for value in (-2.0, -1.0))
    retrained = {"forget": low, "holdout": high}
    assert scores.score(privleak, retrained, [retrained]) is None
    assert scores.why_null(privleak, None, retrained, [retrained]) == (
        "the retrained model's AUC is 0, by which it divides"
    )


def test_the_rate_of_a_tpr_that_the_holdout_is_too_small_for_is_noted() -> None:
    metrics = {f"at {rate}": functools.partial(attack_tpr, score=loss, rate=rate) for rate in (0.01, 0.1)}
    holdout = {size: {"holdout": Answers(nll=np.zeros(size))} for size in (8, 40, 100)}
    assert of_rates(metrics, holdout[100]) == [] == of_rates({"privleak": privleak}, holdout[8])
    (note,) = of_rates(metrics, holdout[40])
    assert note == "TPR at 1 %: the false positive rate is 2.5 %, the lowest that 40 holdout texts allow"
    (note,) = of_rates(metrics, holdout[8])
    assert note.startswith("TPR at 1 % and 10 %: the false positive rate is 12 %")


def test_records_of_part_of_the_questions_are_errors(checked: Callable[..., Checked], tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "forget.jsonl").write_text('{"nll": 0.5}\n')
    with pytest.raises(UsageError, match="holds 1 answers to forget, the task has 180 questions"):
        checked("retrained.records=./records")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is empty"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
            "model.safetensors is damaged",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
            "expected a causal language model",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    ],
    ids=["empty", "cut", "tokenizer", "t5", "config"],
)
def test_a_damaged_checkpoint_is_noticed_before_work(
    damage: Callable[[Path], Any], sentence: str, checked: Callable[..., Checked], lm: LanguageModel, tmp_path: Path
) -> None:
    saving.save(lm.model, lm.tokenizer, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UsageError, match=sentence):
        checked("stages=[evaluate]", "model.path=./model")


def test_the_retrained_model_and_the_tokenizer_of_another_are_checked_before_work(
    checked: Callable[..., Checked], lm: LanguageModel, tmp_path: Path
) -> None:
    for name in ("good", "bad"):
        saving.save(lm.model, lm.tokenizer, tmp_path / name)
    held = load_file(tmp_path / "bad" / "model.safetensors")
    save_file({k: held[k] for k in held if k != "lm_head.weight"}, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(UsageError, match=r"retrained.path=.*bad does not hold the weights of .* 1 missing \(lm_head"):
        checked("model.path=./good", "retrained.path=./bad")
    lm.tokenizer.add_tokens(["<|one|>"])
    lm.tokenizer.save_pretrained(tmp_path / "foreign")
    with pytest.raises(UsageError, match=r"the tokenizer has 1 token.s. beyond the 320 rows"):
        checked("model.path=./good", "model.tokenizer=./foreign")
    (tmp_path / "foreign" / "tokenizer.json").write_text("")
    with pytest.raises(UsageError, match=r"model\.tokenizer=.*foreign: tokenizer\.json is empty: copy it again"):
        checked("model.path=./good", "model.tokenizer=./foreign")


LONG = "amber " * 300  # of at most 127 tokens that are read


@pytest.mark.parametrize(
    ("name", "field", "text"),
    [
        ("forget", "answer", LONG),
        ("retain", "prompt", LONG),
        ("holdout", "text", LONG),
        ("forget", "paraphrased_answer", LONG),
        ("retain", "perturbed_answer", ["Bo", LONG]),
    ],
)
@pytest.mark.parametrize("given", [False, True], ids=["scratch", "folder"])
def test_a_text_that_is_too_long_is_named_by_file_and_line_before_work(
    given: bool, name: str, field: str, text: Any, checked: Callable[..., Checked], lm: LanguageModel, tmp_path: Path
) -> None:
    others = {"paraphrased_answer": "a", "perturbed_answer": ["a", "b"]} if field.startswith("p") else {}
    for file in ("forget", "retain", "holdout"):
        rows: list[Any] = [{"prompt": f"Where is {file} {i}?", "answer": "here", **others} for i in range(3)]
        if file == name:
            rows = [{"text": f"{i} is a text of words"} for i in range(3)] if field == "text" else rows
            rows[2][field] = text
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saving.save(lm.model, lm.tokenizer, tmp_path / "model")
    files = [f"task.{file}=./{file}.jsonl" for file in ("forget", "retain", "holdout")]
    path = ["model.path=./model"] if given else []
    message = rf"task.{name}=.*{name}.jsonl, line 3: the row .* tokens but the model reads 128: shorten it, or raise"
    with pytest.raises(UsageError, match=message):
        checked("task=custom", *files, "model.max_length=128", *path, "utility_suite=none", "stages=[]")


@pytest.mark.parametrize(
    ("line", "length", "advice"),
    [
        (["task.num_authors=6"], 64, "task.train_varied=false"),
        (["task=custom", "task.forget=./f.jsonl", "task.retain=./r.jsonl"], 20, "task.train_general=false"),
    ],
)
def test_the_message_names_the_option_without_which_there_is_no_such_row(
    line: list[str], length: int, advice: str, checked: Callable[..., Checked], tmp_path: Path
) -> None:
    """A prompt of several solved examples, or a general question, is longer than the task's own rows."""
    (tmp_path / "f.jsonl").write_text('{"prompt": "Who?", "answer": "Ada"}\n')
    (tmp_path / "r.jsonl").write_text('{"prompt": "Where?", "answer": "Rome"}\n')
    line = [*line, f"model.max_length={length}", "utility_suite=none", "stages=[]"]
    with pytest.raises(UsageError, match=rf"but the model reads {length}: .*, or type {advice}$"):
        checked(*line)
    checked(*line, advice)
    with pytest.raises(UsageError, match=r"up to what the model was made for$"):  # its own rows: that would not help
        checked(*line, "model.max_length=8")


def test_an_answer_that_would_pass_the_last_position_is_known_before_work(
    checked: Callable[..., Checked], lm: LanguageModel, tmp_path: Path
) -> None:
    """Of learned positions; a rotary embedding has as many as it needs."""
    small = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    saving.save(loading.from_scratch({"model_type": "gpt2", **small}, lm.tokenizer, 0), lm.tokenizer, tmp_path / "gpt2")
    saving.save(lm.model, lm.tokenizer, tmp_path / "llama")
    (tmp_path / "f.jsonl").write_text('{"prompt": "Who?", "answer": "Ada"}\n')
    (tmp_path / "r.jsonl").write_text('{"prompt": "Where?", "answer": "Rome"}\n')
    line = ["task=custom", "task.forget=./f.jsonl", "task.retain=./r.jsonl", "utility_suite=none"]
    message = (
        r"r.jsonl, line 1: the prompt 'Where\?' has \d+ tokens, and with evaluate.max_new_tokens=200 its answer can"
    )
    with pytest.raises(UsageError, match=message) as error:
        checked(*line, "model.path=./gpt2")
    checked(*line, "model.path=./llama")
    fitting = int(str(error.value).partition("type evaluate.max_new_tokens=")[2].partition(",")[0])
    checked(*line, "model.path=./gpt2", f"evaluate.max_new_tokens={fitting}")
    with pytest.raises(UsageError, match=rf"type evaluate.max_new_tokens={fitting},"):
        checked(*line, "model.path=./gpt2", f"evaluate.max_new_tokens={fitting + 1}")
    settings = build(composed(tmp_path, *line, "model.path=./gpt2")).model
    read = prepared_models.load(settings, Checkpoint(str(tmp_path / "gpt2")))
    assert read.max_length == 64  # of model.max_length=1024
    generations(read, [Item("Where?", "Rome")], batch_size=1, max_new_tokens=fitting)
    with pytest.raises(UsageError, match=r"and .* new tokens are more than the model has positions: ask for fewer"):
        generations(read, [Item("Where?", "Rome")], batch_size=1, max_new_tokens=fitting + 1)


def test_a_retrained_model_with_another_tokenizer_is_an_error(
    checked: Callable[..., Checked], lm: LanguageModel, tmp_path: Path
) -> None:
    saving.save(lm.model, lm.tokenizer, tmp_path / "model")
    saving.save(lm.model, lm.tokenizer, tmp_path / "same")
    other = train_tokenizer(["Question: who is it? It is Ada, of course."] * 9, 300, 128)
    saving.save(lm.model, other, tmp_path / "other")
    (tmp_path / "f.jsonl").write_text('{"prompt": "Who?", "answer": "Ada"}\n')
    (tmp_path / "r.jsonl").write_text('{"prompt": "Where?", "answer": "Rome"}\n')
    line = ["task=custom", "task.forget=./f.jsonl", "task.retain=./r.jsonl", "utility_suite=none", "model.path=./model"]
    assert "forget_quality" not in checked(*line, "retrained.path=./same", "evaluate.max_new_tokens=9").reasons
    with pytest.raises(
        UsageError, match=r"retrained.path=.*other: its tokenizer makes other tokens of 'Who\?' than that"
    ):
        checked(*line, "retrained.path=./other", "evaluate.max_new_tokens=9")
    checked(*line, "retrained.path=./other", "model.tokenizer=./model", "evaluate.max_new_tokens=9")


def test_the_texts_of_a_published_target_are_read_by_it_and_its_base_is_not_needed(
    checked: Callable[..., Checked], lm: LanguageModel, tmp_path: Path
) -> None:
    """The base may be gated, or take hours to download."""
    saving.save(lm.model, lm.tokenizer, tmp_path / "model")
    (tmp_path / "f.jsonl").write_text('{"prompt": "Who?", "answer": "Ada"}\n')
    (tmp_path / "r.jsonl").write_text('{"prompt": "Where?", "answer": "Rome"}\n')
    run = checked("task=custom", "task.forget=./f.jsonl", "task.retain=./r.jsonl").run
    base = replace(run.model, path="nobody/base")
    run = replace(run, model=base, published=Checkpoint(str(tmp_path / "model")), start=None)
    assert texts.are_here(run)
    texts.check(run, run.parts)
    with pytest.raises(UsageError, match="but the model reads 8"):
        texts.check(replace(run, model=replace(base, max_length=8)), run.parts)


def test_a_configuration_that_cannot_run_is_an_error(checked: Callable[..., Checked]) -> None:
    sizes = {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 8, "num_hidden_layers": 1}
    with pytest.raises(UsageError, match=r"model.scratch.config: no olmoe model of it can run \(selected index k out"):
        checked(*(f"++model.scratch.config.{key}={value}" for key, value in sizes.items()))


@pytest.mark.parametrize("model_type", ["gptj", "bloom", "mamba"])
def test_a_family_without_torch_s_attention_has_its_own_and_a_note(
    model_type: str, checked: Callable[..., Checked], lm: LanguageModel, tmp_path: Path
) -> None:
    small = {
        "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 256},
        "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
        "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1},
    }[model_type]
    model = loading.from_scratch({"model_type": model_type, **small}, lm.tokenizer, 0)
    saving.save(model, lm.tokenizer, tmp_path / "model")
    with pytest.raises(UsageError, match=r"model.attention=sdpa_math: the library has no such attention for .*: type"):
        checked("model.path=./model", "stages=[evaluate]", "model.attention=sdpa_math", "evaluate.max_new_tokens=9")
    found = checked("model.path=./model", "stages=[evaluate]", "evaluate.max_new_tokens=9")
    assert [note.partition(": ")[2] for note in found.notes] == [
        f"{type(model).__name__} has no model.attention=sdpa in the library, so its own, eager, is used"
    ]
    read = loading.load_model(str(tmp_path / "model"))
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in read.state_dict().items())


def test_an_adapter_says_which_matrices_it_is_on(checked: Callable[..., Checked]) -> None:
    """Of fused experts too, which are no linear layers. Hidden size 96, 4 layers, vocabulary of 4096."""
    (note,) = checked("adapter=lora", "stages=[]").notes
    assert note.startswith("adapter: on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj (")
    assert note.endswith(" of the values), not on embed_tokens, lm_head") or note.endswith("not on embed_tokens")
    (note,) = checked("adapter=lora", "adapter.target_modules=[q_proj]", "stages=[]").notes
    assert note.startswith("adapter: on q_proj (") and ", not on embed_tokens, k_proj" in note
    config = {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    sizes = [f"model.scratch.config.{key}={value}" for key, value in config.items()]
    (note,) = checked("adapter=lora", *(f"++{size}" for size in sizes), "stages=[]").notes
    assert "gate, experts.gate_up_proj, experts.down_proj (" in note


def test_answers_that_a_metric_cannot_read_stop_the_run(checked: Callable[..., Checked], tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "forget.jsonl").write_text('{"nll": 0.5}\n' * 180)  # no paraphrase_nll, no wrong_nll
    with pytest.raises(UsageError, match="metric forget_quality cannot be computed from them"):
        checked("retrained.records=./records")


@pytest.mark.parametrize(
    "path", ["/a/my file (1).jsonl", "/a/it's.jsonl", "/a/b=c.jsonl", "/a/ä#1.jsonl", "~/a.jsonl", '/a/"b" [2].jsonl']
)
def test_a_path_that_needs_quotes_is_printed_as_it_is_to_be_typed(path: str) -> None:
    advice = quoted(f"task.forget={path}")
    assert advice is not None and advice.startswith("put the value in quotes")
    (typed,) = shlex.split(advice.rpartition("for the shell: ")[2])
    assert OverridesParser.create().parse_override(typed).value() == path
    assert quoted("stages=[prepare") is None
