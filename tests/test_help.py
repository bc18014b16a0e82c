"""`--help`: every option of conf/ has a meaning, and every page can be read in a terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from composing import composed

from soul_exp import help_page
from soul_exp.compose import conf_dir
from soul_exp.errors import UsageError
from soul_exp.options import leaves

CONF = help_page.Conf([conf_dir()])
CHOICES = [f"{group}={choice}" for group, choices in CONF.files.items() for choice in choices]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_option_of_a_choice_has_a_meaning_and_the_choice_a_description(choice: str) -> None:
    group, _, name = choice.partition("=")
    assert [entry.key for entry in CONF.entries(group, name).values() if entry.value and not entry.meaning] == []
    title = help_page.page([choice]).splitlines()[0]
    assert title.startswith(f"{choice}: ") or group == "tuned"  # whose numbers say themselves where they are from


@pytest.mark.parametrize("arguments", [[], ["train"], ["model.scratch"], *([choice] for choice in CHOICES)], ids=str)
def test_no_line_is_longer_than_a_terminal_is_wide(arguments: list[str]) -> None:
    assert max(map(len, help_page.page(["--help", *arguments]).splitlines())) <= 100


def test_the_overview_has_each_option_of_config_yaml_with_its_meaning_and_each_choice() -> None:
    page = " ".join(help_page.page(["--help"]).split())
    assert "train.max_grad_norm=1.0 L2 norm to which a larger gradient is scaled; 0: never" in page
    assert "train.diverged_floor=0.1 nats per token" in page
    assert "optimizer=sophia how unlearning updates the weights adam, hybrid, influence, lion, mezo, muon," in page
    missing = [entry.key for entry in CONF.main.entries if entry.value and not entry.meaning]
    assert missing == []


def test_an_option_that_a_run_has_is_on_a_page(tmp_path: Path) -> None:
    """Of the task's metrics and of what a preset adds the page of the choice names the names."""
    pages = "\n".join(help_page.page(arguments) for arguments in ([], ["model=tiny"], ["task=tofu"], ["loss=npo"]))
    pages += "\n".join(
        help_page.page([f"{group}={choice}"]) for group, choice in (("optimizer", "sophia"), ("compute", "cpu"))
    )
    pages += help_page.page(["precision=fp32"]) + help_page.page(["prepare/any=tiny"])
    for key, _ in leaves(composed(tmp_path)):
        made_by_compose = key.split(".")[0] in ("choices", "adapter") or key.endswith(("._target_", "._partial_"))
        assert made_by_compose or key.startswith("task.metrics.") or f"  {key}=" in pages, key


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("optimizer=sophia", "  optimizer.interval=10             steps between curvature passes"),
        ("optimizer=sophia_gradient", "  optimizer.estimator=gradient "),  # beside all that sophia.yaml states
        ("optimizer", "  optimizer=adam                    AdamW, equal to torch's up to rounding"),
        (
            "train.epochs",
            "values: a number above 0, at most 1000000\nit changes: weights and metrics of the unlearned model",
        ),
        ("best_keep", "it changes: weights and metrics of the unlearned model (with save=best)"),
        ("train.gradient_checkpointing=true", "it changes: no numbers, only names, folders, speed or size"),
        ("experiment=ablation_rho", 'optimizer.rho="0.01,0.1,1,10,100"\n'),
    ],
)
def test_a_page_explains_a_choice_a_group_or_an_option(argument: str, shown: str) -> None:
    assert shown in help_page.page(["--help", argument])


def test_the_choices_of_a_users_own_folder_are_explained_too(tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("# Mine.\ngamma: 3 # of mine\n")
    page = help_page.page(["--help", "--config-dir", str(tmp_path), "loss=mine"])
    assert page == "loss=mine: Mine.\n\n  loss.gamma=3                      of mine"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optimizer=sofia", "optimizer=sofia is unknown, did you mean sophia?"),
        ("loss=npoo", "loss=npoo is unknown, did you mean npo?"),
        ("loss=zz", "loss=zz is unknown: choose one of altpo, ce_u, dpo, "),
        ("optimiser", "--help optimiser: no such option, did you mean optimizer?"),
        ("optimiser=sophia", "--help optimiser=sophia: no such option, did you mean optimizer?"),
        ("zz", "--help zz: no such option: --help lists them"),
        ("train.epoch", "--help train.epoch: no such option, did you mean train.epochs?"),
        ("lr", "--help lr: no such option, did you mean optimizer.lr?"),
    ],
)
def test_what_does_not_exist_is_named(argument: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        help_page.page([argument])
    assert str(error.value).startswith(message)


def test_the_command_prints_it_without_importing_torch(tmp_path: Path) -> None:
    here = str(Path(__file__).parents[1])
    command = [sys.executable, "-X", "importtime", "-m", "soul_exp", "loss=npo", "--help"]
    done = subprocess.run(command, env={"PYTHONPATH": here}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("loss=npo: Negative preference optimisation")
    assert "hydra" in done.stderr and "| torch\n" not in done.stderr.replace(" ", "").replace("|torch\n", "| torch\n")
    assert list(tmp_path.iterdir()) == []
