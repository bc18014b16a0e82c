"""What the options of a section must be together; each alone is judged by the schema."""

import re
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from soul_exp import schema
from soul_exp.errors import UsageError, explained
from soul_exp.options import leaves
from soul_exp.ranges import WORDS, Flag, as_typed

WITHOUT_WORDS = ("loss", "optimizer", "adapter", "compute", "train", "prepare", "evaluate")  # sections
GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # to a schedule, by its training
SLOTS = {"prompt": ("{question}",), "answer": ("{answer}",), "system": ("{system}", "{question}")}  # of a template


def check_options(config: Mapping[str, Any]) -> None:
    """Raises UsageError for the first option that does not fit the schema, or the other options of its section."""
    schema.check(config)
    for section in ("train", "prepare"):
        _check_schedule(config[section], section)
    _check_texts(config)
    _check_words(config)


def check_flags(config: Mapping[str, Any]) -> None:
    """Raises UsageError for the first option that has to be true or false and is neither."""
    for key, value, values in schema.declared(config):
        if isinstance(values, Flag) and (message := values.mismatch(key, value)):
            raise UsageError(message)


def _check_texts(config: Mapping[str, Any]) -> None:
    """Whether the template has its slots, and line breaks are such where the user writes what surrounds a row."""
    template, task = config["model"]["template"], config["task"]
    forms = {name: template[name] for name in SLOTS if template.get(name) is not None}
    for name, text in forms.items():
        absent = [slot for slot in SLOTS[name] if slot not in text]
        if absent:
            raise UsageError(
                f"model.template.{name}={text!r}: found no {absent[0]}, expected it at its place in the text"
            )
    written = {f"model.template.{name}": text for name, text in forms.items()}
    given = {f"task.{name}": task.get(name) for name in ("system_prompt", "wordings")}
    written |= {key: "\n".join(map(str, text if isinstance(text, list) else [text])) for key, text in given.items()}
    for key, text in written.items():
        if found := re.search(r"\\[nrt]", text):
            raise UsageError(
                f"{key}={text}: found a backslash and the letter {found[0][1]}, expected a line break or a tab itself: "
                f"in bash type $'{key}=\"...{found[0]}...\"', or write it in a YAML file in double quotes"
            )


def _check_schedule(settings: Mapping[str, Any], section: str) -> None:
    save, every = settings.get("save_steps"), settings.get("logging_steps", 1)
    if save and save % every:  # else a resumed run logs another window
        raise UsageError(
            f"{section}.save_steps={save} is not a multiple of {section}.logging_steps={every}: change one of them"
        )
    scheduler, known = settings.get("lr_scheduler", "linear"), [str(kind.value) for kind in SchedulerType]
    if scheduler not in known:
        raise UsageError(f"{section}.lr_scheduler={scheduler} is unknown{schema.nearest(str(scheduler), known)}")
    if scheduler in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        raise UsageError(f"{section}.lr_scheduler={scheduler} follows an evaluation, which no step has: choose another")
    kwargs = settings.get("lr_scheduler_kwargs")
    found = f"{section}.lr_scheduler={scheduler} with {section}.lr_scheduler_kwargs={as_typed(kwargs)}"
    schedules: Any = TYPE_TO_SCHEDULER_FUNCTION
    takes = signature(schedules[SchedulerType(scheduler)], eval_str=True).parameters
    options = {name: p for name, p in takes.items() if name not in GIVEN}
    for name, value in (kwargs or {}).items():
        if name not in options:
            raise UsageError(f"{found}: {name} is no option of that schedule, it takes {', '.join(options) or 'none'}")
        values = schema.values_of(options[name].annotation)
        if values and (message := values.mismatch(f"{section}.lr_scheduler_kwargs.{name}", value)):
            raise UsageError(message)
    for name, parameter in options.items():
        if parameter.default is parameter.empty and name not in (kwargs or {}):
            raise UsageError(f"{found}: {name} is missing: type '{section}.lr_scheduler_kwargs={{{name}: ...}}'")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    with explained(Exception, found, "give what that schedule takes, as {min_lr_rate: 0.02}"):
        schedule = get_scheduler(scheduler, optimizer, 1, 10, scheduler_specific_kwargs=dict(kwargs or {}))
        optimizer.step()
        schedule.step()


def _check_words(config: Mapping[str, Any]) -> None:
    """Raises UsageError for a text like `no` where none is an option's value: libraries would take it for true."""
    sections = {name: config[name] for name in WITHOUT_WORDS}
    for key, value in leaves({**sections, "model": {"scratch": config["model"].get("scratch")}}, into_lists=True):
        meant = WORDS.get(value.lower()) if isinstance(value, str) else None
        if meant:
            raise UsageError(
                f"{key}={value}: found the text {value!r}, expected true, false or null: type {key}={meant}"
                f"{f' or {key}=null' if meant == 'false' else ''}"
            )
