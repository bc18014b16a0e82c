"""The pages of `python -m soul_exp --help`: the options of conf/ with the meanings that its comments state."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import yaml

from soul_exp.compose import conf_dir
from soul_exp.errors import UsageError
from soul_exp.options import option_of
from soul_exp.schema import nearest

WIDTH, LEFT, LONGEST = 100, 34, 60  # characters: of a line, of what may be typed, of a default
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FILES = ("*.yaml", "*/*.yaml", "*/*/*.yaml")
FLAGS = ("--help", "-h")
CONFIG_DIR = ("--config-dir", "-cd")
VARIED, EACH = "hydra.sweeper.params.", "with -m: a run for each"  # what a preset sweeps over
AUTOMATIC = ("prepare/any", "prepare", "tuned")  # groups whose choice follows from those of others
INTRO = """\
Unlearn with any model x task x loss x optimizer, and measure what was forgotten.

  python -m soul_exp                                   the main job: minutes on 2 cores, no network
  python -m soul_exp loss=npo,po optimizer=adam,sophia -m        a sweep, each job in new processes
  python -m soul_exp stages=[evaluate] model.path=DIR             measure a checkpoint
  python -m soul_exp.tables runs/NAME                             the table of a sweep
  python -m soul_exp.report runs/NAME                             one page: figures and all answers
  python -m soul_exp --help optimizer=sophia                      a choice: what its options mean
  python -m soul_exp --help optimizer                             the choices of a group
  python -m soul_exp --help train.epochs                          an option: its values and effect
  python -m soul_exp loss=npo --cfg job                           the configuration of a command
  python -m soul_exp --hydra-help                                 the flags of Hydra

`soul_exp` is the same command. eval "$(soul_exp -sc install=bash)" completes it in a shell."""


class Entry(NamedTuple):
    """One option of a file: its dotted key, its value there, its comment."""

    key: str
    value: str  # empty: a section
    meaning: str


def page(arguments: Sequence[str]) -> str:
    """The help page that the command line `arguments` requests. Raises UsageError for what does not exist."""
    conf, wanted = Conf.of(arguments), []
    for before, argument in zip(("", *arguments), arguments, strict=False):
        if not argument.startswith("-") and before not in CONFIG_DIR:
            wanted.append(argument)
    return "\n\n".join(map(conf.about, wanted)) if wanted else conf.overview()


class File:
    """A file of conf/: what it is about, the choices that it builds on, and its options, in its order."""

    def __init__(self, path: Path, group: str) -> None:
        self.choice, self.text = (group, path.stem), path.read_text()
        self.lines = self.text.splitlines()
        header = takewhile(lambda line: line.startswith("#"), self.lines)
        self.about = " ".join(line.lstrip("# ") for line in header if "@package" not in line)
        try:
            root = yaml.compose(self.text, LOADER)
        except yaml.YAMLError as error:
            raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        root = root if isinstance(root, yaml.MappingNode) else yaml.MappingNode("", [])
        self.bases = [self._base(node) for key, value in root.value if key.value == "defaults" for node in value.value]
        package = re.match(r"# @package (\S+)", self.text)
        at = package[1].replace("_global_", "") if package else group.strip(".").replace("/", ".")
        self.entries = list(self._walk(root, at))

    def _base(self, node: yaml.Node) -> Entry:
        """An element of `defaults`: `model: tiny` has a value, a choice of the same group has none."""
        if not isinstance(node, yaml.MappingNode):
            return Entry(node.value, "", "")
        ((key, value),) = node.value
        return Entry(key.value, self._typed(value), self._comment(key, value))

    def _walk(self, node: yaml.MappingNode, at: str) -> Iterator[Entry]:
        """The options below `node`; what stands in braces has no comments of its own."""
        for key, value in node.value:
            name = f"{at}.{key.value}" if at else key.value
            meaning = "" if node.flow_style else self._comment(key, value)
            inner = {key.value: value for key, value in value.value} if isinstance(value, yaml.MappingNode) else {}
            if name == "hydra":
                varied = (entry for entry in self._walk(value, name) if entry.key.startswith(VARIED))
                yield from (Entry(entry.key.removeprefix(VARIED), entry.value, EACH) for entry in varied)
            elif key.value in ("_target_", "_partial_", "defaults"):
                continue
            elif not inner:
                yield Entry(name, self._typed(value), meaning)
            elif key.value in ("metrics", "forms"):
                yield Entry(name, "{...}", f"{meaning}: {', '.join(inner)}")
            else:
                if meaning or "_target_" in inner:
                    yield Entry(name, inner["_target_"].value if "_target_" in inner else "", meaning)
                yield from self._walk(value, name)

    def _typed(self, node: yaml.Node) -> str:
        """The value as it may be typed, on one line, cut where it is long."""
        if isinstance(node, yaml.SequenceNode):
            shown = f"[{','.join(map(self._typed, node.value))}]"
        elif isinstance(node, yaml.ScalarNode) and node.style in (">", "|"):
            shown = node.value
        else:
            shown = self.text[node.start_mark.index : node.end_mark.index]
        shown = " ".join(shown.split())
        return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."

    def _comment(self, key: yaml.Node, value: yaml.Node) -> str:
        """The comment behind `key: value`, and the comment lines below it that are indented further than the key."""
        row, column = key.start_mark.line, key.start_mark.column
        end = value.end_mark if value.end_mark.line == row else key.end_mark
        found = re.search(r"(?:^|\s)#\s*(.*)$", self.lines[row][end.column :])
        below = takewhile(re.compile(rf" {{{column + 1},}}#").match, self.lines[row + 1 :])
        return " ".join([found[1], *(line.lstrip(" #") for line in below)]) if found else ""


class Conf:
    """The configuration files of some folders; where two hold the same choice, it is the former's, as for Hydra."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.files: dict[str, dict[str, File]] = {}  # group -> choice -> file
        for folder in folders:
            for path in sorted(path for pattern in FILES for path in folder.glob(pattern)):
                group = path.parent.relative_to(folder).as_posix()
                self.files.setdefault(group, {}).setdefault(path.stem, File(path, group))
        self.main = self.files.pop(".")["config"]
        self.groups = {entry.key.split()[-1]: entry for entry in self.main.bases if entry.value}
        chosen = [(group, entry.value) for group, entry in self.groups.items()]
        others = [file for choices in self.files.values() for file in choices.values()]
        files = [self.main, *sorted(others, key=lambda file: file.choice not in chosen)]
        self.known = [entry for file in files for entry in file.entries]  # config.yaml's, default choices', others'
        stated = [entry for entry in reversed(self.known) if entry.meaning not in ("", EACH)]
        self.meanings = {entry.key: entry.meaning for entry in stated}  # where a file states none: the first one known

    @classmethod
    def of(cls, arguments: Sequence[str]) -> "Conf":
        """Those of the program, and of the folders that --config-dir names in a command line."""
        folders = [after for flag, after in pairwise(arguments) if flag in CONFIG_DIR]
        folders += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config-dir=")]
        return cls([conf_dir(), *map(Path, folders)])

    def entries(self, group: str, choice: str) -> dict[str, Entry]:
        """The options that a choice sets, those of the choices that it builds on included."""
        found: dict[str, Entry] = {}
        for key, base, _ in self.files[group][choice].bases:
            target = key.removeprefix("override ").removeprefix("/")
            if base:
                found[target] = Entry(target, base, "none" if base == "null" else f"see --help {target}={base}")
            elif key in self.files[group]:
                found |= self.entries(group, key)
        return found | {entry.key: self._explained(entry) for entry in self.files[group][choice].entries}

    def _explained(self, entry: Entry) -> Entry:
        return Entry(entry.key, entry.value, entry.meaning or self.meanings.get(entry.key, ""))

    def overview(self) -> str:
        """The page without arguments: every group with its choices, every option of config.yaml."""
        lines = [INTRO, "", "Groups: group=choice"]
        for group in dict.fromkeys([*self.groups, *self.files]):
            choices = self.files[group]
            about = next(iter(choices.values())).about.split(":")[0]
            _, default, meaning = self.groups.get(group, Entry(group, "", about))
            lines += _rows([Entry(f"{group}={default if default in choices else ''}", "", meaning)])
            lines += _wrapped(f"--help {group} lists them" if group in AUTOMATIC else ", ".join(choices))
        lines += ["", "Options: key=value"]
        for entry in self.main.entries:
            is_section = not entry.value and "." not in entry.key
            lines += ["", *_wrapped(f"{entry.key}: {entry.meaning}", "")] if is_section else _rows([entry])
        return "\n".join(lines)

    def about(self, argument: str) -> str:
        """The page of `group=choice`, of a group, of a section or of an option."""
        name, _, choice = argument.partition("=")
        choices = self.files.get(name, {})
        if choices and choice:
            if choice not in choices:
                raise UsageError(f"{argument} is unknown{nearest(choice, choices)}")
            title = _wrapped(f"{argument}: {choices[choice].about}", "")
            return "\n".join([*title, "", *_rows(self.entries(name, choice).values())])
        if choices:
            return "\n".join(_rows(Entry(name, choice, file.about) for choice, file in choices.items()))
        found: dict[str, Entry] = {}
        for entry in self.known:
            if f"{entry.key}.".startswith(f"{name}."):
                found.setdefault(entry.key, self._explained(entry))
        if not found:
            raise UsageError(f"--help {argument}: {self.unknown(name)}")
        lines = _rows(found.values())
        if name in found and found[name].value:
            option = option_of(name)
            when = f" (with {option.when[0]}={str(option.when[1]).lower()})" if option.when else ""
            lines += ["", *([f"values: {option.values.expected()}"] if option.values else ())]
            lines += [f"it changes: {option.changes.value}{when}"]
        return "\n".join(lines)

    def unknown(self, key: str) -> str:
        """That there is no group or option `key`, and which one may be meant: of that last name, or the nearest."""
        known = dict.fromkeys([*self.files, *(entry.key for entry in self.known)])
        near = min((other for other in known if other.endswith(f".{key}")), key=lambda k: k.count("."), default=None)
        return (
            f"no such option{f', did you mean {near}?' if near else nearest(key, known, otherwise='--help lists them')}"
        )


def _rows(entries: Iterable[Entry]) -> list[str]:
    """What may be typed at the left, its meaning beside it, or below where it is too long."""
    lines: list[str] = []
    for key, value, meaning in entries:
        typed = f"  {key}={value}" if value else f"  {key}"
        beside = len(typed) <= LEFT and bool(meaning)
        lines += _wrapped(meaning, first=f"{typed:<{LEFT + 2}}") if beside else [typed, *_wrapped(meaning)]
    return lines


def _wrapped(text: str, indent: str = " " * (LEFT + 2), first: str | None = None) -> list[str]:
    first = indent if first is None else first
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)
