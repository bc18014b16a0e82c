"""The type and range of every number and text that the command line takes; checked before anything else."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import SchedulerType

from soul_exp.errors import UsageError
from soul_exp.ranges import COUNT, POSITIVE, SEED, SHARE, SOME, Number

TRAINING = {
    "epochs": POSITIVE,
    "batch_size": COUNT,
    "micro_batch_size": SOME,
    "warmup_ratio": SHARE,
    "max_grad_norm": Number(0),
    "logging_steps": COUNT,
    "save_steps": SOME,
}
NUMBERS = {
    "seed": SEED,
    **{f"train.{key}": number for key, number in TRAINING.items()},
    "train.max_steps": SOME,
    "train.diverged_at": Number(0, above=True, null=True),
    "train.diverged_floor": Number(0),
    **{f"prepare.{key}": number for key, number in TRAINING.items()},
    "prepare.seed": SEED,
    "prepare.adamw.lr": POSITIVE,
    "evaluate.batch_size": COUNT,
    "evaluate.max_new_tokens": COUNT,
    "best_keep": Number(0, 1),
    "utility_limit": SOME,
    "compute.processes": COUNT,
    "compute.threads": COUNT,
    "loss.gamma": Number(0),
    "loss.layer": Number(0, whole=True, null=True),
    "optimizer.lr": POSITIVE,
    "model.max_length": COUNT,
    "task.num_authors": SOME,
    "task.num_forget_authors": SOME,
    "task.num_holdout_authors": Number(0, whole=True, null=True),
    "task.validation_fraction": Number(0, 0.5, null=True),
    "task.num_passages": COUNT,
    "task.num_holdout_passages": Number(0, whole=True),
    "task.num_retain_passages": COUNT,
    "task.num_general_passages": COUNT,
    "task.max_probe_rows": COUNT,
    "task.max_forget_probe_rows": COUNT,
    "task.num_forget": SOME,
    "task.num_prompts": COUNT,
    "task.num_polite": Number(0, whole=True, null=True),
    "task.num_rtp_prompts": COUNT,
    "task.answer_words": COUNT,
    "task.lead_words": SOME,
    "task.tokens_per_word": POSITIVE,
}
CONSTANTS = {  # of the forget terms of soul_exp.losses; a loss of somebody else's may mean other things by them
    "beta": POSITIVE,
    **dict.fromkeys(("alpha", "beta1", "beta2"), Number(0)),
    "steering": POSITIVE,
    "seed": SEED,
}
TEXTS = {"name": False, "task.source": False, "task.scorer": False, "cache": False}  # key -> whether null is allowed
TEXTS |= dict.fromkeys(("model.path", "model.revision", "model.tokenizer", "retrained.path"), True)
TEXTS |= dict.fromkeys(("retrained.records", "task.system_prompt", "model.template.system"), True)
TEXTS |= dict.fromkeys(("task.forget", "task.retain", "task.holdout", "task.revision"), True)
TEXTS |= dict.fromkeys(("task.rtp", "task.scorer_revision", "utility_data"), True)
FLAGS = (  # options that are true or false
    *("overwrite", "input_based", "train.log_gradients", "train.gradient_checkpointing", "train.dropout"),
    *("model.knows_general", "task.train_general", "task.trained_before", "adapter.merge", "loss.forget_term.plain"),
)
WORDS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}  # YAML 1.1's
WORDS |= {"y": "true", "t": "true", "n": "false", "f": "false"}
MEANT = {**WORDS, "1": "true", "0": "false", "none": "false"}
WITHOUT_WORDS = ("loss", "optimizer", "adapter", "compute", "train", "prepare", "evaluate")  # sections
SUITES = ("paper", "embedded", "none")


def check_options(config: Mapping[str, Any]) -> None:
    """Raises UsageError for the first option whose value is of the wrong type or out of range."""
    check_flags(config)
    if not isinstance(config["stages"], list):
        raise UsageError(f"stages={config['stages']}: expected a list, such as stages=[evaluate]")
    for key, null in TEXTS.items():
        present, value = _at(config, key)
        if present and not (isinstance(value, str) or (null and value is None)):
            raise UsageError(f"{key}={value}: expected a text{', or null' if null else ''}")
    for key, number in NUMBERS.items():
        present, value = _at(config, key)
        if present and not number.fits(value):
            raise UsageError(f"{key}={value}: expected {number.expected()}")
    if config["utility_suite"] not in SUITES:
        raise UsageError(f"utility_suite={config['utility_suite']} is unknown: choose {', '.join(SUITES)} or auto")
    term = config["loss"].get("forget_term")
    if isinstance(term, Mapping) and str(term.get("_target_")).startswith("soul_exp.losses."):
        for key in CONSTANTS.keys() & term.keys():
            if not CONSTANTS[key].fits(term[key]):
                raise UsageError(f"loss.forget_term.{key}={term[key]}: expected {CONSTANTS[key].expected()}")
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
    """Raises UsageError for the first option of FLAGS that is neither true nor false: any text would count as true."""
    for key in FLAGS:
        present, value = _at(config, key)
        if present and not isinstance(value, bool):
            found = f"the text {value!r}" if isinstance(value, str) else "null" if value is None else f"{value}"
            meant = MEANT.get(str(value).lower())
            typed = f"{key}={meant}" if meant else f"{key}=true or {key}=false"
            shown = "null" if value is None else value
            raise UsageError(f"{key}={shown}: found {found}, expected true or false: type {typed}")


def _check_words(config: Mapping[str, Any]) -> None:
    """Raises UsageError for a text like `no` where none is an option's value: libraries would take it for true."""
    sections = {name: config[name] for name in WITHOUT_WORDS}
    for key, value in _texts({**sections, "model.scratch": config["model"]["scratch"]}):
        meant = WORDS.get(value.lower())
        if meant:
            raise UsageError(
                f"{key}={value}: found the text {value!r}, expected true, false or null: type {key}={meant}"
                f"{f' or {key}=null' if meant == 'false' else ''}"
            )


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text below `node`."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping | list):
        inner = node.items() if isinstance(node, Mapping) else enumerate(node)
        for name, value in inner:
            yield from _texts(value, f"{key}.{name}" if key else str(name))


def _at(config: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False, None
        value = value[name]
    return True, value
