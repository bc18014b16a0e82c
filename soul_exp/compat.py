"""All that the program touches of the private parts of libraries: one function each, with the version and the reason.

Each docstring ends with the version in which the private name was last seen, and is the message of the test that fails
once the name is gone (tests/test_compat.py). Libraries are imported where they are needed: the command line stays fast.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import Trainer, TrainingArguments

# --- transformers -------------------------------------------------------------------------------------------------


@contextmanager
def no_remembered_deepspeed() -> Iterator[None]:
    """In the block, transformers does not know of the ZeRO configuration of an earlier training in this process.

    While `transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref` holds one, every model is built with
    partitioned weights; the public functions can set and unset it, but not read it. transformers 5.23.0.
    """
    library: Any = sys.modules.get("transformers.integrations.deepspeed")
    reference = library and library._hf_deepspeed_config_weak_ref
    config = reference() if reference else None
    if config is None:
        yield
        return
    library.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        library.set_hf_deepspeed_config(config)


def set_last_logged_step(trainer: Trainer, step: int) -> None:
    """Make `trainer` log the mean loss over the steps after `step`.

    A training begins with `Trainer._globalstep_last_logged` at the step of its state, which is still 0 for one that a
    callback moves to a later step; no argument sets it. transformers 5.23.0.
    """
    trainer._globalstep_last_logged = step


def use_one_device(args: TrainingArguments) -> None:
    """Let a training use one GPU of those that the process sees.

    Trainer wraps the model in DataParallel where `TrainingArguments._n_gpu`, which has no argument, is above 1: that
    would divide the parts of a batch among the GPUs. transformers 5.23.0.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1


class OwnCheckpointReading:
    """Before Trainer among the bases: `read_checkpoint(folder)` reads a checkpoint's weights in place of Trainer's way.

    Trainer calls `Trainer._load_from_checkpoint(resume_from_checkpoint, model)`; its own reads neither weights that
    ZeRO-3 divides nor the names in which this program saves them. transformers 5.23.0.
    """

    read_checkpoint: Callable[[Path], None]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.read_checkpoint(Path(resume_from_checkpoint))


def attention_of(model: Any) -> str | None:
    """The name of the attention that `model` computes with; None if it has no configuration.

    `PretrainedConfig._attn_implementation` is the only place where it stands; `set_attn_implementation` is public.
    transformers 5.23.0.
    """
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def has_attention(cls: type, name: str) -> bool:
    """Whether models of `cls` can compute with the library's attention `name`; every one can with "eager".

    Only the flags `PreTrainedModel._supports_sdpa` and `_supports_flash_attn` of the class say so; the public way is to
    build a model and to read the error. transformers 5.23.0.
    """
    if name.startswith("flash"):
        return bool(cls._supports_flash_attn)  # type: ignore[attr-defined]
    return name != "sdpa" or bool(cls._supports_sdpa)  # type: ignore[attr-defined]


def cached_file_if_present(path: str, name: str, revision: str | None) -> str | None:
    """The cached or downloaded file `name` of the hub entry `path`; None if the entry does not have it.

    `transformers.utils.cached_file` raises for a missing file unless `_raise_exceptions_for_missing_entries` is false.
    transformers 5.23.0.
    """
    from transformers.utils import cached_file

    return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)


def go_offline() -> None:
    """Let the libraries of the hub use their local cache only, as if HF_HUB_OFFLINE had been set before their import.

    They read these constants at each use: huggingface_hub 2.4.0, datasets 5.2.0.
    """
    import datasets.config
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


# --- torch --------------------------------------------------------------------------------------------------------


def remove_empty_inductor_cache() -> None:
    """Remove the folder that torch makes beside other temporary files as torch._dynamo is imported, unless it is used.

    What compiles makes it again. torch 2.13.0.
    """
    made = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))  # which it then sets
    if made.parent == Path(tempfile.gettempdir()) and made.name.startswith("torchinductor_"):
        with suppress(OSError):  # it is not empty, or gone
            made.rmdir()


def is_dropout(module: nn.Module) -> bool:
    """Whether `module` is a dropout layer: `torch.nn.modules.dropout._DropoutNd` has no public name. torch 2.13.0."""
    from torch import nn

    return isinstance(module, nn.modules.dropout._DropoutNd)


def shallow_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` without forward hooks that shares its parameters and children; children can be exchanged.

    `copy.copy` shares the dictionaries `torch.nn.Module._modules`, `_forward_hooks` and `_forward_pre_hooks`, so that a
    change of the copy would change the original; torch has no public shallow copy. torch 2.13.0.
    """
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    copied._forward_pre_hooks, copied._forward_hooks = OrderedDict(), OrderedDict()
    return copied


def remove_forward_hooks(module: nn.Module) -> None:
    """Remove all forward hooks of `module` and of the modules below it.

    A hook can be removed by the handle of who registered it only; a deep copy has hooks without handles. They are in
    `torch.nn.Module._forward_hooks` and `_forward_pre_hooks`. torch 2.13.0.
    """
    for part in module.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()


# --- DeepSpeed ----------------------------------------------------------------------------------------------------


def is_partitioned(p: Tensor) -> bool:
    """Whether ZeRO-3 has divided the weight `p`: it then has the attribute `ds_id`. DeepSpeed 0.19.8."""
    return hasattr(p, "ds_id")


def full_shape(p: Tensor) -> torch.Size:
    """The shape of the complete `p`: `ds_shape` if ZeRO-3 divides it, whose `p.shape` is [0]. DeepSpeed 0.19.8."""
    return getattr(p, "ds_shape", p.shape)


def local_share(p: Tensor) -> Tensor:
    """This rank's values of `p`: the flat `ds_tensor` if ZeRO-3 divides it, else all of them. DeepSpeed 0.19.8."""
    return getattr(p, "ds_tensor", p)


def forget_zero3_optimizer(model: nn.Module) -> None:
    """Free the ZeRO-3 optimizer with its momentum and fp32 weights.

    `engine.destroy()` leaves it in the attribute `_z3_optimizer` of every parameter. DeepSpeed 0.19.8.
    """
    for p in model.parameters():
        p.__dict__.pop("_z3_optimizer", None)


def skip_shared_memory_operator() -> None:
    """Keep DeepSpeed from compiling `deepspeed_shm_comm`, which only inference uses: without a C++ compiler it stops.

    It compiles what `deepspeed.ops.__compatible_ops__` declares compatible. DeepSpeed 0.19.8.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# --- lm_eval ------------------------------------------------------------------------------------------------------


class SharedLikelihoods:
    """Before HFLM among the bases: `share(requests, compute)` decides which rank computes which requests.

    All likelihoods of lm_eval's tasks go through `HFLM._loglikelihood_tokens(requests, disable_tqdm, override_bs)`;
    its public ways to use several processes start them by themselves. `compute` is HFLM's own, of some requests in one
    batch. lm_eval 0.4.13.
    """

    share: Callable[[Sequence[Any], Callable[[Sequence[Any]], list[tuple[float, bool]]]], list[tuple[float, bool]]]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        own: Any = super()
        return self.share(requests, lambda chosen: list(own._loglikelihood_tokens(chosen, True, len(chosen))))


# --- Hydra --------------------------------------------------------------------------------------------------------


def is_basic(target: str) -> bool:
    """Whether the `_target_` of hydra.sweeper or hydra.launcher is Hydra's own.

    Its jobs can be counted before they start, and run one after the other. `BasicSweeper` and `BasicLauncher` in
    `hydra._internal.core_plugins` have no public name. hydra-core 1.3.8.
    """
    basic = {f"hydra._internal.core_plugins.basic_{kind.lower()}.Basic{kind}" for kind in ("Sweeper", "Launcher")}
    return target in basic


# --- Python -------------------------------------------------------------------------------------------------------


def fork_server_pid() -> int | None:
    """The process id of the fork server that this process has started; None if it has not.

    `multiprocessing.forkserver` tells nobody when it starts a new server in place of a dead one; `_forkserver_pid` of
    its only object `_forkserver` does. Python 3.11.
    """
    return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]


def stop_fork_server() -> None:
    """End the fork server of this process, if there is one; the next start makes a new one.

    A server keeps the environment in which it has imported everything, and `_forkserver._stop` alone forgets it; it
    waits until the server ends, which may hold on as long as any process that it has forked. Python 3.11.
    """
    if pid := fork_server_pid():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def remove_fork_server_socket() -> None:
    """Remove the folder of the fork server's socket, as the interpreter's end does; for a process that skips that.

    `multiprocessing.util._run_finalizers` does it, and `atexit` alone calls it. Python 3.11.
    """
    util._run_finalizers()  # type: ignore[attr-defined]
