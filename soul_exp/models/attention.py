"""The implementations of attention: which exist, whether this machine can compute them, and torch's kernels."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from soul_exp import compat
from soul_exp.errors import UsageError

# torch's attention with one of its kernels only, by torch's name for it
KERNELS = {"sdpa_math": "math", "sdpa_flash": "flash", "sdpa_efficient": "mem_efficient", "sdpa_cudnn": "cudnn"}
PACKAGES = {
    "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
    "flash_attention_3": ("flash-attn-3", is_flash_attn_3_available),
}
GPU_KERNELS = ("sdpa_efficient", "sdpa_cudnn")
IN_TORCH = ("sdpa", *KERNELS, "eager")
ATTENTIONS = (*IN_TORCH, *PACKAGES)


def check(attention: Any, device: str, dtype: str) -> None:
    """Raises UsageError unless `attention` is one that this machine can compute, with weights of `dtype`."""
    if attention not in ATTENTIONS:
        raise UsageError(f"model.attention={attention} is unknown: choose one of {', '.join(ATTENTIONS)}")
    if attention in PACKAGES:
        package, is_available = PACKAGES[attention]
        if device != "cuda" or dtype == "float32":
            found = f"model.attention={attention} computes in bfloat16 on a GPU only"
            raise UsageError(f"{found}: choose compute=gpu and precision=bf16_master, or one of {', '.join(IN_TORCH)}")
        if not is_available():
            found = f"model.attention={attention} needs the package {package}, which is not installed here"
            raise UsageError(f"{found}: install it, or choose one of {', '.join(IN_TORCH)}")
    if attention in GPU_KERNELS and device != "cuda":
        raise UsageError(f"model.attention={attention} is a kernel for GPUs: choose sdpa, sdpa_math or sdpa_flash")


def of_family(cls: type[PreTrainedModel], attention: str) -> str:
    """The library's name for `attention` in a model of `cls`; its own, eager, for `sdpa` where it has none of torch's.

    Raises UsageError for any other attention that such models lack.
    """
    name = "sdpa" if attention in KERNELS else attention
    if compat.has_attention(cls, name):
        return name
    if attention != "sdpa":
        found = f"model.attention={attention}: the library has no such attention for {cls.__name__}"
        raise UsageError(f"{found}: type model.attention=eager")
    return "eager"


def choose_kernel(attention: str) -> None:
    """Let torch's attention use only the kernel that `attention` names, if it names one, in this whole process."""
    if attention in KERNELS:
        for name, kernel in KERNELS.items():
            getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(name == attention)  # they apply on the CPU as well
