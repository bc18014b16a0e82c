"""The pages of `python -m soul_exp --help`: the options of conf/ with the meanings that its comments state."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from soul_exp.compose import conf_dir
from soul_exp.errors import UsageError
from soul_exp.options import option_of

WIDTH, LEFT, LONGEST = 100, 34, 60  # characters: of a line, of what may be typed, of a default
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FILES = ("*.yaml", "*/*.yaml", "hydra/*/*.yaml")
FLAGS = ("--help", "-h")
CONFIG_DIR = ("--config-dir", "-cd")
VARIED, EACH = "hydra.sweeper.params.", "with -m: a run for each"  # what a preset sweeps over
AUTOMATIC = ("prepare", "tuned")  # groups whose choice follows from those of others
INTRO = """\
Unlearn with any model x task x loss x optimizer, and measure what was forgotten.

  python -m soul_exp                                   the main job: minutes on 2 cores, no network
  python -m soul_exp loss=npo,po optimizer=adam,sophia -m        a sweep, each job in new processes
  python -m soul_exp stages=[evaluate] model.path=DIR             measure a checkpoint
  python -m soul_exp.tables runs/NAME                             the table of a sweep
  python -m soul_exp --help optimizer=sophia                      a choice: what its options mean
  python -m soul_exp --help optimizer                             the choices of a group
  python -m soul_exp --help train.epochs                          an option: its values and effect
  python -m soul_exp loss=npo --cfg job                           the configuration of a command
  python -m soul_exp --hydra-help                                 the flags of Hydra

`soul_exp` is the same command. eval "$(soul_exp -sc install=bash)" completes it in a shell."""


@dataclass(frozen=True)
class Entry:
    """One option of a file: its dotted key, its value there, its comment."""

    key: str
    value: str  # empty: a section
    meaning: str

    @property
    def typed(self) -> str:
        return f"{self.key}={self.value}" if self.value else self.key


def page(arguments: Sequence[str]) -> str:
    """The help page that the command line `arguments` asks for. Raises UsageError for what does not exist."""
    folders, wanted, rest = [conf_dir()], [], iter(arguments)
    for argument in rest:
        if argument in CONFIG_DIR:
            folders.append(Path(next(rest, ".")))
        elif argument.startswith("--config-dir="):
            folders.append(Path(argument.partition("=")[2]))
        elif not argument.startswith("-"):
            wanted.append(argument)
    conf = Conf(folders)
    return "\n\n".join(conf.about(argument) for argument in wanted) if wanted else conf.overview()


class Conf:
    """The configuration files of some folders; where two hold the same choice, it is the former's, as for Hydra."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.files: dict[str, dict[str, Path]] = {}  # group -> choice -> file
        for folder in folders:
            for path in sorted(path for pattern in FILES for path in folder.glob(pattern)):
                group = path.parent.relative_to(folder).as_posix()
                self.files.setdefault(group, {}).setdefault(path.stem, path)
        self.main = self.files.pop(".")["config"]
        self.groups = {entry.key.split()[-1]: entry for entry in _defaults(self.main) if entry.value}
        self.meanings: dict[str, str] = {}  # where a file does not state one: config.yaml's, then the default choice's
        for path, group in self._files():
            for entry in _entries(path, group):
                if entry.meaning not in ("", EACH):
                    self.meanings.setdefault(entry.key, entry.meaning)

    def _files(self) -> list[tuple[Path, str]]:
        """Every file with its group: config.yaml, the default choices, the others."""
        chosen = {group: entry.value for group, entry in self.groups.items()}
        files = [(path, group) for group, choices in self.files.items() for path in choices.values()]
        return [(self.main, ""), *sorted(files, key=lambda file: file[0].stem != chosen.get(file[1]))]

    def entries(self, group: str, choice: str) -> dict[str, Entry]:
        """The options that a choice sets, those of the choices that it builds on included."""
        found: dict[str, Entry] = {}
        for entry in _defaults(self.files[group][choice]):
            base, target = entry.value or entry.key, entry.key.removeprefix("override /")
            if entry.value:
                found[target] = Entry(target, base, "none" if base == "null" else f"see --help {target}={base}")
            elif base in self.files[group]:
                found |= self.entries(group, base)
        own = {entry.key: entry for entry in _entries(self.files[group][choice], group)}
        return found | {key: self._explained(entry) for key, entry in own.items()}

    def _explained(self, entry: Entry) -> Entry:
        return entry if entry.meaning else Entry(entry.key, entry.value, self.meanings.get(entry.key, ""))

    def overview(self) -> str:
        """The page without arguments: every group with its choices, every option of config.yaml."""
        parts = [INTRO, "", "Groups: group=choice", *self._groups(), "", "Options: key=value"]
        for entry in _entries(self.main, ""):
            if not entry.value and "." not in entry.key:
                parts += ["", *_wrapped(f"{entry.key}: {entry.meaning}", "")]
            else:
                parts += _row(entry.typed, entry.meaning)
        return "\n".join(parts)

    def _groups(self) -> Iterator[str]:
        for group in [*self.groups, *(group for group in self.files if group not in self.groups)]:
            entry, choices = self.groups.get(group), ", ".join(self.files[group])
            default = entry.value if entry and entry.value in self.files[group] else ""
            meaning = entry.meaning if entry else _about(next(iter(self.files[group].values()))).split(":")[0]
            yield from _row(f"{group}={default}", meaning)
            yield from _wrapped(f"--help {group} lists them" if group in AUTOMATIC else choices, " " * (LEFT + 2))

    def about(self, argument: str) -> str:
        """The page of `group=choice`, of a group, of a section or of an option."""
        name, _, choice = argument.partition("=")
        if name in self.files and choice:
            if choice not in self.files[name]:
                raise UsageError(f"{argument} is unknown: choose one of {', '.join(self.files[name])}")
            title = _wrapped(f"{argument}: {_about(self.files[name][choice])}", "")
            return "\n".join([*title, "", *_rows(self.entries(name, choice).values())])
        if name in self.files:
            return "\n".join(_rows(Entry(name, choice, _about(path)) for choice, path in self.files[name].items()))
        known = [self._explained(entry) for path, group in self._files() for entry in _entries(path, group)]
        found: dict[str, Entry] = {}
        for entry in known:
            if f"{entry.key}.".startswith(f"{name}."):
                found.setdefault(entry.key, entry)
        if not found:
            raise UsageError(
                f"--help {argument}: expected a group (optimizer), a choice (optimizer=sophia) or an option"
            )
        about = _effect(name) if name in found and found[name].value else ()
        return "\n".join([*_rows(found.values()), *about])


def _rows(entries: Iterable[Entry]) -> list[str]:
    return [line for entry in entries for line in _row(entry.typed, entry.meaning)]


def _effect(key: str) -> list[str]:
    option = option_of(key)
    values = [f"values: {option.values.expected()}"] if option.values else []
    when = f" (with {option.when[0]}={str(option.when[1]).lower()})" if option.when else ""
    return ["", *values, f"it changes: {option.changes.value}{when}"]


def _row(typed: str, meaning: str) -> list[str]:
    """`typed` at the left, the meaning beside it, or below where it is too long."""
    lines = _wrapped(meaning, " " * (LEFT + 2)) or [""]
    if len(typed) > LEFT - 2:
        return [f"  {typed}", *(line for line in lines if line)]
    return [f"  {typed:<{LEFT}}{lines[0].strip()}".rstrip(), *lines[1:]]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _about(path: Path) -> str:
    """The first comment of a file, without the one that Hydra reads."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def _package(path: Path, group: str) -> str:
    found = re.match(r"# @package (\S+)", path.read_text())
    return group.replace("/", ".") if found is None else found[1].replace("_global_", "")


def _defaults(path: Path) -> list[Entry]:
    """What a file builds on: `model: tiny` has a value, a choice of the same group has none."""
    text, root = _read(path)
    lists = [value for key, value in root.value if key.value == "defaults"]
    found: list[Entry] = []
    for node in lists[0].value if lists else ():
        if isinstance(node, yaml.MappingNode):
            ((key, value),) = node.value
            found.append(Entry(key.value, value.value, _comment(text.splitlines(), key, value)))
        else:
            found.append(Entry(node.value, "", ""))
    return found


def _entries(path: Path, group: str) -> list[Entry]:
    """The options of a file, in its order."""
    text, root = _read(path)
    return list(_walk(root, text, _package(path, group)))


def _read(path: Path) -> tuple[str, yaml.MappingNode]:
    text = path.read_text()
    try:
        root = yaml.compose(text, LOADER)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return text, root if isinstance(root, yaml.MappingNode) else yaml.MappingNode("", [])


def _walk(node: yaml.MappingNode, text: str, at: str) -> Iterator[Entry]:
    """The options below `node`; what stands in braces has no comments of its own."""
    for key, value in node.value:
        name = f"{at}.{key.value}" if at else key.value
        if name == "hydra":
            varied = (entry for entry in _walk(value, text, name) if entry.key.startswith(VARIED))
            yield from (Entry(entry.key.removeprefix(VARIED), entry.value, EACH) for entry in varied)
            continue
        if key.value in ("_target_", "_partial_") or name == "defaults" or name == f"{at}.defaults":
            continue
        meaning = "" if node.flow_style else _comment(text.splitlines(), key, value)
        inner = value.value if isinstance(value, yaml.MappingNode) else []
        targets = {key.value: value.value for key, value in inner if isinstance(value, yaml.ScalarNode)}
        if inner and key.value == "metrics":
            yield Entry(name, "{...}", f"{meaning}: {', '.join(key.value for key, _ in inner)}")
        elif inner:
            if meaning or "_target_" in targets:
                yield Entry(name, targets.get("_target_", ""), meaning)
            yield from _walk(value, text, name)
        else:
            yield Entry(name, _text(value, text), meaning)


def _text(node: yaml.Node, text: str) -> str:
    """The value as it may be typed, on one line, cut where it is long."""
    if isinstance(node, yaml.SequenceNode):
        shown = f"[{','.join(_text(inner, text) for inner in node.value)}]"
    elif isinstance(node, yaml.ScalarNode) and node.style in (">", "|"):
        shown = node.value.strip()
    else:
        shown = text[node.start_mark.index : node.end_mark.index].strip()
    shown = " ".join(shown.split())
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."


def _comment(lines: Sequence[str], key: yaml.Node, value: yaml.Node) -> str:
    """The comment behind `key: value`, and the comment lines below it that are indented further than the key."""
    row, column = key.start_mark.line, key.start_mark.column
    ends = value.end_mark.column if value.end_mark.line == row else key.end_mark.column
    found = re.search(r"(?:^|\s)#\s*(.*)$", lines[row][ends:])
    parts = [found[1]] if found else []
    for line in lines[row + 1 :]:
        if not (parts and line.lstrip().startswith("#") and line.index("#") > column):
            break
        parts.append(line.lstrip(" #"))
    return " ".join(parts)
