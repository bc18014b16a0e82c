"""The type and range of every option, as the table or a signature states it; checked before anything else."""

import difflib
from collections.abc import Mapping
from typing import Any

from transformers import SchedulerType

from soul_exp.errors import UsageError
from soul_exp.options import declared, leaves
from soul_exp.ranges import WORDS, Flag

WITHOUT_WORDS = ("loss", "optimizer", "adapter", "compute", "train", "prepare", "evaluate")  # sections


def check_options(config: Mapping[str, Any]) -> None:
    """Raises UsageError for the first option whose value is of the wrong type or out of range."""
    if not isinstance(config["stages"], list):
        raise UsageError(f"stages={config['stages']}: expected a list, such as stages=[evaluate]")
    for key, value, values in declared(config):
        if message := values.mismatch(key, value):
            raise UsageError(message)
    for section in ("train", "prepare"):
        save, every = config[section]["save_steps"], config[section]["logging_steps"]
        if save and save % every:  # else a resumed run logs another window
            raise UsageError(
                f"{section}.save_steps={save} is not a multiple of {section}.logging_steps={every}: change one of them"
            )
        scheduler, known = config[section]["lr_scheduler"], [str(kind.value) for kind in SchedulerType]
        if scheduler not in known:
            near = difflib.get_close_matches(str(scheduler), known, n=1)
            hint = f", did you mean {near[0]}?" if near else f": choose one of {', '.join(known)}"
            raise UsageError(f"{section}.lr_scheduler={scheduler} is unknown{hint}")
    _check_words(config)


def check_flags(config: Mapping[str, Any]) -> None:
    """Raises UsageError for the first option that has to be true or false and is neither."""
    for key, value, values in declared(config):
        if isinstance(values, Flag) and (message := values.mismatch(key, value)):
            raise UsageError(message)


def _check_words(config: Mapping[str, Any]) -> None:
    """Raises UsageError for a text like `no` where none is an option's value: libraries would take it for true."""
    sections = {name: config[name] for name in WITHOUT_WORDS}
    for key, value in leaves({**sections, "model": {"scratch": config["model"]["scratch"]}}, into_lists=True):
        meant = WORDS.get(value.lower()) if isinstance(value, str) else None
        if meant:
            raise UsageError(
                f"{key}={value}: found the text {value!r}, expected true, false or null: type {key}={meant}"
                f"{f' or {key}=null' if meant == 'false' else ''}"
            )
