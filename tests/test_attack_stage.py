"""The stage that attacks, through the real door: one small run, what its folder proves, and what stops it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from composing import composed
from safetensors.torch import load_file, save_file
from starts import TINY, Command, members, type_

from soul_exp import results
from soul_exp.checks.check import check
from soul_exp.errors import UsageError
from soul_exp.files import hashes
from soul_exp.verify import verify

RUN = [*TINY, "hydra.run.dir=run"]
STAGES = "stages=[prepare,unlearn,evaluate,attack]"
RELEARN = ["attack.relearn.lr=[1e-3,1e-2]", "attack.relearn.steps=[0,50]"]
QUANTISE = ["attack.quantise.scheme=[none,int4]"]
BOTH = [*RUN, STAGES, "attack=[relearn,quantise]", *RELEARN, *QUANTISE]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run was attacked by relearning and then, typed again, by quantising too."""
    folder = tmp_path_factory.mktemp("attack")
    first = type_(folder, *RUN, STAGES, "attack=[relearn]", *RELEARN)
    assert first.returncode == 0, first.stderr
    shutil.copy(folder / "run" / results.NAME, folder / "first.json")
    second = type_(folder, *BOTH)
    assert second.returncode == 0, second.stderr
    (folder / "second.txt").write_text(second.stdout)
    return folder


@pytest.fixture(scope="module")
def found(place: Path) -> results.Results:
    read = results.read(place / "run")
    assert read is not None
    return read


def verified(folder: Path) -> tuple[list[str], int, int]:
    """The problems that `verify` names, and how many numbers agree, of how many."""
    verdict = verify(folder)
    return list(verdict.problems), verdict.num_agree, verdict.num_numbers


def test_every_model_is_attacked_alike_and_the_model_stays_as_it_was(place: Path, found: results.Results) -> None:
    assert [*found.attacks] == ["relearn", "quantise"]
    for name, branches in (("relearn", ["0.001", "0.01"]), ("quantise", ["none", "int4"])):
        by_model = {model: of for model, of in found.attacks[name].items() if model != "uninformative"}
        assert [*by_model] == ["original", "unlearned", "retrained"]
        assert all([*of] == branches for of in by_model.values())
    assert found.attacks["quantise"]["original"]["int4"]["codes"] == {"all_same": 1.0}
    strengths = [of["forget_extraction_strength"] for of in found.metrics.values()]
    before = [found.attacks["relearn"][model]["0.001"]["0"]["extraction_strength"] for model in found.metrics]
    assert before == pytest.approx(strengths, abs=1e-12)  # the same rows, the same models, another stage
    assert found.sha256["models"]["unlearned"] == hashes(place / "run" / "model", "*.safetensors")
    assert found.metrics["retrained"]["relearn_excess"] in (0.0, None) and found.seconds["attack"] > 0


def test_a_further_attack_is_added_to_a_finished_run(place: Path, found: results.Results) -> None:
    """Nothing is trained or evaluated again, and nothing is lost."""
    first: dict[str, Any] = json.loads((place / "first.json").read_text())
    printed = (place / "second.txt").read_text()
    assert "finished before, but for attack=quantise" in printed
    assert "attack: 6 parts (0 in the cache)" in printed and "unlearn:" not in printed
    assert found.attacks["relearn"] == first["attacks"]["relearn"]
    assert {*first["reasons"].items()} <= {*found.reasons.items()}
    for model, values in first["metrics"].items():
        assert {name: found.metrics[model][name] for name in values} == values
    assert found.metrics["unlearned"]["quantise_same_codes_int4"] is not None
    assert found.reasons["quantise_same_codes_nf4"] == "the attack has no branch or point 'nf4'"
    assert {*found.config["attack"]} == {"relearn", "quantise"}


def test_typed_again_it_is_finished(place: Path) -> None:
    again = type_(place, *BOTH)
    assert again.returncode == 0 and "finished before, skipped" in again.stdout


def test_other_options_of_an_attack_make_it_anew(place: Path, found: results.Results, tmp_path: Path) -> None:
    """What the cache has is not made again; the points of the options before are gone."""
    shutil.copytree(place / "run", tmp_path / "run")
    changed = [*RUN, STAGES, "attack=[relearn]", "attack.relearn.lr=[1e-2]", "attack.relearn.steps=[0,50]"]
    done = type_(tmp_path, *changed, f"cache={place / 'cache'}")
    assert "finished before, but for attack=relearn" in done.stdout and "3 parts (3 in the cache)" in done.stdout
    again = results.read(tmp_path / "run")
    assert again is not None and [*again.attacks["relearn"]["unlearned"]] == ["0.01"]
    assert again.attacks["quantise"] == found.attacks["quantise"]
    assert verified(tmp_path / "run")[0] == []


def test_a_killed_attack_goes_on_at_the_first_missing_branch(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "cache", tmp_path / "cache")
    before = len([*(tmp_path / "cache" / "attacks").glob("[!.]*/COMPLETE")])
    line = [*RUN, STAGES, "attack=[relearn]", "attack.relearn.lr=[2e-3,4e-3,8e-3]", "attack.relearn.steps=[0,100]"]
    command = Command(tmp_path, tmp_path / "printed", *line)
    while len(made := [*(tmp_path / "cache" / "attacks").glob("[!.]*/COMPLETE")]) < before + 2:
        assert not command.is_over(), command.text()
        time.sleep(0.01)
    for pid in members(command.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    command.end()
    half = results.read(tmp_path / "run")
    assert half is not None and [*half.attacks["relearn"]["unlearned"]] == ["0.001", "0.01"]  # as before
    times = {path: path.stat().st_mtime_ns for path in made}
    again = type_(tmp_path, *line)
    assert again.returncode == 0, again.stderr
    cached = int(re.findall(r"9 parts \((\d) in the cache\)", again.stdout)[0])
    assert 2 <= cached < 9 and all(path.stat().st_mtime_ns == then for path, then in times.items())
    assert verified(tmp_path / "run")[0] == []


def test_verify_recomputes_every_number_of_an_attack(place: Path, found: results.Results) -> None:
    problems, agree, number = verified(place / "run")
    assert problems == [] and agree == number > len(found.attacks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("record", "attacks/relearn/unlearned/0.001/50.jsonl: checksum differs"),
        ("gone", "attacks/relearn/unlearned/0.001/50.jsonl: missing"),
        ("foreign", "attacks/relearn/unlearned/0.001/7.jsonl: a file that this run did not write"),
        ("number", "attacks.relearn.unlearned.0.001.50.extraction_strength: stated 0.75, its records give"),
        ("metric", "metrics.unlearned.quantise_same_codes_int4: stated 0.75, its records give"),
        ("version", "quantise_same_codes_int4: stored by version 0 of its definition, here is 1"),
        ("attack", "attacks/relearn: no attack that config.attack describes"),
        ("invented", "relearn: not recomputed (its records have not the branches"),
        ("branch", "relearn: not recomputed (its records have not the branches 0.001, 0.01 of every model"),
        ("points", "relearn: not recomputed (original/0.001 has the points 0, 50, and its options name 0, 25, 50)"),
        ("model", "unmerged: it has no records, which its numbers must come from"),
        ("reason", "reasons.quantise_same_codes_nf4: stated it holds, its records give the attack has no branch"),
    ],
)
def test_verify_names_what_was_changed(change: str, message: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    file = tmp_path / "run" / "attacks" / "relearn" / "unlearned" / "0.001" / "50.jsonl"
    stated: dict[str, Any] = json.loads((tmp_path / "run" / results.NAME).read_text())
    if change == "record":
        file.write_text(file.read_text().replace("0", "1", 1))
    elif change == "gone":
        file.unlink()
    elif change == "foreign":
        file.with_name("7.jsonl").write_text("{}")
    elif change == "number":
        stated["attacks"]["relearn"]["unlearned"]["0.001"]["50"]["extraction_strength"] = 0.75
    elif change == "metric":
        stated["metrics"]["unlearned"]["quantise_same_codes_int4"] = 0.75
    elif change == "version":
        stated["metric_versions"]["quantise_same_codes_int4"] = 0
    elif change == "attack":
        del stated["config"]["attack"]["relearn"]
    elif change == "invented":
        shutil.rmtree(tmp_path / "run" / "attacks" / "relearn")
        kept = {name: sha for name, sha in stated["sha256"]["attacks"].items() if not name.startswith("relearn/")}
        stated["sha256"]["attacks"], stated["attacks"]["relearn"] = kept, {}
        stated["metrics"]["unlearned"]["relearn_excess"] = 0.01
    elif change == "branch":
        for model in ("original", "unlearned", "retrained"):
            shutil.rmtree(tmp_path / "run" / "attacks" / "relearn" / model / "0.01")
            del stated["attacks"]["relearn"][model]["0.01"]
        kept = {name: sha for name, sha in stated["sha256"]["attacks"].items() if "/0.01/" not in name}
        stated["sha256"]["attacks"] = kept
    elif change == "points":
        stated["config"]["attack"]["relearn"]["steps"] = [0, 25, 50]
    elif change == "model":
        stated["metrics"]["unmerged"] = {"relearn_excess": 0.001}
    else:
        stated["reasons"]["quantise_same_codes_nf4"] = "it holds"
    (tmp_path / "run" / results.NAME).write_text(json.dumps(stated))
    problems, _, _ = verified(tmp_path / "run")
    assert any(problem.startswith(message) for problem in problems), problems


def test_equal_records_of_two_models_are_noted(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    points = tmp_path / "run" / "attacks" / "relearn"
    shutil.rmtree(points / "unlearned")
    shutil.copytree(points / "retrained", points / "unlearned")
    stated = json.loads((tmp_path / "run" / results.NAME).read_text())
    stated["sha256"]["attacks"] = hashes(tmp_path / "run" / "attacks", "*")
    (tmp_path / "run" / results.NAME).write_text(json.dumps(stated))
    notes = verify(tmp_path / "run").notes
    assert any("attacks/relearn/unlearned" in note and "have the same records" in note for note in notes), notes


def test_what_was_prepared_is_made_again_for_a_further_attack(place: Path, tmp_path: Path) -> None:
    """With an empty cache: the points of the attack before stay, and the new ones are of the same models."""
    shutil.copytree(place / "run", tmp_path / "run")
    done = type_(tmp_path, *RUN, STAGES, "attack=[relearn,prune]", *RELEARN)
    assert done.returncode == 0, done.stderr
    again, before = results.read(tmp_path / "run"), results.read(place / "run")
    assert again is not None and before is not None and again.attacks["relearn"] == before.attacks["relearn"]
    assert {"original", "unlearned", "retrained"} <= {*again.attacks["prune"]}
    assert verified(tmp_path / "run")[0] == []


def test_a_changed_model_is_not_attacked(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "cache", tmp_path / "cache")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: 3 * tensor for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    done = type_(tmp_path, *RUN, STAGES, "attack=[relearn,prune]", *RELEARN)
    assert done.returncode == 1 and "has other weights than the unlearned model that this run evaluated" in done.stderr


def test_metrics_that_are_taken_anew_leave_the_attacks(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "cache", tmp_path / "cache")
    done = type_(tmp_path, *RUN, "retrained.seeds=2")
    assert done.returncode == 0, done.stderr
    again, before = results.read(tmp_path / "run"), results.read(place / "run")
    assert again is not None and before is not None
    assert again.retrained_seeds and again.attacks == before.attacks and again.unit_values == before.unit_values
    assert again.metrics["unlearned"]["relearn_excess"] == before.metrics["unlearned"]["relearn_excess"]
    assert verified(tmp_path / "run")[0] == []


def test_a_model_whose_weights_are_not_finite_has_no_numbers_of_attacks(place: Path) -> None:
    ruin = ["optimizer=sgd", "optimizer.lr=1e30", "loss=grad_ascent", "train.max_steps=4", "hydra.run.dir=ruined"]
    done = type_(place, *TINY, STAGES, "attack=[prune]", *ruin)
    assert done.returncode == 0, done.stderr
    ruined = results.read(place / "ruined")
    assert ruined is not None and ruined.status == "diverged" and "unlearned" not in ruined.attacks["prune"]
    assert ruined.metrics["unlearned"]["prune_excess"] is None
    assert ruined.reasons["prune_excess"].startswith("diverged: ")


def test_every_attack_takes_an_adapter(place: Path) -> None:
    """Unmerged too, but for those that compare complete weights or blocks."""
    adapted = ["adapter=lora", "hydra.run.dir=lora", "attack=[quantise,retention,depth]", *QUANTISE]
    done = type_(place, *TINY, STAGES, *adapted)
    assert done.returncode == 0, done.stderr
    lora = results.read(place / "lora")
    assert lora is not None
    assert {name: "unmerged" in of for name, of in lora.attacks.items()} == {
        "quantise": True, "retention": False, "depth": False,
    }  # fmt: skip
    assert lora.attacks["quantise"]["unmerged"]["int4"]["codes"] == {"all_same": 1.0}  # the base stays as it was
    assert verified(place / "lora")[0] == []


def test_a_checkpoint_is_attacked_without_being_evaluated(place: Path, found: results.Results) -> None:
    """What is known of the same weights is found again; what was not measured says so."""
    line = [*TINY, "stages=[attack]", "attack=[quantise]", *QUANTISE, "model.path=run/model", "hydra.run.dir=alone"]
    done = type_(place, *line)
    assert done.returncode == 0, done.stderr
    alone = results.read(place / "alone")
    assert alone is not None and alone.attacks["quantise"] == found.attacks["quantise"]
    assert alone.reasons["forget_probability"] == "stages has no evaluate"
    assert verified(place / "alone")[0] == []


RELEARNT, QUANTISED = (STAGES, "attack=[relearn]"), (STAGES, "attack=[quantise]")
TWICE = "+attack.finetune.metrics.relearn_steps=${attack.relearn.metrics.relearn_steps}"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["attack=[relearn]"], r"attack=\[relearn\] needs its stage: type stages=\[prepare,unlearn,evaluate,attack\]"),
        ([STAGES], r"stages has attack, but no attack is chosen: type attack=\[relearn,quantise\]"),
        ([*RELEARNT, "save=none"], "save=none keeps no model that could be attacked: type save=final"),
        (
            [STAGES, "attack=[relearn_related]", "task.num_related_authors=0"],
            "attack=relearn_related is not available: task.num_related_authors=0",
        ),
        ([STAGES, "attack=[relearn,finetune]", TWICE], "the metric relearn_steps is stated twice"),
        (
            [*TINY, STAGES, "attack=[prompts]", "model.max_length=320"],
            r"the row 'Problem: .* has \d+ tokens",
        ),
        (["stages=[attack]", "attack=[relearn]"], r"stages=\[attack\] measures a checkpoint: name it with model.path"),
        ([*RELEARNT, "attack.relearn.lr=[0]"], r"attack.relearn.lr=\[0\]: expected a list, each a number above 0"),
        ([*RELEARNT, "attack.relearn.lr=[]"], r"attack.relearn: lr=\[\]: expected different values"),
        ([*RELEARNT, "attack.relearn.steps=[0,9,5]"], r"steps=\[0,9,5\]: expected increasing numbers"),
        ([*RELEARNT, "attack.relearn.steps=[5,9]"], r"steps=\[5,9\]: expected increasing numbers, the first of them 0"),
        ([*RELEARNT, "attack.relearn.rows=all"], "rows=all is unknown: choose forget, related or unrelated"),
        ([*QUANTISED, "attack.quantise.scheme=[int4]"], r"scheme=\[int4\]: .* the first of them none"),
        ([*QUANTISED, "attack.quantise.scheme=[none,int2]"], r"scheme=\[none,int2\]: expected a list, each none"),
        ([STAGES, "attack=[prune]", "attack.prune.share=[0,0.5,0.1]"], r"share=\[0,0.5,0.1\]: expected increasing"),
    ],
)  # fmt: skip
def test_what_cannot_be_attacked_is_said_before_any_work(typed: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        check(composed(tmp_path, *typed), tmp_path / "run")


def test_all_attacks_can_be_chosen_at_once(tmp_path: Path) -> None:
    names = "relearn,relearn_related,finetune,rtt,quantise,prune"
    run = check(composed(tmp_path, STAGES, f"attack=[{names}]"), tmp_path / "run").run
    assert ",".join(run.attacks) == names
