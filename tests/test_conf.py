"""Every file of conf/ composes, and every `_target_` in it fits its callable, so that no schema is written twice."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
import hydra.utils
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from soul_exp import compose

CONF = compose.conf_dir()
FILES = [path.relative_to(CONF).as_posix() for path in sorted(CONF.rglob("*.yaml")) if path != CONF / "config.yaml"]
PRESETS = [file for file in FILES if file.startswith("experiment/")]
TUNED = [file for file in FILES if file.startswith("tuned/")]
PREPARE_ANY = [file for file in FILES if file.startswith("prepare/any/")]
PREPARE = [file for file in FILES if file.startswith("prepare/") and file not in PREPARE_ANY]
INSTRUCTIONS = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
# What the program takes out of an entry before it instantiates it.
TAKEN_OUT = {"task": {"metrics", "system_prompt"}, "attack": {"metrics"}}


@pytest.fixture(autouse=True)
def hydra_started() -> Iterator[None]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    HydraConfig.instance().cfg = None


def composed(*overrides: str) -> tuple[dict[str, Any], DictConfig]:
    """The resolved configuration as plain data, and what was composed, with the part that Hydra itself reads."""
    cfg = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    plain = OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), resolve=True
    )
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}, cfg


def choice(file: str) -> str:
    """The override that selects `file`: `loss=npo`, with a + where config.yaml's defaults do not name the group."""
    group, name = file.removesuffix(".yaml").rsplit("/", 1)
    defaults = OmegaConf.load(CONF / "config.yaml").defaults
    named = {str(key).split()[-1] for entry in defaults if isinstance(entry, DictConfig) for key in entry}
    return f"{'' if group in named or group.startswith('hydra/') else '+'}{group}={name}"


def misfits(node: Any, at: str = "") -> list[str]:
    """One sentence for each `_target_` in `node` whose keys do not fit its callable.

    A partial target may leave its positional parameters to the run (an optimizer's `params`, the parts that a loss term
    or a metric names), never its keyword-only ones: those are constants, which the YAML states.
    """
    if isinstance(node, list):
        return [line for index, value in enumerate(node) for line in misfits(value, f"{at}[{index}]")]
    if not isinstance(node, Mapping):
        return []
    lines = [line for key, value in node.items() for line in misfits(value, f"{at}.{key}" if at else str(key))]
    if "_target_" not in node:
        return lines
    target = hydra.utils.get_object(node["_target_"])
    parameters = inspect.signature(target).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    taken_out = TAKEN_OUT.get(at if at in TAKEN_OUT else at.rpartition(".")[0], ())
    given = [key for key in node if key not in INSTRUCTIONS and key not in taken_out]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = [p.name for p in named]
        lines += [
            f"{at}: {node['_target_']} has no parameter {key!r}, it takes {', '.join(names)}"
            for key in given
            if key not in names
        ]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    filled = {p.name for p in positional[: len(node.get("_args_", ()))]} | set(given)
    required = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and not (node.get("_partial_") and p in positional)
    ]
    return lines + [f"{at}: {node['_target_']} needs {name!r}" for name in required if name not in filled]


def test_the_defaults_compose_and_fit() -> None:
    config, _ = composed()
    assert misfits(config) == []


@pytest.mark.parametrize(
    ("typed", "loss"),
    [
        ([], "altpo"),
        (["task=copyright"], "npo"),
        (["task=detox"], "npo"),
        (["task=custom"], "npo"),
        *(([f"model={path.stem}"], "npo") for path in sorted(CONF.glob("model/*.yaml")) if path.stem != "tiny"),
        (["task=copyright", "loss=simnpo"], "simnpo"),
        (["task=copyright", "method=npo_so"], "npo_release"),
        (["model=phi1p5", "method=po_fo"], "po_release"),
    ],
)
def test_the_default_loss_is_one_that_task_and_model_have_the_rows_for(typed: list[str], loss: str) -> None:
    _, cfg = composed(*typed)
    assert cfg.hydra.runtime.choices["loss"] == loss


@pytest.mark.parametrize("file", FILES)
def test_every_choice_composes_and_fits(file: str) -> None:
    config, cfg = composed(choice(file))
    assert misfits(config) == []
    if file.startswith("hydra/"):  # hydra/launcher/slurm.yaml: what Hydra itself will instantiate
        node = file.split("/")[1]
        assert misfits(OmegaConf.to_container(cfg.hydra[node], resolve=True), f"hydra.{node}") == []


@pytest.mark.parametrize("file", PRESETS)
def test_every_job_of_a_preset_composes_and_fits(file: str) -> None:
    _, cfg = composed(choice(file))
    varied = {key: value for key, value in (cfg.hydra.sweeper.params or {}).items() if key != "seed"}
    sweep = [f"{key}={value}" for key, value in varied.items()]
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(sweep), max_batch_size=None)
    assert jobs
    for job in jobs:
        config, _ = composed(choice(file), *job)
        assert misfits(config) == [], job


@pytest.mark.parametrize(
    ("file", "groups"),
    [(file, ("model",)) for file in PREPARE_ANY]
    + [(file, ("model", "task")) for file in PREPARE]
    + [(file, ("model", "task", "loss", "optimizer")) for file in TUNED],
)
def test_an_entry_is_selected_by_the_choices_in_its_name(file: str, groups: tuple[str, ...]) -> None:
    group, name = file.removesuffix(".yaml").rsplit("/", 1)
    parts = name.split("-")
    assert len(parts) == len(groups), f"conf/{file}: expected a name like {'-'.join(groups)}.yaml"
    _, cfg = composed(*(f"{key}={value}" for key, value in zip(groups, parts, strict=True)))
    assert cfg.hydra.runtime.choices[group] == name


def test_the_command_line_wins_over_a_prepare_entry() -> None:
    config, _ = composed("model=tiny", "task=tofu", "prepare.epochs=3")
    assert config["prepare"]["epochs"] == 3


@pytest.mark.parametrize("task", ["tofu", "copyright", "detox", "custom", "mine"])
def test_the_tiny_model_is_never_prepared_at_the_rate_of_fine_tuning(task: str, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("_target_: soul_exp.tasks.tofu.tofu\nsource: embedded\nmetrics: {}\n")
    config, _ = composed("model=tiny", f"task={task}", f"hydra.searchpath=[file://{tmp_path}]")
    assert config["prepare"]["adamw"]["lr"] == 3e-3
    prompts = 7 if config["task"].get("train_varied") else 1  # of each row
    assert config["prepare"]["epochs"] * prompts >= 12 and prompts == (7 if task == "tofu" else 1)


SGD = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}
TERM = {"_target_": "soul_exp.losses.npo", "_partial_": True, "beta": 0.1}


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (SGD, None),
        ({**SGD, "learning_rate": 0.1}, "has no parameter 'learning_rate'"),
        ({**SGD, "_partial_": False}, "needs 'params'"),
        (TERM, None),
        ({"_target_": "soul_exp.losses.npo", "_partial_": True}, "needs 'beta'"),
        ({"outer": [{"inner": {**TERM, "bta": 1.0}}]}, "outer[0].inner: soul_exp.losses.npo has no parameter 'bta'"),
    ],
)
def test_a_key_that_does_not_fit_is_named(node: Mapping[str, Any], sentence: str | None) -> None:
    found = misfits(node)
    assert (found == []) if sentence is None else (len(found) == 1 and sentence in found[0])


def test_conf_is_found_beside_the_checkout() -> None:
    assert Path(__file__).parents[1] / "conf" == CONF
