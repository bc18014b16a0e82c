"""Low-rank adapters: a model wrapped so that only they are trained; saved, read back, merged into its weights."""

import functools
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeGuard, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from soul_exp import compat
from soul_exp.errors import UsageError, explained
from soul_exp.models.weight_files import BUILD_ERRORS, FLOATS, check_arrived
from soul_exp.ranges import COUNT, POSITIVE

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft calls them
GROWN = "vocabulary_has_grown"  # an attribute of a model that got an embedding row for a new token


@dataclass(frozen=True)
class Lora:
    """W becomes W + (alpha / r) B A, A random and B = 0 at the start. Source: Hu et al. 2021 (arXiv 2106.09685)."""

    r: Annotated[int, COUNT]
    alpha: Annotated[float, POSITIVE]
    dropout: float
    target_modules: str | Sequence[str]  # "all-linear", a pattern for complete module paths, or last names of paths
    merge: bool

    def __post_init__(self) -> None:
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UsageError(f"adapter.dropout={self.dropout}: expected a number of 0 or more, below 1")
        names = [self.target_modules] if isinstance(self.target_modules, str) else list(self.target_modules or ())
        if not names or not all(isinstance(name, str) and name for name in names):
            found = f"adapter.target_modules={self.target_modules}"
            raise UsageError(f"{found}: expected all-linear or a list such as [q_proj,v_proj]")

    def wrapped(self, model: PreTrainedModel, seed: int, revision: str | None = None) -> PreTrainedModel:
        """`model` with an adapter of its dtype, and everything else frozen; A depends on `seed` alone.

        `revision` is the model's on the hub, for those who load the adapter later. Raises UsageError where the adapter
        does not fit the model. It is a PeftModel, which has all methods of a PreTrainedModel that are used here.
        """
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        config = peft.LoraConfig(
            r=self.r, lora_alpha=cast(int, self.alpha), lora_dropout=self.dropout, target_modules=targets,
            task_type="CAUSAL_LM", revision=revision,
        )  # fmt: skip
        paths = [f".{path}" for path in _matrices(model)]
        listed = targets if isinstance(targets, list) else []
        missing = [name for name in listed if not any(path.endswith(f".{name}") for path in paths)]
        if missing:  # peft raises only if it finds none of them
            raise UsageError(f"adapter.target_modules: the model has no {missing[0]}, it has {_choices(model)}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            unfit = f"adapter.target_modules={self.target_modules} does not fit the model, which has {_choices(model)}"
            with explained(ValueError, unfit, "name some of these"):
                made = _with_adapter(model, config)
        ends = made.get_input_embeddings(), made.get_output_embeddings()
        if self.merge and model.config.tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
            raise UsageError(
                "adapter.merge=true cannot add to the embedding and not to the output head, which share their weights "
                "in this model: leave both out of adapter.target_modules"
            )
        return cast(PreTrainedModel, made)


def coverage(model: PreTrainedModel) -> str:
    """One line: the matrices of the wrapped `model` that have an adapter, with their share of its values, and the rest.

    Experts that a model keeps in one tensor are a matrix each, under the name of the tensor.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = [(path.replace(".base_layer", ""), module) for path, module in bare(model).named_modules()]
    layers = [(path, module) for path, module in named if isinstance(module, BaseTunerLayer)]
    adapted = {(path, getattr(module, "parameter_name", "weight")) for path, module in layers}
    sizes: dict[bool, dict[str, int]] = {True: {}, False: {}}  # with an adapter or without: name -> values
    for name, p in bare(model).named_parameters():
        owner, _, last = name.replace(".base_layer", "").rpartition(".")
        if p.ndim > 1 and ".lora_" not in name:
            shown, own = owner.rpartition(".")[2], sizes[(owner, last) in adapted]
            shown = shown if last == "weight" else f"{shown}.{last}"
            own[shown] = own.get(shown, 0) + p.numel()
    values = {has: sum(names.values()) for has, names in sizes.items()}
    share = values[True] / sum(values.values())
    return f"adapter: on {', '.join(sizes[True])} ({share:.0%} of the values), not on {', '.join(sizes[False]) or '-'}"


def is_wrapped(model: nn.Module) -> "TypeGuard[PeftModel]":
    """Whether `model` is in the wrapper of an adapter: only if peft has been imported."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model without the wrapper, in place, with the adapter's products B A added to its weights."""
    return cast("PeftModel", model).merge_and_unload()


def train_adapter(model: nn.Module) -> None:
    """Let a training change the matrices of an adapter only, or all weights of a model without one."""
    adapted = is_wrapped(model)
    for name, p in model.named_parameters():
        p.requires_grad_(not adapted or ".lora_" in name)


def bare(model: PreTrainedModel) -> PreTrainedModel:
    """The causal model itself: without the wrapper of an adapter, but with the adapter's matrices in its layers."""
    return cast(PreTrainedModel, model.get_base_model()) if is_wrapped(model) else model


def embedding_of(model: PreTrainedModel) -> nn.Embedding:
    """The input embedding itself, without what an adapter has put around it; of two, the base's: both have its rows."""
    embedding = model.get_input_embeddings()
    return cast(nn.Embedding, next((part for part in embedding.modules() if isinstance(part, nn.Embedding)), embedding))


def train_dropout(model: nn.Module) -> None:
    """Put the dropout of an adapter that is trained into training mode, and nothing else."""
    for module in model.modules():
        if hasattr(module, "lora_dropout") and any(p.requires_grad for p in module.parameters()):
            cast(nn.Module, module.lora_dropout).train()


def is_adapter(path: str) -> bool:
    """Whether `path` is a folder that holds an adapter."""
    return (Path(path) / SETTINGS).is_file()


def reads_embedding(path: str) -> bool:
    """Whether `path` is a folder with an adapter that adds to rows of the embedding, and so reads all of its values."""
    return is_adapter(path) and bool(json.loads((Path(path) / SETTINGS).read_text()).get("trainable_token_indices"))


def save(model: "PeftModel", folder: Path) -> None:
    """Write adapter_config.json, which names the base, and adapter_model.safetensors."""
    grown = getattr(model, GROWN, False)  # then the base does not have all rows of the embedding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it saves the embedding, as requested
        model.save_pretrained(str(folder), save_embedding_layers=grown)
    (folder / "README.md").unlink()  # peft's model card to be filled in


def base_of(folder: Path) -> tuple[str, str | None]:
    """The path or hub name, and the revision, of the model that the adapter in `folder` is for.

    Raises UsageError where that is an adapter too, perhaps this one.
    """
    settings = json.loads((folder / SETTINGS).read_text())
    base = settings["base_model_name_or_path"]
    if is_adapter(base):
        found = f"the adapter {folder} names as its base {base}, which is an adapter"
        raise UsageError(f"{found}: name a complete model in its {SETTINGS}")
    return base, settings.get("revision")


def check_files(folder: Path, option: str) -> None:
    """Raises UsageError unless `folder` holds a LoRA adapter that can be read without unpickling anything."""
    for name in (SETTINGS, WEIGHTS):
        check_arrived(folder / name, f"{option}={folder}")
    with explained((TypeError, ValueError), f"{option}={folder}: {SETTINGS} cannot be read", "save the adapter again"):
        settings = dict(json.loads((folder / SETTINGS).read_text()))
    if settings.get("peft_type") != "LORA":
        raise UsageError(f"{option}={folder} holds an adapter of peft_type {settings.get('peft_type')}: expected LORA")
    if not isinstance(settings.get("base_model_name_or_path"), str):
        raise UsageError(f"{option}={folder}: {SETTINGS} names no base: give base_model_name_or_path there")
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"{option}={folder} has no {WEIGHTS}: save the adapter again with peft's save_pretrained")
    damaged = explained((SafetensorError, OSError), f"{option}: {folder / WEIGHTS} is damaged", "copy or save it again")
    with damaged, safe_open(folder / WEIGHTS, "pt"):
        pass


def grow(base: PreTrainedModel, folder: Path) -> None:
    """Give `base` as many embedding rows as the adapter in `folder` has, if it has an embedding of its own."""
    embedding = base.get_input_embeddings()
    path = next(path for path, module in base.named_modules() if module is embedding)
    with safe_open(folder / WEIGHTS, "pt") as file:
        name = f"base_model.model.{path}.weight"
        rows = file.get_slice(name).get_shape()[0] if name in file.keys() else 0  # noqa: SIM118 - no mapping
    if rows > cast(nn.Embedding, embedding).num_embeddings:
        base.resize_token_embeddings(rows, mean_resizing=False)  # the adapter has all of their values
        setattr(base, GROWN, True)


def attached(base: PreTrainedModel, folder: Path, weights: bool = True) -> PreTrainedModel:
    """`base` with the adapter in `folder`, frozen. Raises UsageError if the adapter does not fit `base`.

    With `weights` false the adapter's values are not read, for a `skeleton` as the base.
    """
    import peft

    mismatch = f"the adapter {folder} does not fit its base {base_of(folder)[0]}"
    with explained(BUILD_ERRORS, mismatch, f"name the right base_model_name_or_path in {SETTINGS}"):
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        model = _with_adapter(base, config)
    states = functools.partial(peft.get_peft_model_state_dict, model)
    wanted, complete = (
        {name: list(compat.full_shape(value)) for name, value in states(save_embedding_layers=all_).items()}
        for all_ in (False, True)  # embedding and head need not be in the file, but peft writes them if they have grown
    )
    with safe_open(folder / WEIGHTS, "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    found = {name: list(part.get_shape()) for name, part in parts.items()}
    if quantised := [name for name, part in parts.items() if part.get_dtype() not in FLOATS]:
        found_dtype = parts[quantised[0]].get_dtype()
        raise UsageError(
            f"the adapter {folder} holds {found_dtype} numbers for {quantised[0]}: give unquantised weights"
        )
    wanted |= {name: complete[name] for name in found if name in complete}
    for name in dict.fromkeys([*wanted, *found]):
        if wanted.get(name) != found.get(name):
            raise UsageError(
                f"{mismatch}: {name} is {found.get(name) or 'absent'} in the adapter, {wanted.get(name) or 'absent'} "
                f"in the base: name the right base_model_name_or_path in {SETTINGS}"
            )
    if weights:
        restore(model, folder, is_trainable=False)
    return cast(PreTrainedModel, model)


def restore(model: "PeftModel", folder: Path, is_trainable: bool = True) -> None:
    """Copy the values in `folder` into the adapter of `model`, whose parameters stay the same objects."""
    # autocast would replace the parameters of a bf16 adapter by fp32 ones
    model.load_adapter(
        str(folder), "default", is_trainable=is_trainable, torch_device="cpu", autocast_adapter_dtype=False
    )


def _with_adapter(model: PreTrainedModel, config: "LoraConfig") -> "PeftModel":
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls deprecated functions of transformers
        for message in (".*tie_word_embeddings.*", "fan_in_fan_out is set"):  # `wrapped` and peft handle both
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        # of patterns that peft itself writes for fused experts
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match", category=RuntimeWarning)
        # autocast would give fp32 adapters to bf16 weights
        return cast("PeftModel", peft.get_peft_model(model, config, autocast_adapter_dtype=False))


def _matrices(model: nn.Module) -> list[str]:
    """The paths of the modules that hold a matrix."""
    named = model.named_modules()
    return [path for path, module in named if path and getattr(getattr(module, "weight", None), "ndim", 0) == 2]


def _choices(model: nn.Module) -> str:
    return ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in _matrices(model)))
