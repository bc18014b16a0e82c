"""The private parts of libraries that soul_exp/compat.py touches are still there; nothing else touches any."""

from __future__ import annotations

import ast
import inspect
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import deepspeed as zero_integration

from soul_exp import compat

PACKAGE = Path(__file__).parents[1] / "soul_exp"
LIBRARIES = {"transformers": "transformers", "torch": "torch", "DeepSpeed": "deepspeed", "lm_eval": "lm_eval"}
LIBRARIES |= {"hydra-core": "hydra-core", "datasets": "datasets", "Python": ""}


def reason(touching: Any) -> str:
    """What a failing test says: which private part is gone, what it was for, in which version it was there."""
    return inspect.getdoc(touching) or ""


def small() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))


# --- transformers ---------------------------------------------------------------------------------------------------


def test_the_remembered_configuration_of_deepspeed_is_hidden_and_comes_back() -> None:
    why = reason(compat.no_remembered_deepspeed)
    assert hasattr(zero_integration, "_hf_deepspeed_config_weak_ref"), why

    class Remembered:
        def is_zero3(self) -> bool:
            return True

    config = Remembered()
    zero_integration.set_hf_deepspeed_config(config)
    try:
        assert zero_integration.is_deepspeed_zero3_enabled(), why
        with compat.no_remembered_deepspeed():
            assert not zero_integration.is_deepspeed_zero3_enabled(), why
        assert zero_integration.is_deepspeed_zero3_enabled(), why
    finally:
        zero_integration.unset_hf_deepspeed_config()


def trainer(folder: Path, cls: type[Trainer] = Trainer) -> Trainer:
    return cls(small(), TrainingArguments(str(folder), use_cpu=True, report_to=[]), train_dataset=[])  # type: ignore[arg-type]


def test_a_trainer_takes_the_mean_of_the_losses_since_the_step_in_the_attribute_that_is_set(tmp_path: Path) -> None:
    why = reason(compat.set_last_logged_step)
    assert "self._globalstep_last_logged = self.state.global_step" in inspect.getsource(Trainer), why
    one = trainer(tmp_path)
    compat.set_last_logged_step(one, 5)
    assert one._globalstep_last_logged == 5
    assert "- self._globalstep_last_logged" in inspect.getsource(Trainer), why  # the steps that the mean is over


def test_training_arguments_for_several_gpus_can_be_cut_down_to_one(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    assert args.n_gpu <= 1  # which sets the attribute
    args._n_gpu = 4
    assert args.n_gpu == 4, reason(compat.use_one_device)
    compat.use_one_device(args)
    assert args.n_gpu == 1, reason(compat.use_one_device)


def test_a_resumed_trainer_reads_weights_through_the_method_that_is_overridden(tmp_path: Path) -> None:
    why = reason(compat.OwnCheckpointReading)
    given, overriding = (
        list(inspect.signature(cls._load_from_checkpoint).parameters) for cls in (Trainer, compat.OwnCheckpointReading)
    )
    assert given == overriding, why
    assert "self._load_from_checkpoint(" in inspect.getsource(Trainer.train), why
    read: list[Path] = []

    class Own(compat.OwnCheckpointReading, Trainer):
        def read_checkpoint(self, folder: Path) -> None:
            read.append(folder)

    trainer(tmp_path, Own)._load_from_checkpoint("checkpoint-3")
    assert read == [Path("checkpoint-3")], why


def test_a_class_says_which_attention_its_models_can_compute() -> None:
    why = reason(compat.has_attention)
    for name in ("eager", "sdpa", "flash_attention_2"):
        assert compat.has_attention(LlamaForCausalLM, name), why
        assert compat.has_attention(GPTJForCausalLM, name) == (name != "sdpa"), why
        assert compat.has_attention(MambaForCausalLM, name) == (name == "eager"), why
    config = GPTJConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=1, rotary_dim=4)
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def test_the_attention_of_a_model_is_known_by_name() -> None:
    model = small()
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert compat.attention_of(model) == name, reason(compat.attention_of)
    assert compat.attention_of(nn.Linear(1, 1)) is None


def test_a_file_missing_from_a_hub_entry_is_none_and_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    why = reason(compat.cached_file_if_present)
    assert compat.cached_file_if_present(str(tmp_path), "model.safetensors", None) is None, why
    assert compat.cached_file_if_present(str(tmp_path), "config.json", None) == str(tmp_path / "config.json"), why
    with pytest.raises(OSError):
        transformers.utils.cached_file(str(tmp_path), "model.safetensors")


# --- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout])
def test_every_dropout_of_torch_is_one(layer: type[nn.Module]) -> None:
    assert compat.is_dropout(layer()), reason(compat.is_dropout)
    assert not compat.is_dropout(nn.Linear(1, 1))


def test_a_shallow_copy_shares_weights_and_neither_hooks_nor_the_list_of_children() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module.register_forward_hook(lambda *_: torch.zeros(1, 2))
    module.register_forward_pre_hook(lambda *_: (torch.full((1, 2), torch.nan),))
    copied, why = compat.shallow_copy(module), reason(compat.shallow_copy)
    assert copied[0] is module[0], why  # type: ignore[index]
    expected = module[1](module[0](torch.ones(1, 2)))
    assert torch.equal(copied(torch.ones(1, 2)), expected) and torch.equal(module(torch.ones(1, 2)), torch.zeros(1, 2))
    copied.add_module("1", nn.Identity())
    assert isinstance(module[1], nn.Linear) and isinstance(copied[1], nn.Identity), why  # type: ignore[index]


def test_the_hooks_of_a_module_and_of_those_below_it_can_be_removed() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    expected = module(torch.ones(1, 2))
    for part in module.modules():
        part.register_forward_hook(lambda *_: torch.zeros(1, 2))
        part.register_forward_pre_hook(lambda *_: (torch.full((1, 2), torch.nan),))
    compat.remove_forward_hooks(module)
    assert torch.equal(module(torch.ones(1, 2)), expected), reason(compat.remove_forward_hooks)


# --- DeepSpeed ------------------------------------------------------------------------------------------------------


def test_the_empty_folder_that_torch_makes_as_it_is_imported_is_removed_and_a_full_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    made = Path(cache_dir())
    assert made.parent == tmp_path
    compat.remove_empty_inductor_cache()
    assert not made.exists()
    Path(cache_dir(), "kernel.so").touch()
    compat.remove_empty_inductor_cache()
    assert made.is_dir()


def test_the_libraries_of_the_hub_read_whether_they_are_offline_at_each_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", False)
    assert not huggingface_hub.is_offline_mode()
    compat.go_offline()
    assert huggingface_hub.is_offline_mode()


def test_deepspeed_marks_a_partitioned_weight_by_these_attributes() -> None:
    """What they hold is tested by the trainings under ZeRO-3 (test_engines.py)."""
    import deepspeed.runtime.zero.partition_parameters as partition

    source = inspect.getsource(partition)
    for attribute, touching in (
        ("ds_id", compat.is_partitioned),
        ("ds_shape", compat.full_shape),
        ("ds_tensor", compat.local_share),
    ):
        assert re.search(rf"param\.{attribute} = ", source), reason(touching)


def test_an_ordinary_weight_is_not_partitioned_and_its_share_is_all_of_it() -> None:
    p = nn.Parameter(torch.ones(2, 3))
    assert not compat.is_partitioned(p) and compat.full_shape(p) == (2, 3) and compat.local_share(p) is p


def test_deepspeed_leaves_its_zero3_optimizer_in_the_attribute_that_is_removed() -> None:
    import deepspeed.runtime.zero.stage3 as stage3

    why = reason(compat.forget_zero3_optimizer)
    assert "._z3_optimizer = self" in inspect.getsource(stage3), why
    model = nn.Linear(1, 1)
    model.weight._z3_optimizer = model  # type: ignore[assignment]
    compat.forget_zero3_optimizer(model)
    assert not hasattr(model.weight, "_z3_optimizer"), why


def test_the_operator_that_deepspeed_would_compile_is_declared_incompatible() -> None:
    import deepspeed.ops

    why = reason(compat.skip_shared_memory_operator)
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__, why
    compat.skip_shared_memory_operator()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    source = (Path(deepspeed.ops.__file__).parents[1] / "comm" / "torch.py").read_text()
    assert "not deepspeed.ops.__compatible_ops__.get(builder.NAME, False)" in source, why  # then none is compiled


# --- lm_eval, Hydra -------------------------------------------------------------------------------------------------


def test_the_likelihoods_of_lm_eval_go_through_the_method_that_is_overridden() -> None:
    from lm_eval.models.huggingface import HFLM

    why = reason(compat.SharedLikelihoods)
    names = ["self", "requests", "disable_tqdm", "override_bs"]
    for cls in (HFLM, compat.SharedLikelihoods):
        assert list(inspect.signature(cls._loglikelihood_tokens).parameters) == names, why
    assert "self._loglikelihood_tokens(" in inspect.getsource(HFLM.loglikelihood_rolling), why

    class Halves(compat.SharedLikelihoods, HFLM):
        def __init__(self) -> None:
            pass

        def share(self, requests: Any, compute: Any) -> Any:
            return requests[::-1]

    assert Halves()._loglikelihood_tokens([1, 2]) == [2, 1]


def test_hydra_s_own_sweeper_and_launcher_have_the_names_that_they_are_known_by() -> None:
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    def path(cls: type) -> str:
        return f"{cls.__module__}.{cls.__qualname__}"

    for cls in (BasicSweeper, BasicLauncher):
        assert compat.is_basic(path(cls)), reason(compat.is_basic)
    assert not compat.is_basic("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher")


# --- the file itself ------------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    """Neither Python's own names with an underscore, as `__dict__` and `_fields`, or Hydra's (`_target_`)."""
    return name.startswith("_") and not name.endswith("_") and name not in ("_exit", "_fields", "_replace")


def private_parts(source: str) -> Iterator[tuple[int, str]]:
    """(line, expression) of every use of a private attribute of what is neither self nor cls, of a private argument in
    a call, and of a private module.
    """
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            of_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if of_own else [node.attr]
        elif isinstance(node, ast.Call):
            names = [keyword.arg for keyword in node.keywords if keyword.arg]
            if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
                names += [str(argument.value) for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            dotted = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            names = [part for path in dotted for part in path.split(".")]
        if any(map(is_private, names)):
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_no_other_file_touches_a_private_part_of_a_library(file: Path) -> None:
    if file == PACKAGE / "compat.py":
        return
    source = file.read_text(encoding="utf-8")
    found = [f"{file.relative_to(PACKAGE.parent)}:{line}: {text}" for line, text in private_parts(source)]
    assert not found, f"{found}: put a function into soul_exp/compat.py that says why, and a test beside this one"
    words = re.findall(r"hydra\._internal|\bds_(?:id|shape|tensor)\b|_z3_\w+|__compatible_ops__", source)
    assert not words, f"{file.name} names {words}, private parts of libraries: soul_exp/compat.py is the place for them"


def test_a_private_part_is_seen_where_it_is_read_set_called_passed_or_imported() -> None:
    private = ["args._n_gpu", "library.part._ref", "super()._own", "getattr(x, '_a')", "f(_a=1)"]
    private += ["import a._b", "from a._b import c"]
    public = [
        "self._own",
        "x.__dict__",
        "config._target_",
        "f(_partial_=True)",
        "os._exit(1)",
        "a._fields",
        "from a import b",
    ]
    assert {text for _, text in private_parts("\n".join(public + private))} == set(private)


# --- Python ---------------------------------------------------------------------------------------------------------


def test_the_fork_server_is_known_and_ends_when_it_is_stopped() -> None:
    compat.stop_fork_server()
    assert compat.fork_server_pid() is None, reason(compat.fork_server_pid)
    forkserver.set_forkserver_preload([])
    forkserver.ensure_running()
    pid = compat.fork_server_pid()
    assert pid and Path(f"/proc/{pid}").exists(), reason(compat.fork_server_pid)
    compat.stop_fork_server()
    assert compat.fork_server_pid() is None and not Path(f"/proc/{pid}").exists(), reason(compat.stop_fork_server)


def test_the_socket_of_the_fork_server_is_removed_by_a_process_that_skips_the_interpreter_s_end(tmp_path: Path) -> None:
    code = "import os; from multiprocessing import util; from soul_exp import compat; util.get_temp_dir(); "
    code += "compat.remove_fork_server_socket(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=True)
    assert not list(tmp_path.iterdir()), reason(compat.remove_fork_server_socket)


def version_of(library: str) -> str:
    return version(library) if library else platform.python_version()


def functions() -> list[Any]:
    found = [value for name, value in vars(compat).items() if getattr(value, "__module__", "") == compat.__name__]
    return [value for value in found if not value.__name__.startswith("_")]


@pytest.mark.parametrize("function", functions(), ids=lambda function: function.__name__)
def test_each_states_the_library_and_a_version_that_is_not_newer_than_the_installed_one(function: Any) -> None:
    match = re.search(r"([\w-]+) (\d+(?:\.\d+)+)\.$", reason(function))
    assert match is not None, f"{function.__name__} does not end with a library and its version: {reason(function)}"
    seen, installed = (
        [int(part) for part in re.findall(r"\d+", text)[:3]] for text in (match[2], version_of(LIBRARIES[match[1]]))
    )
    assert seen <= installed
    assert function.__name__ in Path(__file__).read_text(), f"{function.__name__} has no test"
