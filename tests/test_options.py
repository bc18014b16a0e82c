"""The table of options: what it says of each option is what a run shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from starts import TINY, type_

from soul_exp import options, schema
from soul_exp.comparison import compared, differences
from soul_exp.options import Changes

PLAIN = (*TINY, "train.max_steps=4", "task.num_authors=12", "evaluate.max_new_tokens=4")
TUNED = (*PLAIN, "experiment=ablation", "budget=smoke", "tune.lr=[1]", "tune.gamma=[1,10]")
# Every option that changes nothing in a run of TUNED, with another value; all at once, in a cache of its own.
FLIPPED = {
    "name": "other",
    "overwrite": "true",
    "cache": "other_cache",
    "resume": "restart",
    "input_based": "true",
    "paper": "true",
    "tune.workers": "1",
    "utility_data": "nowhere",
    "best_keep": "0.5",
    "best_s_mia": "0.5",
    "train.gradient_checkpointing": "true",
    "evaluate.every": "1",
    "prepare.logging_steps": "1",
    "prepare.save_steps": "2",
    "wandb.mode": "offline",
    "wandb.project": "other",
    "wandb.entity": "other",
}
# The same of PLAIN, which is prepared by a command of its own: trials would need it in the same one.
DIVIDED = {
    "stages": "[unlearn,evaluate]",
    "save": "none",
    "task.system_prompt": "Say nothing.",
    "model.template.system": "{system} {question}",
}
NOT_FLIPPED = {
    "choices.*": "the names of choices: what they set is listed itself",
    "attack": "adds to the results: tests/test_attack_stage.py",
    "attack.*": "likewise",
    "experiment": "a group: what it sets is listed itself",
    "model.num_weights": "of a model on the hub, before it is here",
    "start": "set by a sequence of requests: tests/test_sequence.py",
    "hydra.*": "where Hydra writes and how it logs",
    "hydra/launcher": "needs SLURM: tests/test_slurm.py",
    "wandb.*": "needs the service",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a run of TUNED and of PLAIN, and of each with other values."""
    place = tmp_path_factory.mktemp("options")
    divided = {**DIVIDED, "cache": "third_cache"}
    commands: list[tuple[str, tuple[str, ...], dict[str, str]]] = [
        ("tuned", TUNED, {}), ("flipped", TUNED, FLIPPED),
        ("plain", PLAIN, {}), ("divided", PLAIN, {**divided, "stages": "[prepare]"}), ("divided", PLAIN, divided),
    ]  # fmt: skip
    for name, base, values in commands:
        typed = [f"{key}='{value}'" if " " in value else f"{key}={value}" for key, value in values.items()]
        done = type_(place, *base, *typed, f"hydra.run.dir={place / name}")
        assert done.returncode == 0, done.stdout + done.stderr
    return {name: place / name for name, _, _ in commands}


def content(folder: Path, weights: bool = True) -> dict[str, Any]:
    """All numbers of a run, and the hash of its weights."""
    found = json.loads((folder / "results.json").read_text())
    found["metrics"].pop("input_based", None)
    numbers: dict[str, Any] = {key: found[key] for key in ("metrics", "reasons", "training", "num_steps", "tuned")}
    numbers["trials"] = [{**trial, "seconds": None} for trial in found["trials"]]
    paths = [path for path in (folder / "records").rglob("*.jsonl") if "input_based" not in path.parts]
    paths += [folder / "train.jsonl", *((folder / "model").glob("*.safetensors") if weights else ())]
    files = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert len(files) > 5 and any(name.endswith(".safetensors") for name in files) == weights
    return {**numbers, **files}


def test_a_finished_run_may_lack_a_metric_that_was_added_since_but_not_have_another_definition_of_it() -> None:
    privleak, mine = {"_target_": "soul_exp.metrics.membership.privleak", "k": 0.4}, {"_target_": "mine.metric"}
    assert differences({"task": {"metrics": {}}}, {"task": {"metrics": {"privleak": privleak}}}) == []
    (line,) = differences(
        {"task": {"metrics": {"privleak": privleak}}}, {"task": {"metrics": {"privleak": {**privleak, "k": 0.2}}}}
    )
    assert line == "task.metrics.privleak.k: 0.4 before, 0.2 now"
    assert len(differences({"task": {"metrics": {}}}, {"task": {"metrics": {"mine": mine}}})) == 1


def test_an_option_that_changes_nothing_leaves_every_bit(runs: dict[str, Path]) -> None:
    assert content(runs["flipped"]) == content(runs["tuned"])
    assert content(runs["divided"], weights=False) == content(runs["plain"], weights=False)
    assert content(runs["plain"]) != content(runs["tuned"]) and not (runs["divided"] / "model").exists()


def test_the_runs_had_the_other_values(runs: dict[str, Path]) -> None:
    tuned, flipped, plain, divided = (
        dict(options.leaves(json.loads((runs[name] / "results.json").read_text())["config"])) for name in runs
    )
    assert [key for key in FLIPPED if flipped[key] == tuned[key]] == []
    assert [key for key in DIVIDED if divided[key] == plain[key]] == []


def test_every_option_that_changes_nothing_is_tried(tmp_path: Path) -> None:
    config = composed(tmp_path, *TUNED)
    keys = [*options.TABLE, *(key for key, _ in options.leaves(config))]
    nothing = {key for key in keys if options.changes(key, config) is Changes.NOTHING}
    listed = FLIPPED.keys() | DIVIDED.keys() | NOT_FLIPPED.keys()
    assert {key for key in nothing if key not in listed and f"{key.split('.')[0]}.*" not in NOT_FLIPPED} == set()
    assert {key for key in FLIPPED.keys() | DIVIDED.keys() if key not in nothing} == set()


# --- what derives from the table -----------------------------------------------------------------------------------


def test_what_names_a_folder_is_as_it_was() -> None:
    """A run that was typed before is looked for where it is; only options that change no number were added."""
    before = {"name", "experiment", "stages", "overwrite", "cache", "save", "input_based", "hydra/launcher"}
    before |= {"wandb.mode", "wandb.project", "wandb.entity"}
    assert set(options.not_in_folder_names()) == before | {"resume", "evaluate.every", "attack", "paper"}


def test_hydra_leaves_out_of_a_folder_s_name_what_the_table_says(place: Path) -> None:
    done = type_(place, "stages=[]", "resume=weights", "save=none", "wandb.mode=disabled", "seed=3", "-m")
    assert done.returncode == 0, done.stderr
    assert f"checked, nothing to run (stages=[]): {place / 'runs' / 'tofu' / 'seed-3'}\n" in done.stdout


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("train.epochs", Changes.NUMBERS),
        ("train.of_a_later_version", Changes.NUMBERS),
        ("loss.forget_term.of_my_own", Changes.NUMBERS),
        ("model.scratch.config.rope_theta", Changes.PREPARED),
        ("prepare.adamw.betas", Changes.PREPARED),
        ("prepare.save_steps", Changes.NOTHING),
        ("compute.deepspeed.communication_data_type", Changes.NUMBERS),
        ("compute.deepspeed.zero_optimization.stage", Changes.LAST_DIGITS),
        ("compute.of_a_later_version", Changes.NUMBERS),
        ("tune.lr", Changes.NUMBERS),
        ("best_keep", Changes.NOTHING),
    ],
)
def test_an_option_without_an_entry_changes_what_its_section_does_else_numbers(key: str, changed: Changes) -> None:
    assert options.changes(key, {"save": "final"}) is changed


def test_an_effect_may_depend_on_another_option(tmp_path: Path) -> None:
    final, other = composed(tmp_path), composed(tmp_path, "best_keep=0.5")
    assert differences(compared(final), compared(other)) == []
    best, other = composed(tmp_path, "save=best"), composed(tmp_path, "save=best", "best_keep=0.5")
    assert differences(compared(best), compared(other)) == ["best_keep: 0.9 before, 0.5 now"]
    others = ["best_keep: 0.9 before, None now", "best_s_mia: 0 before, None now"]  # other weights
    assert differences(compared(best), compared(final)) == others


def test_a_key_missing_beside_a_target_has_the_default_of_its_signature() -> None:
    old = {"loss": {"_target_": "soul_exp.losses.Objective", "gamma": 2.0}}
    now = {"loss": {**old["loss"], "layer": None, "retain_term": "nll"}}
    assert differences(old, now) == []
    assert differences(old, {"loss": {**now["loss"], "layer": 1}}) == ["loss.layer: None before, 1 now"]


def test_older_results_have_the_values_that_held_before_an_option_was_there() -> None:
    found = options.with_older_values({"train": {"epochs": 5}, "model": {"path": None}})
    assert found["utility_suite"] == "none" and found["train"]["dropout"] is True and found["tune"] is None
    assert found["model"] == {"path": None, "tokenizer": None}
    assert found["train"]["epochs"] == 5 and "max_steps" not in found["train"] and "wandb" not in found


def test_a_range_in_a_signature_holds_for_whoever_writes_a_loss() -> None:
    config = {
        "loss": {
            "_target_": "soul_exp.losses.Objective",
            "gamma": -1,
            "forget_term": {"_target_": f"{__name__}.mine", "mild": 1},
        }
    }
    found = {key: values.mismatch(key, value) for key, value, values in schema.declared(config)}
    assert {key: text for key, text in found.items() if text} == {
        "loss.gamma": "loss.gamma=-1: expected a number of 0 or more",
        "loss.forget_term.mild": "loss.forget_term.mild=1: found 1, expected true or false: "
        "type loss.forget_term.mild=true",
    }


def mine(forget: Any, *, mild: bool) -> Any:
    return forget
