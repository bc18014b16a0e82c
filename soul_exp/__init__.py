"""Second-order unlearning of language models: experiments that a hostile reviewer can reproduce."""

import os
import sys
from typing import Any

__version__ = "0.1.0"

LIBRARIES = (  # what a user's own file may hide, beside Python's own modules: each dependency's modules
    *("accelerate", "datasets", "deepspeed", "filelock", "hydra", "hydra_plugins", "jinja2", "lm_eval", "matplotlib"),
    *("nltk", "numpy", "omegaconf", "pandas", "peft", "plotly", "pytorch_optimizer", "yaml", "regex", "rouge_score"),
    *("sacrebleu", "safetensors", "sklearn", "scipy", "tokenizers", "torch", "tqdm", "transformers", "wandb"),
)
UNUSED = ("chunk", "cmd", "code", "crypt", "this", "trace", "turtle", "wave")  # which no command imports


def hidden_module(folder: str) -> str | None:
    """The name in `folder` under which Python would import a user's file instead of a module of its own or LIBRARIES.

    It uses only what Python has imported before it can look into `folder`.
    """
    names = {*sys.stdlib_module_names, *LIBRARIES}.difference(UNUSED)
    for entry in sorted(os.listdir(folder or ".")):
        name, suffix = os.path.splitext(entry)
        is_package = not suffix and os.path.isfile(os.path.join(folder, entry, "__init__.py"))
        if name in names and (suffix == ".py" or is_package):
            return entry
    return None


if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:  # Python looks first into the folder the command was typed in
    try:
        _found = hidden_module(sys.path[0])
    except OSError:  # it cannot read that folder either
        _found = None
    if _found:
        _what = f"{os.path.join(sys.path[0], _found)} hides the Python module {_found.removesuffix('.py')}"
        sys.exit(f"soul_exp: {_what}: rename it, or type the command in another folder")


def __getattr__(name: str) -> Any:
    """`soul_exp.load(folder)`, imported when it is used: nothing that the package runs depends on reports."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module("soul_exp.report.frames").load
