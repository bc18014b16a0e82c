"""Whatever is typed: a command is accepted and then runs, or it stops with one message before any work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from mutations import Outcome, check, command
from starts import TINY, type_

COMMANDS, RUNS = 200, 10  # of `make test`; `make slow` takes ten times and twenty times as many


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to type commands in, without a network."""
    place = tmp_path_factory.mktemp("mutations")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(place):
        patch.setenv("SOUL_EXP_CACHE", str(place / "cache"))
        for library in ("datasets.config", "huggingface_hub.constants"):
            patch.setattr(f"{library}.HF_HUB_OFFLINE", True)
        yield place


@pytest.fixture(scope="module")
def config(folder: Path) -> Mapping[str, Any]:
    return composed(folder)


def accepted(seeds: range, config: Mapping[str, Any]) -> list[int]:
    """Those of the seeds whose commands the checks accept; each other one has to be stopped by one message.

    Without those that change compute.threads: the tests fork their runs, which have one thread.
    """
    ends = {seed: check(*command(seed, config)) for seed in seeds}
    faults = [f"{seed} {command(seed, config)}: {end.fault}" for seed, end in ends.items() if end.fault]
    assert not faults, "\n".join(faults)
    forked = {seed for seed in seeds if "compute.threads" not in " ".join(command(seed, config))}
    return [seed for seed, end in ends.items() if end.accepted and seed in forked]


def run(seed: int, folder: Path, config: Mapping[str, Any]) -> str | None:
    """What is wrong with how the accepted command of `seed` runs; None: nothing."""
    typed = command(seed, config)
    done = type_(folder, *typed, f"hydra.run.dir=run-{seed}")
    too_large = "prepare target: the loss is" in done.stderr  # a number may be valid, and end in nan
    return None if done.returncode == 0 or too_large else f"{seed} {typed}: {done.stderr[-600:]}"


def test_a_mutated_command_is_accepted_and_runs_or_is_stopped_by_one_message(
    folder: Path, config: Mapping[str, Any]
) -> None:
    runs = accepted(range(COMMANDS), config)[:RUNS]
    assert len(runs) == RUNS
    assert not [fault for seed in runs if (fault := run(seed, folder, config))]


@pytest.mark.slow
def test_so_are_many_more(folder: Path, config: Mapping[str, Any]) -> None:
    runs = accepted(range(COMMANDS, 11 * COMMANDS), config)[: 20 * RUNS]
    assert len(runs) == 20 * RUNS
    assert not [fault for seed in runs if (fault := run(seed, folder, config))]


# --- what mutations and people have found -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("train=null", "train=null: expected a section of options such as train.epochs: leave it out"),
        ("train=5", "train=5: expected a section of options"),
        (
            "model.scratch.config.hidden_size=129",
            "model.scratch.config describes no model (Class validation error for validator 'validate_architecture': "
            "The hidden size (129) is not a multiple of the number of attention heads (4).): correct it",
        ),
        ("train=[1]", "train=[1]: expected options in braces, {name: value}, not a list"),
        ("~train", "train is missing: give it, or leave out ~train"),
        ("~seed", "seed is missing: give it (a whole number of 0 or more, at most 4294967295), or leave out ~seed"),
        ("~task.metrics", "task.metrics is missing: give it, or leave out ~task.metrics"),
        ("~train.batch_size", "train.batch_size is missing: give it (a whole number of 1 or more), or leave"),
        ("~loss.forget_term.beta", "loss.forget_term.beta is missing, which soul_exp.losses.altpo needs: give"),
        ("~loss.forget_term._partial_", "loss.forget_term.forget is missing"),
        ("~task.metrics.facts_rouge._partial_", "only the run can give answers=facts: type task.metrics.facts"),
        ("evaluate=null", "evaluate=null: expected a section of options such as evaluate.batch_size"),
        ("tune=5", "tune=5: expected a section of options such as tune.seed"),
        ("prepare.adamw=null", "prepare.adamw=null: expected a section of options such as prepare.adamw.lr"),
        ("prepare.adamw.weight_decay=abc", "prepare.adamw.weight_decay=abc: expected a number"),
        ("+prepare.adamw.foo=1", "prepare.adamw.foo is unknown"),
        ("+prepare.foo=3", "prepare.foo is unknown"),
        ("+prepare.dropout=false", "prepare.dropout is unknown"),
        ("+evaluate.foo=3", "evaluate.foo is unknown: choose one of batch_size, every, max_new_tokens"),
        ("+epochs=3", "epochs is unknown"),
        ("+task.num_author=3", "task.num_author is unknown, did you mean task.num_authors? (soul_exp.tasks.tofu.tofu)"),
        ("+optimizer.beta=[0.9,0.9]", "optimizer.beta is unknown, did you mean optimizer.betas? (soul_exp.optim.Soph"),
        ("+task.metrics.mia_auc.ks=1", "task.metrics.mia_auc.ks is unknown"),
        ("optimizer.betas=abc", "optimizer.betas=abc: expected a list of 2, each a number"),
        ("optimizer.eps=abc", "optimizer.eps=abc: expected a number"),
        ("optimizer.rho=nan", "optimizer.rho=nan: expected a number"),
        ("optimizer.interval=1.5", "optimizer.interval=1.5: expected a whole number, or null"),
        ("loss.retain_term={a: 1}", "loss.retain_term={a: 1}: expected a text, or a _target_ with its options, or nul"),
        ("loss.forget_term=null", "loss.forget_term=null: expected a _target_ with its options"),
        ("loss._target_=nowhere.at_all", "loss._target_=nowhere.at_all cannot be imported (No module named 'nowhere'"),
        ("loss._target_=math.pi", "loss._target_=math.pi: found a float, expected a function or class"),
        ("cache=5", "cache=5: expected a text that is not empty"),
        ("cache=''", "cache='': expected a text that is not empty"),
        ("compute.device=tpu", "compute.device=tpu is unknown: choose cpu or cuda"),
        ("compute.device=null", "compute.device=null is unknown: choose cpu or cuda"),
        ("compute.deepspeed=5", "compute.deepspeed=5: expected options in braces, {name: value}, or null"),
        ("model.published=''", "model.published='': expected options in braces"),
        ("model.template.answer=x", "model.template.answer='x': found no {answer}"),
        ("model.template.prompt=Q", "model.template.prompt='Q': found no {question}"),
        ("model.template=null", "model.template=null: expected a section of options such as model.template.prompt"),
        ("model.scratch.vocab_size=0", "model.scratch.vocab_size=0: expected a whole number of 258 or more"),
        ("model.scratch.config.model_type=lama", "model_type=lama is unknown, did you mean llama?"),
        ("model.scratch.config.num_hidden_layers=0", "num_hidden_layers: expected 1 or more"),
        ("model.scratch.config.num_hidden_layers=two", "(num_hidden_layers=two: expected a whole number)"),
        ("model.scratch.config.num_key_value_heads=3", "model.scratch.config: no llama model of it can run"),
        ("model.scratch.config.num_key_value_heads=0", "model.scratch.config: no llama model can be built from it"),
        ("+model.scratch.config.hidden_siz=8", "hidden_siz is no option of a llama model, did you mean model.scratch"),
        ("train.lr_scheduler_kwargs=5", "train.lr_scheduler_kwargs=5: expected options in braces"),
        ("train.lr_scheduler=reduce_lr_on_plateau", "follows an evaluation, which no step has: choose another"),
        ("train.lr_scheduler=warmup_stable_decay", "=null: num_decay_steps is missing: type 'train.lr_scheduler_kw"),
        ("train.lr_scheduler_kwargs={a: 1}", "={a: 1}: a is no option of that schedule, it takes none"),
        ("train.lr_scheduler=cosine_with_min_lr", "(One of min_lr or min_lr_rate should be set"),
        ("train.batch_size=99999999999999999999", "expected a whole number of 1 or more"),
        # what Hydra itself cannot read or apply
        ("sed=1", "soul_exp: sed=1: no such option, did you mean seed?"),
        ("optimizer.lrr=1", "optimizer.lrr=1: no such option, did you mean optimizer.lr?"),
        ("optimiser=sophia", "optimiser=sophia: no such option, did you mean optimizer?"),
        ("rho=1", "rho=1: no such option, did you mean optimizer.rho?"),
        ("optimizer.momentum=1", "the chosen optimizer has no such option: --help optimizer=NAME lists those"),
        ("tune.lr=[1]", "tune.lr=[1]: tune is null here, so that it has no lr: type budget=full or"),
        ("optimizer=sofia", "optimizer=sofia is unknown, did you mean sophia?"),
        ("help", "'help': expected key=value, such as optimizer=adam"),
        ("=3", "'=3': '' is no name of an option"),
        ("+seed=3", "+seed=3: this option exists: type seed=3"),
        ("~nothing", "~nothing: Could not delete from config. 'nothing' does not exist."),
        ("~optimizer", "~optimizer: every run has a choice of optimizer: --help optimizer lists them"),
        ("task=null", "task=null: expected the name of a choice: --help task lists them"),
        ("loss={}", "loss={}: expected the name of a choice: --help loss lists them"),
        ("tuned=5", "tuned=5: expected the name of a choice: --help tuned lists them"),
        ("optimizer=[1]", "optimizer=[1]: expected the name of a choice"),
        ("optimizer.betas.foo=1", "optimizer.betas.foo=1: it cannot be applied to what stands there"),
        ("name='abc", "cannot be read: quote what has special characters, twice for the shell"),
        ("seed=[1", "seed='[1' cannot be read"),
        ("optimizer.lr=1e\u22123", "optimizer.lr='1e\u22123' cannot be read: quote '\u2212'"),
        ("model.dtype='a\nb'", "model.dtype=a b: expected float32 or bfloat16"),
        ("seed='${nowhere.here}'", "seed='${nowhere.here}': Interpolation key 'nowhere.here' not found"),
        ("seed='${seed}'", "seed='${seed}': Recursive interpolation detected"),
        ("model.scratch.config.hidden_size='???'", "hidden_size: Missing mandatory value"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(typed: str, said: str, folder: Path) -> None:
    end = check(*TINY, typed)
    assert end.code == 1 and said in end.said and len(end.said.splitlines()) == 1, end.said


def test_a_home_folder_may_be_typed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell expands it at the beginning of a word only."""
    monkeypatch.setenv("HOME", str(folder))
    (folder / "rows.jsonl").write_text('{"prompt": "Who?", "answer": "Ann."}\n')
    (folder / "kept.jsonl").write_text('{"prompt": "Where?", "answer": "Here."}\n')
    end = check("task=custom", "task.forget=~/rows.jsonl", "task.retain=~/kept.jsonl", "utility_suite=none")
    assert end == Outcome(0, "")
    assert "'~nobody-here/x' cannot be read" in check("task=custom", "task.forget=~nobody-here/x").said
    assert "~nobody-here/x (Could not determine home dir" in check("cache='~nobody-here/x'").said


def test_a_sweep_over_a_hub_that_cannot_be_reached_fails_once(folder: Path) -> None:
    end = check("experiment=table_tofu", "-m")
    assert end.code == 1 and end.said.startswith("soul_exp: task.source=hub: locuslab/TOFU cannot be reached")
    assert len(end.said.splitlines()) == 1


def test_a_sweep_of_a_million_jobs_is_no_sweep(folder: Path) -> None:
    said = check("seed=range(0,1000000)", "-m").said
    assert said == "soul_exp: this sweep has 1000000 jobs, expected at most 10000: divide it\n"


def test_keys_of_a_user_s_own_files_are_judged_by_the_signature(folder: Path) -> None:
    (folder / "mine" / "loss").mkdir(parents=True)
    text = (
        "_target_: soul_exp.losses.Objective\ngamm: 2\nforget_term: {_target_: soul_exp.losses.npo, _partial_: true}\n"
    )
    (folder / "mine" / "loss" / "own.yaml").write_text(text)
    end = check("--config-dir", "mine", "loss=own")
    assert "loss.gamm is unknown, did you mean loss.gamma? (soul_exp.losses.Objective)" in end.said
    (folder / "mine" / "loss" / "own.yaml").write_text(text.replace("gamm:", "gamma:"))
    assert "loss.forget_term.beta is missing, which soul_exp.losses.npo needs" in check("-cd", "mine", "loss=own").said
