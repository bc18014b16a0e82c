"""What a configuration must look like: its sections, the options of each, and the values that each option may have.

Beside a `_target_` stand the parameters of its signature, in a section without one those of SECTIONS. Ranges are
options.TABLE's or the signature's own; what neither states is judged by the type that the signature gives.
"""

import difflib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any, get_args, get_origin

from soul_exp.errors import UsageError
from soul_exp.options import option_of, parameters_of
from soul_exp.ranges import FLAG, NAMED, TEXT, TEXT_OR_NULL, Typed, Values, as_typed

INSTRUCTIONS: dict[str, Values] = {
    "_target_": TEXT,
    "_partial_": FLAG,
    "_args_": Typed(list),
    "_recursive_": FLAG,
    "_convert_": TEXT,
}
TASKS = ("custom", "tofu", "copyright", "detox")
MOST_NAMES = 40  # in a message
SCHEDULE = "soul_exp.training.schedule.Schedule"
ATTACKS = "attack.*"  # the section of each attack


@dataclass(frozen=True)
class Section:
    """A section that every configuration has: options that it must have, and others that it may have."""

    needs: str = ""
    may: str = ""
    takes: str | None = None  # a callable whose parameters are options of the section too
    given: str = ""  # those of the parameters that the program gives itself
    null: bool = False  # whether null may stand in place of the section


SECTIONS = {
    "": Section(
        "model task loss optimizer compute precision adapter train evaluate prepare retrained wandb name seed stages "
        "overwrite cache resume save best_keep best_s_mia input_based paper tuned tune attack dialect utility_suite "
        "utility_limit utility_data",
        may="choices start",
    ),
    "model": Section("published", "knows_general", takes="soul_exp.run.ModelSettings", given="training_form"),
    "model.template": Section(takes="soul_exp.data.Template", given="system_prompt"),
    "model.scratch": Section(takes="soul_exp.run.Scratch", null=True),
    "task": Section("_target_ metrics", may="system_prompt"),
    "loss": Section("_target_"),
    "optimizer": Section("_target_ _partial_"),
    "compute": Section(takes="soul_exp.run.Compute", given="name"),
    "precision": Section("dtype rounding"),
    "adapter": Section("_target_", null=True),
    "train": Section(takes=SCHEDULE),
    "evaluate": Section(takes="soul_exp.run.Evaluation"),
    "prepare": Section(
        "seed adamw",
        takes=SCHEDULE,
        given="gradient_checkpointing dropout log_gradients diverged_at diverged_floor",
    ),
    "prepare.adamw": Section("lr", takes="torch.optim.AdamW", given="params"),
    "retrained": Section("path records seeds", may="revision"),
    ATTACKS: Section("_target_ metrics"),
    "tune": Section(may="seed lr gamma rule workers", null=True),
    "wandb": Section(takes="soul_exp.run.WandbSettings"),
}


def check(config: Any) -> None:
    """Raises UsageError for the first section or option that is missing, unknown, or of a wrong type or range."""
    for message in mismatches(config):
        raise UsageError(message)


def _section(at: str) -> Section | None:
    """The section at the key `at`; None if it is an option."""
    return SECTIONS.get(ATTACKS if at.startswith("attack.") and at.count(".") == 1 else at)


def declared(config: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any, Values]]:
    """(dotted key, value, allowed values) of each option for which the table or a signature states them."""
    parameters = _parameters(config, at)
    for name, value in config.items():
        key = _below(at, name)
        if values := _allowed(key, parameters.get(str(name))):
            yield key, value, values
        if isinstance(value, Mapping):
            yield from declared(value, key)


def mismatches(node: Any, at: str = "") -> Iterator[str]:
    """A message for each section or option that is wrong in `node`, the part of a configuration at the key `at`."""
    section = _section(at)
    if section is not None and not isinstance(node, Mapping):
        if not (section.null and node is None):
            first = [*section.needs.split(), *_parameters({}, at), *section.may.split()][0]
            yield f"{at}={as_typed(node)}: expected a section of options such as {at}.{first}: leave it out"
        return
    if isinstance(node, list):
        for number, value in enumerate(node):
            yield from mismatches(value, _below(at, number))
    if not isinstance(node, Mapping):
        return
    if message := _target(node, at):
        yield message
        return
    parameters = _parameters(node, at)
    if section is not None or "_target_" in node:
        yield from _keys(node, at, parameters)
    for name, value in node.items():
        key = _below(at, name)
        values: Values | None = INSTRUCTIONS.get(str(name)) or _allowed(key, parameters.get(str(name)))
        if values is not None and (message := values.mismatch(key, value)):
            yield message
        elif isinstance(value, str) and values is not None and values.expected() == NAMED and not node.get("_partial_"):
            yield f"{at}._partial_ is not true, but only the run can give {name}={value}: type {at}._partial_=true"
        else:
            yield from mismatches(value, key)


def _target(node: Mapping[str, Any], at: str) -> str | None:
    """What is wrong with the `_target_` of `node`; None: nothing, or it has none."""
    target, key = node.get("_target_"), _below(at, "_target_")
    if not isinstance(target, str):
        return TEXT.mismatch(key, target) if "_target_" in node else None
    try:
        found = pkgutil.resolve_name(target)
    except Exception as error:  # importing it may raise anything
        return f"{key}={as_typed(target)} cannot be imported ({as_typed(str(error))}): correct it"
    return None if callable(found) else f"{key}={target}: found a {type(found).__name__}, expected a function or class"


def _keys(node: Mapping[str, Any], at: str, parameters: Mapping[str, Parameter]) -> Iterator[str]:
    """A message for each key of a section, or beside a `_target_`, that is unknown, and for each that is missing."""
    section, target = _section(at) or Section(), node.get("_target_")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or (target is not None and not parameters)
    named = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    known = [*named, *section.needs.split(), *section.may.split(), *(INSTRUCTIONS if "_target_" in node else ())]
    for name in node:
        if str(name) not in known and not takes_any:
            options = [key for key in known if key not in INSTRUCTIONS]
            yield f"{_below(at, name)} is unknown{nearest(str(name), options, at)}{f' ({target})' if target else ''}"
    run_gives = node.get("_partial_") is True
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and not (run_gives and p.kind is p.POSITIONAL_OR_KEYWORD)
    ]
    for name in (*section.needs.split(), *needed):
        if name not in node and not ("_args_" in node and name in needed):
            key, values = _below(at, name), _allowed(_below(at, name), parameters.get(name))
            what = f", which {target} needs" if target and name in needed else ""
            yield f"{key} is missing{what}: give it{f' ({values.expected()})' if values else ''}, or leave out ~{key}"


def nearest(name: str, known: Iterable[str], at: str = "", otherwise: str = "correct it") -> str:
    """The end of a message about the unknown `name` in the section `at`: the nearest of the `known` ones, else all.

    `otherwise` is what to do where those are many.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f", did you mean {_below(at, close[0])}?"
    return f": choose one of {', '.join(names)}" if len(names) <= MOST_NAMES else f": {otherwise}"


def _below(at: str, name: Any) -> str:
    return f"{at}.{name}" if at else str(name)


def _parameters(node: Mapping[str, Any], at: str) -> Mapping[str, Parameter]:
    """The parameters of what takes the options at `at`, but for those that the program gives."""
    section = _section(at) or Section()
    found = parameters_of(section.takes or node.get("_target_"))
    return {name: parameter for name, parameter in found.items() if name not in section.given.split()}


def _allowed(key: str, parameter: Parameter | None) -> Values | None:
    """The values that the table or else a signature allows for the option `key`; None for a section."""
    if _section(key) is not None:
        return None
    values = option_of(key).values or (values_of(parameter.annotation) if parameter is not None else None)
    section, _, name = key.rpartition(".")
    if values is None and section == "task":  # of a user's own: what the option means in a task of this package
        known = [parameters_of(f"soul_exp.tasks.{task}.{task}").get(name) for task in TASKS]
        stated = [found for each in known if each is not None and (found := values_of(each.annotation))]
        values = next((each for each in stated if each.mismatch(key, None) is None), stated[0] if stated else None)
    return values


def values_of(annotation: Any) -> Values | None:
    """The values that the annotation of a parameter states; None where it states nothing."""
    if get_origin(annotation) is Annotated:
        return next((extra for extra in get_args(annotation)[1:] if hasattr(extra, "mismatch")), None)
    if annotation is bool:
        return FLAG
    if annotation is str:
        return TEXT
    if annotation == str | None:
        return TEXT_OR_NULL
    return None if annotation in (Any, Parameter.empty) or isinstance(annotation, str) else Typed(annotation)
