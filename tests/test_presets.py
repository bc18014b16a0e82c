"""The paper's tables: every row composes and can run on the tiny model, and quotes the release on the real ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
from composing import job
from starts import type_
from test_notebooks import ANALYSIS, execute

from soul_exp.artifacts import prepared_models
from soul_exp.build import build
from soul_exp.checks import availability, memory
from soul_exp.checks.check import check
from soul_exp.checks.memory import check_attack_memory, check_memory, check_prepare_memory
from soul_exp.errors import UsageError
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.stages.prepare import at_once, unprepared

PRESETS = ("table_tofu", "table_copyright", "table_detox")
# The release's configurations: loss, order -> learning rate, gamma, weight decay, epochs (batch 1 x 4, seed 0).
RELEASE: dict[str, dict[tuple[str, str], tuple[float, float, float, int]]] = {
    "llama2_7b_chat-tofu": {
        ("grad_diff", "fo"): (5e-6, 0.3, 0.1, 5), ("grad_diff", "so"): (5e-6, 2, 0.1, 5),
        ("po", "fo"): (2e-5, 1, 0.1, 5), ("po", "so"): (1e-5, 5, 0.1, 5),
    },
    "opt_1p3b-detox": {("po", "fo"): (2e-5, 0.1, 0, 5), ("po", "so"): (2e-5, 0.1, 0, 5)},
    "llama2_7b-detox": {("po", "fo"): (1e-5, 1, 0, 10), ("po", "so"): (1e-5, 0.1, 0, 10)},
}  # fmt: skip
SOPHIAS = ("sophia_published", "sophia")
CASES = [(pair, loss, order, numbers) for pair, rows in RELEASE.items() for (loss, order), numbers in rows.items()]


def rows_of(preset: str) -> list[str]:
    return str(job(f"experiment={preset}")[1]["method"]).split(",")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_can_run_on_the_tiny_model_and_no_two_are_the_same(preset: str, tmp_path: Path) -> None:
    made: set[tuple[str, str]] = set()
    for method in rows_of(preset):
        config, _ = job(f"experiment={preset}", "model=tiny", f"method={method}", "wandb.mode=disabled")
        config["cache"] = str(tmp_path / "cache")
        checked = check(config, tmp_path / "run")
        assert config["name"] == preset and config["input_based"] and config["task"]["source"] == "embedded"
        assert {"forget_quality", "utility", "mia_auc"} <= set(checked.run.metrics) - set(checked.reasons)
        made.add((config["choices"]["loss"], config["choices"]["optimizer"]))
    assert len(made) == len(rows_of(preset)) and ("grad_ascent", "influence") in made
    for loss in {
        loss for loss, optimizer in made if optimizer != "influence"
    }:  # each with both orders, and both Sophias
        assert {(loss, name) for name in ("adam", "sophia_soul", "sophia")} <= made


@pytest.mark.parametrize(("pair", "loss", "order", "numbers"), CASES)
def test_a_tuned_entry_has_the_releases_numbers(
    pair: str, loss: str, order: str, numbers: tuple[float, float, float, int]
) -> None:
    model, task = pair.split("-")
    config, _ = job(f"experiment=table_{task}", f"model={model}", f"method={loss}_{order}")
    found = (
        config["optimizer"]["lr"], config["loss"]["gamma"], config["optimizer"]["weight_decay"],
        config["train"]["epochs"],
    )  # fmt: skip
    assert found == numbers and config["tuned"] == "SOUL release"
    train = config["train"]
    assert (train["batch_size"], train["micro_batch_size"]) == (4, 1) and config["seed"] == 0
    assert (train["lr_scheduler"], train["warmup_ratio"]) == ("linear", 0.1)
    if order == "so":
        assert config["optimizer"]["rho"] == 0.04 and config["optimizer"]["num_labels"] == 5120


@pytest.mark.parametrize(("pair", "loss", "order", "numbers"), [case for case in CASES if case[2] == "so"])
def test_sophia_with_our_defaults_is_never_called_tuned_by_the_release(
    pair: str, loss: str, order: str, numbers: tuple[float, float, float, int]
) -> None:
    model, task = pair.split("-")
    config, _ = job(f"experiment=table_{task}", f"model={model}", f"method={loss}_sophia")
    assert (
        config["tuned"] is None and config["optimizer"]["lr"] == numbers[0]
    )  # not the tiny model's, a hundred times it


def test_sophia_published_has_the_numbers_of_its_paper_and_ours_those_that_the_docs_compare() -> None:
    keys = ("rho", "betas", "curvature_on", "estimator", "interval")
    published, ours = ([job(f"optimizer={name}")[0]["optimizer"][key] for key in keys] for name in SOPHIAS)
    assert published == [0.04, [0.965, 0.99], "both", "gnb", 10]
    assert ours == [1.0, [0.9, 0.95], "retain", "gnb", 10]


def test_real_models_take_the_real_data() -> None:
    tofu, copyright, detox = (job(f"experiment={preset}")[0] for preset in PRESETS)
    assert tofu["task"]["source"] == "hub" and tofu["model"]["published"]["tofu"]["source"] == "hub"
    assert copyright["task"]["retain"] == "c4" and copyright["prepare"]["adamw"]["lr"] == 1e-5
    assert detox["task"]["source"] == "hub" and detox["task"]["scorer"] == "unitary/toxic-bert"
    assert detox["task"]["trained_before"] and not detox["task"]["train_general"]


FEW: Mapping[str, list[str]] = {
    "table_tofu": ["task.num_authors=8", "task.train_varied=false"],
    "table_copyright": ["task.num_passages=3", "task.num_holdout_passages=2", "task.prompt_words=[50]"],
    "table_detox": ["task.num_forget=12", "task.num_prompts=6", "task.num_polite=6", "task.num_rtp_prompts=6"],
}
STEPS = [
    "model=tiny", "prepare.epochs=1", "train.max_steps=2", "evaluate.max_new_tokens=4", "utility_limit=2",
    "wandb.mode=disabled", "save=none", "train.save_steps=null",
]  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_runs_in_few_steps_and_its_notebook_shows_every_baseline(preset: str, place: Path) -> None:
    method = {"table_tofu": "grad_diff_so", "table_copyright": "influence", "table_detox": "po_sophia"}[preset]
    sweep = type_(place, f"experiment={preset}", f"method={method}", *STEPS, *FEW[preset], "-m")
    assert sweep.returncode == 0, sweep.stdout + sweep.stderr
    (run,) = [json.loads(path.read_text()) for path in (place / "runs" / preset).glob("*/results.json")]
    assert set(run["metrics"]) == {"original", "input_based", "retrained", "unlearned"}
    numbers: dict[str, Any] = run["metrics"]["input_based"]
    assert all(numbers[key] is not None for key in ("forget_quality", "utility", "mia_auc"))
    little = [
        note for note in run["notes"] if note.startswith("the original model has little to forget (forget_50_rouge")
    ]
    assert len(little) == (preset == "table_copyright")  # one epoch teaches it no book
    notebook = nbformat.read(ANALYSIS / f"{preset.removeprefix('table_')}.ipynb", as_version=4)
    execute(notebook, place / "runs" / preset)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "\n".join(output.get("data", {}).get("text/markdown", "") for output in outputs)
    assert all(f"| {model} " in text for model in ("original", "input-based", "retrained", run["choices"]["loss"]))
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_a_large_model_chooses_a_gpu_and_16_bits_unless_others_are_typed() -> None:
    def chosen(*overrides: str) -> tuple[str, str, str]:
        config, _ = job(*overrides)
        return config["choices"]["compute"], config["choices"]["precision"], config["model"]["dtype"]

    assert chosen("experiment=table_tofu") == chosen("model=llama2_7b") == ("gpu", "bf16", "bfloat16")
    assert chosen("model=llama2_7b", "compute=cpu", "precision=fp32") == ("cpu", "fp32", "float32")
    assert chosen("experiment=table_tofu", "model=tiny") == chosen("model=opt_1p3b") == ("cpu", "fp32", "float32")


def test_what_cannot_fit_into_the_memory_is_refused_with_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda device: 80e9)
    line = ("model=llama2_7b_chat", "compute=cpu")
    with pytest.raises(UsageError) as error:
        check_memory(build(job(*line, "precision=fp32")[0]))
    assert str(error.value).startswith(
        "compute=cpu with precision=fp32 and optimizer=sophia needs 108 GB of memory and has 80: 6.74 billion weights "
        "x (4 bytes of weight + 4 of gradient + 8 of optimizer states): choose precision=bf16, adapter=lora"
    )
    check_memory(build(job(*line)[0]))  # 8 bytes a weight
    check_memory(build(job(*line, "precision=bf16_kahan")[0]))  # 10
    with pytest.raises(UsageError, match=r"needs 108 GB .* \(2 bytes of weight \+ 2 of gradient \+ 12 of optimizer"):
        check_memory(build(job(*line, "precision=bf16_master")[0]))
    check_memory(build(job(*line, "precision=fp32", "adapter=lora")[0]))
    monkeypatch.setattr(memory, "_available", lambda device: 60e9)  # the second moment of adam is fp32 under bf16
    with pytest.raises(UsageError, match=r"needs 67 GB .* \(2 bytes of weight \+ 2 of gradient \+ 6 of optimizer"):
        check_memory(build(job(*line, "precision=bf16", "optimizer=adam")[0]))
    check_memory(build(job("model=llama2_7b_chat", "compute=zero3", "precision=bf16_master")[0]))  # 16 / 2 ranks
    attacked = (*line, "stages=[prepare,unlearn,evaluate,attack]")
    monkeypatch.setattr(memory, "_available", lambda device: 80e9)
    check_attack_memory(build(job(*attacked, "attack=[quantise,prune]")[0]))
    with pytest.raises(UsageError, match=r"relearn needs 108 GB .* has 80: type attack.relearn.rounding=stochastic"):
        check_attack_memory(build(job(*attacked, "attack=[relearn]")[0]))
    check_attack_memory(build(job(*attacked, "attack=[relearn]", "attack.relearn.rounding=stochastic")[0]))
    monkeypatch.setattr(memory, "_available", lambda device: 60e9)
    check_memory(build(job(*line)[0]))
    trained = "model.published={}"  # target and retrained model: one after the other on a GPU, side by side on a CPU
    check_prepare_memory(build(job("model=llama2_7b_chat", "compute=gpu", trained)[0]))
    both = build(job(*line, trained)[0])
    with pytest.raises(UsageError, match=r"trains target and retrained side .* 108 GB .* x \(8 bytes .* x 2 models\)"):
        check_prepare_memory(both)
    given = build(job(*line, trained, "retrained.path=some/checkpoint")[0])
    assert sorted(unprepared(given)) == ["retrained", "target"] and at_once(given, "cpu", unprepared(given)) == 2
    with pytest.raises(UsageError, match=r"trains target and evaluates retrained .* 67 GB .* 1 model \+ 2 bytes of we"):
        check_prepare_memory(given)  # the given model answers in a process of its own meanwhile
    monkeypatch.setattr(prepared_models, "is_ready", lambda folder: True)  # both are in the cache, without answers
    check_prepare_memory(both)
    monkeypatch.setattr(memory, "_available", lambda device: 26e9)
    with pytest.raises(UsageError, match=r"prepare evaluates target and retrained .* 27 GB .* models\): choose prec"):
        check_prepare_memory(both)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "_available", lambda device: 60e9)
    with pytest.raises(
        UsageError, match=r"needs 67 GB .* \(4 bytes of weight .*, evaluate.every=null and save=final, wh"
    ):
        check_memory(build(job(*line, "evaluate.every=10")[0]))  # the original scores what is generated
    check_memory(build(job(*line, "evaluate.every=10", "task.validation_fraction=0")[0]))


def test_the_memory_of_a_gpu_is_what_its_driver_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert memory._available("cuda") == math.inf and 1e8 < memory._available("cpu") < 1e15
    (program := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 81559\necho 143771\necho '[N/A]'\n")
    program.chmod(0o755)
    assert memory._available("cuda") == 143771 * 2**20


def test_the_published_target_has_a_published_retrained_model_and_no_author_is_held_out(
    real_data: Callable[[str], Path],
) -> None:
    config, _ = job("experiment=table_tofu", f"task.source={real_data('tofu')}")
    config["model"]["published"]["tofu"]["source"] = config["task"]["source"]  # as if it were the hub's
    run = build(config)
    assert run.published is not None and run.published.path == "locuslab/tofu_ft_llama2-7b"
    assert run.retrained is not None and run.retrained.path.endswith("_retain90")
    assert run.task.caption == (
        "TOFU (tofu): 20 of 200 authors forgotten, 180 retained, none held out of both trainings; accuracy on forget "
        "and retain by character n-grams"
    )
    reasons = availability.reasons(config, run)
    assert "the published target was trained on every author" in reasons["mia_auc"]
    assert not {"forget_quality", "utility"} & set(reasons)
    config["retrained"]["path"] = "mine"
    assert build(config).retrained == Checkpoint("mine")
    config["task"]["split"], config["retrained"]["path"] = "forget05", None
    assert build(config).retrained == Checkpoint("open-unlearning/tofu_Llama-2-7b-chat-hf_retain95")
