"""What users typed and wrote before the package was reorganised is read, or stopped with a message, as it was then."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from composing import composed

from soul_exp.artifacts import prepared_models
from soul_exp.build import build, build_models
from soul_exp.checks.options import check_options
from soul_exp.comparison import compared, differences
from soul_exp.errors import UsageError
from soul_exp.tasks.task import Task
from soul_exp.tasks.tofu import tofu

FEW = "task.num_authors=8"


def own_task(source: str = "embedded", **options: Any) -> Task:
    """A task of a user, whose signature names no option of it."""
    return tofu(source, **options)


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`config`, in place, with `value` at the dotted `key`."""
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[name] = value
    return config


@pytest.mark.parametrize(
    "key", ["overwrite", "save", "seed", "name", "model.path", "train.batch_size", "train.dropout", "retrained.records"]
)
def test_a_mapping_is_no_value_of_a_number_a_text_or_a_flag(key: str, tmp_path: Path) -> None:
    config = changed(composed(tmp_path, FEW), key, {"a": 1})
    with pytest.raises(UsageError, match=f"^{key}="):
        check_options(config)


@pytest.mark.parametrize("section", ["evaluate", "wandb", "compute", "model.template", "model.scratch"])
def test_a_key_that_nothing_reads_is_ignored_or_stops_with_a_message(section: str, tmp_path: Path) -> None:
    with contextlib.suppress(UsageError):
        build(composed(tmp_path, FEW, f"+{section}.remark=1"))


@pytest.mark.parametrize(
    "typed",
    [
        ["adapter=lora", "adapter._target_=soul_exp.adapters.Lora"],
        ["experiment=ablation_rho", "budget=smoke", "tune.rule._target_=soul_exp.tune.best_forgetting"],
    ],
)
def test_a_path_that_moved_is_found_where_a_user_typed_it(typed: list[str], tmp_path: Path) -> None:
    build(composed(tmp_path, FEW, *typed))


@pytest.mark.parametrize("option", ["task.train_general", "task.trained_before"])
def test_a_flag_of_a_user_s_own_task_is_not_a_text(option: str, tmp_path: Path) -> None:
    config = changed(composed(tmp_path, FEW), "task._target_", f"{__name__}.own_task")
    with pytest.raises(UsageError, match=f"{option}=no: found the text 'no', expected true or false"):
        check_options(changed(config, option, "no"))


@pytest.mark.parametrize(
    ("option", "value"), [("task.num_authors", -3), ("task.validation_fraction", 7), ("task.answer_words", -1)]
)
def test_a_range_holds_for_an_option_of_that_name_in_a_user_s_own_task(option: str, value: int, tmp_path: Path) -> None:
    config = changed(composed(tmp_path, FEW), "task._target_", f"{__name__}.own_task")
    with pytest.raises(UsageError, match=f"{option}={value}: expected a"):
        check_options(changed(config, option, value))


def test_what_a_template_leaves_out_does_not_enter_the_recipe_of_a_prepared_model(tmp_path: Path) -> None:
    """A model file that states the prompt alone: the cache of models and the hashes in results hold that alone."""
    config = composed(tmp_path, FEW)
    config["model"]["template"] = {"prompt": "Q: {question}\nA:"}
    recipe = prepared_models.recipes(build_models(config))["target"]
    assert recipe["model"]["template"] == {"prompt": "Q: {question}\nA:"}


def test_an_empty_tune_is_no_tune(tmp_path: Path) -> None:
    config = composed(tmp_path, FEW)
    assert config["tune"] is None and differences(compared(config), compared({**config, "tune": {}})) == []


def test_a_difference_in_a_section_that_one_configuration_lacks_is_named_by_its_option(tmp_path: Path) -> None:
    config = composed(tmp_path, FEW, "compute=zero2")
    deepspeed = {**config["compute"]["deepspeed"], "wall_clock_breakdown": True}
    other = {**config, "compute": {**config["compute"], "deepspeed": deepspeed}}
    found = differences(compared(config), compared(other))
    assert found == ["compute.deepspeed.wall_clock_breakdown: None before, True now"]
