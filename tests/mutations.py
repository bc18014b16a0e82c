"""Random mutations of valid commands: an option's key, type, null, nesting or deletion; and how the command line ends.

A seed gives one command. `python tests/mutations.py 0 2000` prints the seeds that end badly.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composing import composed
from starts import TINY

from soul_exp import cli, options
from soul_exp.compose import CHOICES, conf_dir

ODD = (  # values that an option may be given
    "null", "true", "no", "0", "1", "-1", "2", "1.5", "1e30", "1e-30", "nan", "inf", "-inf", "abc", "''", "' '", "auto",
    "'1'", "'0.5'", "[]", "[1]", "[1,2]", "[abc]", "[null]", "{}", "{a: 1}", "{a: {b: null}}", "[{a: 1}]", "1_0",
    "'${seed}'", "'${nowhere.here}'", "'${'", "'???'", "/", ".", "'~'", "~/x", "~nobody/x", "'a\nb'", "été", "a=b",
    "'\\u2212 1'", "99999999999999999999", "0x10", "{_target_: builtins.dict}", "{_target_: os.getcwd}",
    "{_target_: nowhere.at_all}", "x,y", "[1", "'a",
)  # fmt: skip
ARGUMENTS = ("help", "=", "a=b=c", "~", "seed", "seed=", "=3", "+seed=3", "++seed.=3", ".=1", "-1=2", "--nothing")
KINDS = ("near",) * 4 + ("value",) * 4 + ("section", "key", "more", "deeper", "deletion", "argument", "moved")
GROUPS = {name: sorted(path.stem for path in (conf_dir() / name).glob("*.yaml")) for name in CHOICES[1:]}
SMALL = {  # the data of the other tasks
    "task=detox": (
        "task.num_forget=24", "task.num_prompts=12", "task.num_polite=8", "task.num_retain_passages=8",
        "task.num_rtp_prompts=4",
    ),
    "task=copyright": (
        "task.num_passages=8", "task.num_holdout_passages=6", "task.num_retain_passages=12",
        "task.num_general_passages=4", "task.prompt_words=[50]",
    ),
}  # fmt: skip
RAW = (  # what only Python or a library would say
    "Traceback|object has no attribute|not supported between|not subscriptable|NoneType|unexpected keyword|"
    "missing \\d+ required|object is not|must be real|is not a callable|Errno|unhashable|full_key|object_type|"
    "maximum recursion|cannot unpack|__init__|provider=|Error:|invalid literal|<class|<function|<module"
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed to stderr."""

    code: object
    said: str

    @property
    def accepted(self) -> bool:
        return self.code == 0

    @property
    def fault(self) -> str | None:
        """What is wrong with this end; None: the command is accepted, or stopped by one message."""
        lines = self.said.splitlines()
        if self.accepted:
            return f"accepted, but it said {self.said!r}" if lines else None
        if self.code == 2 and lines[-1].startswith("soul_exp: error: "):  # of a flag
            return None
        if len(lines) != 1 or not lines[0].startswith("soul_exp: "):
            return f"{len(lines)} lines: {self.said[-600:]}"
        return f"not a message: {self.said}" if re.search(RAW, self.said) else None


def command(seed: int, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The command of `seed`: a valid one with one or two mutations, of the options of `config` and their values."""
    draw = random.Random(seed)
    valid = [f"{group}={draw.choice(choices)}" for group, choices in GROUPS.items() if draw.random() < 0.25]
    valid = [choice for choice in valid if choice not in ("task=custom", "compute=gpu")]
    task = next((choice for choice in valid if choice.startswith("task=")), "task=tofu")
    small = [line for line in TINY if task == "task=tofu" or not line.startswith(("task.", "model.scratch.vocab_size"))]
    small += SMALL.get(task, ())
    known = {key: value for key, value in options.leaves(config) if not key.startswith(("choices.", "cache", "stages"))}
    return (*small, *valid, *(_mutation(draw, known) for _ in range(draw.choice((1, 1, 2)))))


def _mutation(draw: random.Random, known: Mapping[str, Any]) -> str:
    key, odd = draw.choice(list(known)), draw.choice(ODD)
    section = ".".join(key.split(".")[: draw.randint(1, key.count(".") + 1)])
    match draw.choice(KINDS):
        case "near":
            key = draw.choice([key for key in known if not key.startswith("task.metrics.")])
            return f"{key}={_near(draw, known[key])}"
        case "value":
            return f"{key}={odd}"
        case "section":
            return f"{section}={odd}"
        case "key":
            at = draw.randrange(len(key))
            return f"{key[:at]}{draw.choice(('', 'x', key[at] * 2))}{key[at + 1 :]}={odd}"
        case "more":
            return f"+{section}.{draw.choice(('foo', '_target_', '_partial_', '_args_', '0'))}={odd}"
        case "deeper":
            return f"{draw.choice(('', '+', '++'))}{key}.foo={odd}"
        case "deletion":
            return f"~{section}"
        case "argument":
            return draw.choice(ARGUMENTS)
        case _:
            return f"{key}='${{{draw.choice(list(known))}}}'"


def _near(draw: random.Random, value: Any) -> str:
    """Another value of the same type, as it is typed."""
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int):
        return str(draw.choice((value + 1, 2 * value, value // 2, 7)))
    if isinstance(value, float):
        return str(value * draw.choice((0.0, 0.5, 2.0, 100.0)))
    return (
        "null" if value is None else "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else f"'{value}'"
    )


def check(*typed: str) -> Outcome:
    """How `python -m soul_exp TYPED stages=[]` ends, in this process."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["soul_exp", *typed, "stages=[]"]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            cli.main()
    except SystemExit as stop:
        return Outcome(stop.code, said.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("the command line has returned")


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["SOUL_EXP_CACHE"] = f"{folder}/cache"
        config = composed(Path(folder))
        for number in range(*map(int, sys.argv[1:3])):
            line = command(number, config)
            outcome = check(*line)
            if outcome.fault or "-v" in sys.argv:
                print(
                    number, *map(repr, line[len(TINY) - 3 :]), "->", outcome.fault or outcome.said.strip(), flush=True
                )
