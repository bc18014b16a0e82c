"""The overrides of a command line: home folders, and one line for each that Hydra cannot read or apply."""

import contextlib
import os
import re
import shlex
import traceback
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from soul_exp import help_page
from soul_exp.compose import conf_dir
from soul_exp.errors import UsageError
from soul_exp.schema import nearest

NOT_HELPFUL = ("To append to your config", "full_key:", "object_type=", "See https:", "Config search path", "provider=")
ABSENT = re.compile("Could not (?:find|load) '(.*)'", re.DOTALL)  # a choice of a group
RESOLVING = "UsageError raised while resolving interpolation: "
GROUPS = {path.name for path in conf_dir().iterdir() if path.is_dir()} - {"hydra"}
QUOTE = """quote what has special characters, twice for the shell: "key='a b'\""""


def with_home(argument: str) -> str:
    """`argument` with `~/` and `~user/` that begin a path expanded, as the shell does at the beginning of a word."""
    return re.sub(r"(?<=[=,\[])~[\w.-]*(?=/)", lambda home: os.path.expanduser(home[0]), argument)


def is_of_hydra(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf has raised `error`, and not the program."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return True
    if isinstance(error, OSError):
        return False
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return str(last.f_globals["__name__"]).partition(".")[0] in ("hydra", "omegaconf", "antlr4")


def check(arguments: Sequence[str]) -> None:
    """Raises UsageError for an argument that is neither a flag nor key=value, or that chooses no choice of a group."""
    for flag, argument in zip(("", *arguments), arguments, strict=False):
        is_override = not argument.startswith("-") and ("=" in argument or not flag.startswith("-"))
        if is_override and (wrong := _malformed(argument) or _no_choice(argument)):
            raise UsageError(wrong)


def message(error: BaseException, arguments: Sequence[str]) -> str:
    """One line on an `error` of Hydra or OmegaConf: what was found, what was expected, what to type."""
    if str(error).startswith(RESOLVING):  # our own message, of a resolver
        return _lines(error)[0].removeprefix(RESOLVING)
    lines, at = _lines(error), _applied(error)
    if isinstance(error, InterpolationResolutionError):
        at = at or next((line for line in arguments if "${" in line), None)
    reason = "; ".join(line for line in lines if not (at and at in line)) or lines[0]
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, lines)
    if isinstance(error, MissingConfigException) and (
        found := re.search(r"Could not (?:find|load) '([^']*)'", lines[0])
    ):
        group, _, choice = found[1].rpartition("/")
        known = list(error.options or help_page.Conf.of(arguments).files.get(group, {}))
        return f"{group or '--config-name'}={choice} is unknown" + (nearest(choice, known) if group else "")
    if at and lines[0].startswith("Could not override"):
        key = at.split("=")[0]
        return f"{at}: {_unknown(key, arguments)}"
    if at and lines[0].startswith("Could not append"):
        return f"{at}: this option exists: type {at.lstrip('+')}"
    if at and "Cannot merge DictConfig with ListConfig" in reason:
        return f"{at}: expected options in braces, {{name: value}}, not a list"
    if at and not isinstance(error, HydraException | OmegaConfBaseException):
        return f"{at}: it cannot be applied to what stands there"
    return f"{at}: {reason}" if at else reason


def _applied(error: BaseException) -> str | None:
    """The override that Hydra was applying when it raised `error`, on one line."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(override := frame.f_locals.get("override"), Override):
            return " ".join(str(override.input_line).split())
    return None


def _malformed(argument: str) -> str | None:
    """What is wrong with an argument that has no key=value; None: it has."""
    key, equals, _ = argument.partition("=")
    if not equals and not argument.startswith("~"):
        return f"{argument!r}: expected key=value, such as optimizer=adam: --help lists the options"
    if not re.fullmatch(r"(\+{0,2}|~)([\w/@:-]+\.)*[\w/@:-]+", key):
        return f"{argument!r}: {key!r} is no name of an option, such as optimizer.lr: --help lists them"
    return None


def _no_choice(argument: str) -> str | None:
    """What is wrong with an argument that gives a group something else than the name of a choice; None: nothing."""
    key, _, value = argument.partition("=")
    group = key.lstrip("+~")
    if group not in GROUPS:
        return None
    advice = f"--help {group} lists them"
    if key.startswith("~"):
        return None if group in help_page.AUTOMATIC else f"{argument}: every run has a choice of {group}: {advice}"
    if group == "attack" and re.fullmatch(r"\[[\w,\s]*\]", value):  # several, or none
        return None
    is_name = re.fullmatch(r"""['"\w.,()-]*[A-Za-z_]['"\w.,()-]*""", value) and value != "null"
    return None if is_name or value[:1] in "'\"" else f"{argument}: expected the name of a choice: {advice}"


def _lines(error: BaseException) -> list[str]:
    """The lines of the messages of `error` and of its causes, without those that help nobody."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        for line in map(str.strip, str(cause).splitlines()):
            if line and not line.startswith(NOT_HELPFUL) and not any(line in other for other in lines):
                lines.append(line)
        cause = cause.__cause__
    return lines or [type(error).__name__]


def _unreadable(override: str, lines: Sequence[str]) -> str:
    """What to type in place of an override whose value Hydra's grammar does not read."""
    key, _, value = override.partition("=")
    reason = "; ".join(line for line in lines if override not in line and set(line) != {"^"})
    found = f"{key}={value!r} cannot be read" + (f" ({reason})" if reason else "")
    if odd := "".join(sorted({sign for sign in value if ord(sign) > 127 and not sign.isalpha()})):
        return f"{found}: quote {odd!r}, as in \"{key}='{value}'\""
    return f"{found}: {quoted(override) or QUOTE}"


def quoted(override: str) -> str | None:
    """How to type an override whose value Hydra reads as a text only in quotes; None if they do not help."""
    key, _, value = override.partition("=")
    typed = f'{key}="{value.replace(chr(34), chr(92) + chr(34))}"'
    if not value.startswith(("[", "{", '"', "'")):  # a list, a mapping, or in quotes already
        with contextlib.suppress(HydraException):
            OverridesParser.create().parse_override(typed)
            return f"put the value in quotes, and all of it in others for the shell: {shlex.quote(typed)}"
    return None


def _unknown(key: str, arguments: Sequence[str]) -> str:
    """That the option `key` does not exist, and which one may be meant."""
    conf = help_page.Conf.of(arguments)
    group = key.split(".")[0]
    if any(entry.key == key for entry in conf.known):
        if group not in GROUPS:  # an option of the top level that is null unless a preset fills it
            name = key.removeprefix(f"{group}.")
            return f"{group} is null here, so that it has no {name}: type budget=full or experiment=NAME too"
        return f"the chosen {group} has no such option: --help {group}=NAME lists those of a choice"
    return conf.unknown(key)
