"""The weight files of a checkpoint compared, by headers and in the library's way, with the model that reads them."""

import copy
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as library
from transformers.utils.hub import get_checkpoint_shard_files

from soul_exp import compat
from soul_exp.errors import UsageError, explained

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# constants that older versions of the library saved with the weights: masks of attention, and angles of positions
CONSTANT = re.compile(r"(attn|attention)\.((masked_)?bias|causal_mask)$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
NAMED = 3  # keys of each kind in a message
BUILD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,  # of a configuration's field
)
FLOATS = ("F64", "F32", "F16", "BF16")  # in which weights can be trained; F8 and less are quantised
SMALL_FILE = 100 * 2**20  # bytes: up to this size the check reads every value of a file, in a moment
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Header:
    """The tensors of a checkpoint: key -> file, shape, and dtype as safetensors names it."""

    files: Mapping[str, Path]
    shapes: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, str]

    @property
    def quantised(self) -> list[str]:
        return [key for key, dtype in self.dtypes.items() if dtype not in FLOATS]

    def without(self, keys: Collection[str]) -> dict[str, Tensor]:
        """key -> a float tensor of that shape without storage, for all keys but `keys`."""
        kept = {key: shape for key, shape in self.shapes.items() if key not in keys}
        return {key: torch.empty(tuple(shape), device="meta") for key, shape in kept.items()}

    def tensor(self, key: str) -> Tensor:
        with safe_open(self.files[key], "pt") as file:
            return file.get_tensor(key)


def files_in(folder: Path, label: str) -> list[Path]:
    """The weight files of `folder` that the library reads. Raises UsageError if they are not exactly one set."""
    if gone := next((path for path in sorted(folder.glob("*.safetensors")) if not path.is_file()), None):
        raise UsageError(f"{label}: {gone.name} is no file but a folder or a broken link: copy the checkpoint again")
    shards = {path.name for path in folder.iterdir() if SHARD.fullmatch(path.name)}
    if (folder / SINGLE).is_file():
        if shards:
            raise UsageError(f"{label} has {SINGLE} beside {min(shards)}: keep one of the two sets of weights")
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        found = min(path.name for path in folder.glob("*.safetensors"))
        raise UsageError(f"{label} has {found}, but neither {SINGLE} nor {INDEX}: copy the missing file")
    errors = (ValueError, TypeError, KeyError, AttributeError)
    with explained(errors, f"{label}: {INDEX} is no index of weights", "copy it again"):
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    absent = sorted(str(name) for name in names if not isinstance(name, str) or not (folder / name).is_file())
    problems = [f"names {name}, which does not exist" for name in absent]
    problems += [f"does not name {name}" for name in sorted(shards - names)]
    if problems:
        raise UsageError(f"{label}: {INDEX} {problems[0]}: copy the checkpoint again")
    return [folder / name for name in sorted(names)]


def check_arrived(path: Path, label: str) -> None:
    """Raises UsageError if the file `path` is empty, or what Git leaves in the place of a file that it has not got."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(LFS))
        if start == LFS:
            raise UsageError(f"{label}: {path.name} is a pointer of Git LFS: type git lfs pull in that folder")
        if not start:
            raise UsageError(f"{label}: {path.name} is empty: copy it again")


def check_finite(files: Sequence[Path], label: str) -> None:
    """Raises UsageError if a value in `files` is not finite; above SMALL_FILE it is known once the model is loaded."""
    for path in files:
        if path.stat().st_size <= SMALL_FILE:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    if not torch.isfinite(file.get_tensor(key)).all():
                        raise UsageError(
                            f"{label} has weights that are not finite numbers ({key}): copy or train it again"
                        )


def downloaded(path: str, revision: str | None) -> list[Path]:
    """The weight files of a hub name; none if it has only pickled ones, which the hub converts."""
    single = compat.cached_file_if_present(path, SINGLE, revision)
    index = compat.cached_file_if_present(path, INDEX, revision) if single is None else None
    if index is None:
        return [Path(single)] if single else []
    return [Path(name) for name in get_checkpoint_shard_files(path, index, revision=revision)[0]]


def read_header(files: Sequence[Path], label: str) -> Header:
    """The header of all `files` together. Raises UsageError for a damaged file."""
    header = Header({}, {}, {})
    for path in files:
        check_arrived(path, label)
        damaged = explained((SafetensorError, OSError), f"{label}: {path} is damaged", "copy or save it again")
        with damaged, safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(key)
                header.files[key], header.shapes[key] = path, part.get_shape()  # type: ignore[index]
                header.dtypes[key] = part.get_dtype()  # type: ignore[index]
    return header


def check(cls: type[PreTrainedModel], config: Any, header: Header, label: str) -> None:
    """Raises UsageError unless `header` holds each weight of the model `config`, in its shape, and nothing else."""
    model, found = _loaded(cls, config, header.without(()), label)
    check_report(found, type(model).__name__, label)
    if quantised := header.quantised:  # attention masks, which the library ignores, are integers too
        kept, weights = _loaded(cls, config, header.without(quantised), label)[1], model.state_dict()
        missing = [name for name in sorted(kept["missing_keys"]) if weights[name].is_floating_point()]
        if missing:
            raise UsageError(
                f"{label} holds {header.dtypes[quantised[0]]} numbers for {_named(missing)}: quantised weights cannot "
                f"be trained, give the checkpoint from which they were made"
            )


def check_report(found: Mapping[str, Any], model: str, label: str) -> None:
    """Raises UsageError if the library's loading report names a key that is missing, unexpected or of another shape."""
    kinds = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(key for key in found["unexpected_keys"] if not CONSTANT.search(key)),
        "of another shape": [
            f"{key} ({list(there)} in the file, {list(wanted)} in the model)"
            for key, there, wanted in sorted(found["mismatched_keys"])
        ],
    }
    differing = [f"{len(keys)} {kind} ({_named(keys)})" for kind, keys in kinds.items() if keys]
    if differing:
        unlike = f"{label} does not hold the weights of {model}, as its config.json describes it"
        raise UsageError(f"{unlike}: {'; '.join(differing)}: give a checkpoint as save_pretrained writes it")


def contradicts_tying(cls: type[PreTrainedModel], config: Any, header: Header, label: str) -> bool:
    """Whether `config` ties weights that the files hold with different values."""
    if not config.tie_word_embeddings:
        return False
    tied = dict(_loaded(cls, config, header.without(()), label)[0].all_tied_weights_keys)
    apart = copy.deepcopy(config)
    apart.tie_word_embeddings = False
    model, found = _loaded(cls, apart, header.without(()), label)
    pairs = [pair for pair in tied.items() if not found["missing_keys"] & set(pair)]
    if not pairs:
        return False
    shapes = {tuple(model.state_dict()[name].shape) for pair in pairs for name in pair}
    keys = {
        name: key
        for key, shape in header.shapes.items()
        if tuple(shape) in shapes
        for name in _loaded(cls, apart, header.without([key]), label)[1]["missing_keys"] - found["missing_keys"]
    }
    return any(not torch.equal(*(header.tensor(keys[name]) for name in pair)) for pair in pairs)


def _loaded(
    cls: type[PreTrainedModel], config: Any, tensors: Mapping[str, Tensor], label: str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model `config` with `tensors`, which have no storage, and the library's report of mismatches."""
    building = explained(BUILD_ERRORS, f"{label}: config.json and weights make no model", "copy both again")
    level = library.get_verbosity()
    library.set_verbosity_error()  # it prints the report
    try:
        with building, compat.no_remembered_deepspeed():
            return cls.from_pretrained(  # type: ignore[return-value]
                None, config=copy.deepcopy(config), state_dict=dict(tensors), device_map="meta", dtype=torch.float32,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    finally:
        library.set_verbosity(level)


def _named(keys: Sequence[str]) -> str:
    return ", ".join(keys[:NAMED]) + (", ..." if len(keys) > NAMED else "")
