"""`python -m soul_exp.ask`: the models of a run side by side, on a run folder written by hand."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from composing import composed
from conftest import items, small_model
from test_tables import made

from soul_exp import ask, files, results, tables, verify
from soul_exp.artifacts import prepared_models
from soul_exp.build import build_models
from soul_exp.data import Item
from soul_exp.distributed.output import Console
from soul_exp.evaluation.probing import generations, likelihoods
from soul_exp.models import loading, saving
from soul_exp.models.checkpoint import DONE
from soul_exp.models.language_model import LanguageModel
from soul_exp.models.lora import Lora
from soul_exp.report.labels import printable
from soul_exp.results import Results

QUESTIONS = [item.prompt for item in items(2)]
NAMES = ("original", "unlearned", "retrained")


def config_of(place: Path, *overrides: str) -> dict[str, Any]:
    """Of few authors, unless a task is chosen."""
    typed = any(override.startswith("task=") for override in overrides)
    return composed(
        place, *([] if typed else ["task.num_authors=8", "task.train_varied=false"]), "model.max_length=128", *overrides
    )


def random_model(seed: int) -> LanguageModel:
    """The small model with weights of its own."""
    lm = small_model()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in lm.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    lm.model.eval()
    return lm


def written(place: Path, *overrides: str, adapter: bool = False) -> tuple[Path, dict[str, LanguageModel]]:
    """A run folder and its three models, saved where a run would have saved them."""
    config, run = config_of(place, *overrides), place / "runs" / "tofu" / "default"
    models = build_models(config)
    found = {name: random_model(i) for i, name in enumerate(NAMES)}
    for role, name in (("target", "original"), ("retrained", "retrained")):
        made_by = prepared_models.recipes(models)[role]
        folder = prepared_models.folder_of(models.cache, made_by)
        saving.save(found[name].model, found[name].tokenizer, folder)
        files.seal(folder / DONE, {"recipe": made_by})
    if adapter:
        lora = Lora(r=2, alpha=4, dropout=0.0, target_modules="all-linear", merge=False)
        base = loading.load_model(prepared_models.checkpoints(models)["target"].path)
        found["unlearned"] = found["unlearned"].with_model(lora.wrapped(base, seed=0))
        with torch.no_grad():
            for name, p in found["unlearned"].model.named_parameters():
                p.add_(0.3 * torch.ones_like(p) if "lora_B" in name else 0)
        found["unlearned"].model.eval()
    run.mkdir(parents=True)
    saving.save(found["unlearned"].model, found["unlearned"].tokenizer, run / "model")
    results.write(run, Results(**{**vars(made()), "config": config}))
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text("- task.num_authors=8\n- loss=npo\n")
    return run, found


def replace_in_results(run: Path, old: str, new: str) -> None:
    """Replace `old` by `new` in the run's results.json."""
    text = (run / "results.json").read_text()
    assert old in text
    (run / "results.json").write_text(text.replace(old, new))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str, int]]:
    """The command: its standard output, standard error and exit code."""

    def of(*arguments: object, stdin: str = "") -> tuple[str, str, int]:
        capsys.readouterr()  # of writing the folder
        monkeypatch.setattr(sys, "argv", ["ask", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr("logging.disable", lambda level: None)  # of this process
        code = 0
        try:
            ask.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return printed.out, printed.err, code

    return of


def test_only_the_run_is_required(command: Callable[..., tuple[str, str, int]]) -> None:
    _, err, code = command()
    assert code == 2 and err.endswith("error: the following arguments are required: RUN\n") and "[QUESTION" in err


def blocks(text: str) -> list[dict[str, list[str]]]:
    """Of each question: model -> the lines beside its name."""
    found: list[dict[str, list[str]]] = []
    for line in text.splitlines():
        if line in QUESTIONS:
            found.append({})
        elif found and line.split(" ")[0] in NAMES:
            found[-1][line.split(" ")[0]] = [line[11:].strip()]
        elif found and line.startswith(" "):
            found[-1][list(found[-1])[-1]].append(line.strip())
    return found


def expected(lm: LanguageModel, question: str, answer: str) -> tuple[str, str]:
    (text,) = generations(lm, [Item(question, "a")], batch_size=1, max_new_tokens=5)
    own, given = (likelihoods(lm, [Item(question, words)], batch_size=1)[0].logp.mean() for words in (text, answer))
    return printable(text), f"NLL {-own:.3f} nats per token; probability of the given answer {np.exp(given):.3g}"


@pytest.mark.parametrize("adapter", [False, True])
def test_each_model_gives_its_own_greedy_answer_to_each_question(adapter: bool, command: Any, tmp_path: Path) -> None:
    run, found = written(tmp_path, adapter=adapter)
    assert (run / "model" / "adapter_config.json").is_file() == adapter
    out, err, code = command(run, *QUESTIONS, "--answer", "amber birch", "--max-new-tokens", 5)
    assert code == 0 and err == ""
    answers = blocks(out)
    for question, shown in zip(QUESTIONS, answers, strict=True):
        assert list(shown) == list(NAMES)
        for name, lines in shown.items():
            text, numbers = expected(found[name], question, "amber birch")
            assert " ".join(lines).split() == f"{text} {numbers}".split()
    assert len({" ".join(lines) for lines in answers[0].values()}) == 3


def test_questions_come_from_standard_input_if_none_is_typed(command: Any, tmp_path: Path) -> None:
    run, _ = written(tmp_path)
    typed, _, _ = command(run, *QUESTIONS)
    piped, err, code = command(run, stdin="\n".join([*QUESTIONS, ""]))
    assert code == 0 and piped == typed, err


def test_raw_text_is_continued_without_the_template(command: Any, tmp_path: Path) -> None:
    run, found = written(tmp_path)
    out, _, _ = command(run, QUESTIONS[0], "--raw", "--max-new-tokens", 4)
    for name, lm in found.items():
        (text,) = generations(lm, [Item(QUESTIONS[0], " a", raw=True)], batch_size=1, max_new_tokens=4)
        assert blocks(out)[0][name][0].split() == printable(text).split()
    assert out != command(run, QUESTIONS[0], "--max-new-tokens", 4)[0]


def test_a_retrained_model_given_as_records_is_reported_as_absent(command: Any, tmp_path: Path) -> None:
    run, _ = written(tmp_path)
    path = run / "results.json"
    content = json.loads(path.read_text())
    content["config"]["retrained"]["records"] = str(run / "records")
    path.write_text(json.dumps(content))
    out, _, code = command(run, QUESTIONS[0])
    assert code == 0 and list(blocks(out)[0]) == ["original", "unlearned"]
    assert "no NLL: the row 'Which amber is number 0?' has" in out  # a random model's 100 tokens are long
    assert "retrained: this run had no weights of it\n" in out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run, place: (run / "results.json").unlink(), "has no results.json: give the folder of a finished run"),
        (
            lambda run, place: shutil.rmtree(place / "cache"),
            "found no original model in .*: type python -m soul_exp task.num_authors=8 loss=npo "
            r"'stages=\[prepare\]' name=prepared",
        ),
        (
            lambda run, place: shutil.rmtree(run / "model"),
            "found no unlearned model in .*: type python -m soul_exp task.num_authors=8 loss=npo save=final "
            "overwrite=true",
        ),
        (
            lambda run, place: replace_in_results(run, '"save": "final"', '"save": "none"'),
            "was run with save=none, which keeps no unlearned model: type python -m soul_exp task.num_authors=8",
        ),
        (
            lambda run, place: replace_in_results(run, '"source": "embedded"', '"source": "/nowhere"'),
            "task.source=/nowhere is not a folder: give embedded, hub",
        ),
        (
            lambda run, place: replace_in_results(run, '"validation_fraction"', '"validation_share"'),
            "run at commit .*, cannot be read by this version: run it again: .*unexpected .*'validation_share'",
        ),
        (
            lambda run, place: replace_in_results(run, '"published"', '"public"'),
            "run it again: its configuration has no key 'published'",
        ),
    ],
)
def test_deleted_or_unreadable_files_are_an_error_that_states_what_to_type(
    damage: Callable[[Path, Path], Any], message: str, command: Any, tmp_path: Path
) -> None:
    run, _ = written(tmp_path)
    damage(run, tmp_path)
    out, err, code = command(run, QUESTIONS[0])
    assert code == 2 and out == "" and err.count("\n") == 1
    with pytest.raises(AssertionError, match=f"soul_exp.ask: .*{message}"):
        raise AssertionError(err)


WRITE = {"_target_": "pathlib.Path.write_text", "_args_": [{"_target_": "pathlib.Path", "_args_": ["MARKER"]}, "x"]}
REMOVE = {"_target_": "soul_exp.training.checkpoints.remove_all", "folder": "VICTIM"}
CREATE = "${oc.create:'{_target_: pathlib.Path.touch, _args_: [{_target_: pathlib.Path, _args_: [MARKER]}]}'}"


@pytest.mark.parametrize(
    ("planted", "named"),
    [
        ({**WRITE, "metrics": {}, "system_prompt": None}, "pathlib.Path, pathlib.Path.write_text"),
        ({"source": WRITE}, "pathlib.Path, pathlib.Path.write_text"),
        ({"source": [{"a": WRITE}]}, "pathlib.Path, pathlib.Path.write_text"),
        ({"source": REMOVE}, "soul_exp.training.checkpoints.remove_all"),
        ({"source": CREATE}, "${oc.create:"),
    ],
)
def test_code_that_results_json_names_is_called_with_trust_only(
    planted: dict[str, Any], named: str, command: Any, tmp_path: Path
) -> None:
    run, _ = written(tmp_path)
    marker, victim = tmp_path / "marker", tmp_path / "victim"
    victim.mkdir()
    content = json.loads((run / "results.json").read_text())
    task = planted if "_target_" in planted else {**content["config"]["task"], **planted}
    content["config"]["task"] = task
    text = json.dumps(content).replace("MARKER", str(marker)).replace("VICTIM", str(victim))
    (run / "results.json").write_text(text)
    out, err, code = command(run, QUESTIONS[0])
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"results.json names code that conf/ does not list: {named}" in err and "type --trust" in err
    assert victim.exists() and not marker.exists()
    _, err, code = command(run, QUESTIONS[0], "--trust")
    assert f"results.json names code that conf/ does not list: {named}" in err.splitlines()[0]
    assert marker.exists() or not victim.exists()  # it was called, so the test's attack is one


def test_the_users_own_loss_needs_no_trust_because_it_is_not_called(command: Any, tmp_path: Path) -> None:
    run, _ = written(tmp_path)
    content = json.loads((run / "results.json").read_text())
    content["config"]["loss"]["forget_term"] = {"_target_": "mine.loss", "_partial_": True}
    (run / "results.json").write_text(json.dumps(content))
    assert command(run, QUESTIONS[0], "--max-new-tokens", 1)[2] == 0


@pytest.mark.parametrize("text", ["", " ", "caf\udce9"])
def test_a_text_that_is_none_is_an_error(text: str, command: Any, tmp_path: Path) -> None:
    expected = f"soul_exp.ask: {text!r}: expected a text in UTF-8 that is not empty\n"
    for typed in ([text], [QUESTIONS[0], "--answer", text]):
        assert command(tmp_path, *typed) == ("", expected, 2)


def test_a_line_of_standard_input_that_is_no_utf_8_is_an_error(command: Any, tmp_path: Path) -> None:
    run, _ = written(tmp_path)
    out, err, code = command(run, stdin="caf\udce9\n")
    assert (out, code) == ("", 2) and "expected a text in UTF-8" in err and err.count("\n") == 1


def test_a_text_is_read_as_utf_8_in_a_locale_that_is_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsencode", lambda text: text.encode("ascii", "surrogateescape"))  # as LC_ALL=C makes it
    assert ask.utf8("Köln?".encode().decode("ascii", "surrogateescape")) == "Köln?"


@pytest.mark.parametrize("module", [ask, tables, verify])
def test_a_command_whose_answer_cannot_be_written_ends_with_2(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = written(tmp_path)
    questions = [QUESTIONS[0], "--max-new-tokens", "1"] if module is ask else []
    monkeypatch.setattr(sys, "argv", ["command", str(run), *questions])
    monkeypatch.setattr("logging.disable", lambda level: None)
    with Path("/dev/full").open("wb") as full:  # every write fails, as on a full disk
        monkeypatch.setattr(sys, "stdout", Console(full, "utf-8"))
        with pytest.raises(SystemExit, match=r"^2$"):
            module.main()


def test_a_damaged_model_is_one_line_and_no_caption(command: Any, tmp_path: Path) -> None:
    run, _ = written(tmp_path)
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    out, err, code = command(run, QUESTIONS[0])
    assert (out, code) == ("", 2) and "model.safetensors is damaged" in err and err.count("\n") == 1


def test_a_question_may_stand_behind_an_option(command: Any, tmp_path: Path) -> None:
    run, _ = written(tmp_path)
    assert command(run, "--raw", QUESTIONS[0])[0] == command(run, QUESTIONS[0], "--raw")[0] != ""


def test_the_command_works_as_it_is_typed(tmp_path: Path) -> None:
    run, found = written(tmp_path)
    typed = [sys.executable, "-m", "soul_exp.ask", run.relative_to(tmp_path), QUESTIONS[0], "--max-new-tokens", "5"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(typed, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {name: lines[0] for name, lines in blocks(done.stdout)[0].items()} == {
        name: expected(lm, QUESTIONS[0], "a")[0] for name, lm in found.items()
    }
    assert "Traceback" not in done.stderr and "batch/s" not in done.stderr
