"""`python -m soul_exp.ask RUN "question"`: what the original, the unlearned and the retrained model of a run answer."""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from transformers.utils import logging as library

from soul_exp import results, sequence
from soul_exp.artifacts import prepared_models
from soul_exp.build import build_models
from soul_exp.data import Item
from soul_exp.errors import UsageError, built
from soul_exp.evaluation.probing import generations, likelihoods
from soul_exp.models import attention, loading, lora
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import LanguageModel
from soul_exp.results import Results
from soul_exp.stages.stage import MODEL

WIDTH = 100  # columns of a console


@dataclass(frozen=True)
class Asked:
    """A question as it is put: the template's or, if `raw`, running text to go on with; `answer` is one to weigh."""

    raw: bool
    answer: str | None
    max_new_tokens: int

    def item(self, question: str, answer: str) -> Item:
        return Item(question, f" {answer}" if self.raw else answer, raw=self.raw)


def subjects(folder: Path) -> tuple[Results, dict[str, Checkpoint], list[str]]:
    """The run in `folder`, its models that can be asked, by name, and a sentence on each that cannot.

    Raises UsageError, which says what to type, if `folder` is no finished run or if weights that it had are gone.
    """
    run = results.read(folder)
    if run is None:
        raise UsageError(
            f"{folder} has no {results.NAME}: give the folder of a finished run, such as runs/tofu/default"
        )
    prepared, found, absent = _prepared(run, folder), dict[str, Checkpoint](), list[str]()
    for name, role in (("original", "target"), ("unlearned", None), ("retrained", "retrained")):
        place = _unlearned(run, folder) if role is None else prepared.get(role)
        if place is None:
            absent.append(f"{name}: this run had no weights of it, so it cannot be asked")
            continue
        if Path(place.path).is_absolute() and not _is_whole(Path(place.path)):
            raise UsageError(f"the {name} model is not in {place.path} any more: type {_anew(folder, name)}")
        found[name] = place
    return run, found, absent


def _prepared(run: Results, folder: Path) -> dict[str, Checkpoint]:
    """Where the two models are that the run began with, which its data decides."""
    where = f"{folder}, run at commit {run.commit or 'unknown'}, cannot be read by this version: run it again"
    try:
        return prepared_models.checkpoints(built(lambda: build_models(run.config), where))
    except KeyError as error:
        raise UsageError(f"{where}: its configuration lacks {error}") from error


def _unlearned(run: Results, folder: Path) -> Checkpoint:
    """Where the model that the run ended with is; of a run that only measured, the one that it measured."""
    if "unlearn" not in run.config["stages"]:
        return Checkpoint(run.config["model"]["path"], run.config["model"]["revision"])
    if run.config["save"] == "none":
        raise UsageError(
            f"{folder} was run with save=none, which keeps no unlearned model: type {_anew(folder, 'unlearned')}"
        )
    request = run.config["task"].get("request")  # `folder` is that of the whole sequence, or the request's own
    last = sequence.folder_of(folder, request) if request else folder
    return Checkpoint(str((last if last.is_dir() else folder).absolute() / MODEL))


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file() or lora.is_adapter(str(folder))


def _anew(folder: Path, name: str) -> str:
    """The command that makes the model `name` of the run in `folder` once more."""
    typed = folder / ".hydra" / "overrides.yaml"
    overrides = [str(line) for line in OmegaConf.load(typed)] if typed.is_file() else ["<what you typed>"]
    last = ["save=final", "overwrite=true"] if name == "unlearned" else ["stages=[prepare]", "name=prepared"]
    kept = [line for line in overrides if not line.startswith(tuple(key.split("=")[0] + "=" for key in last))]
    return "python -m soul_exp " + " ".join(shlex.quote(line) for line in [*kept, *last])


def load(run: Results, place: Checkpoint) -> LanguageModel:
    """The model in `place` as its run read it, on the device that is here, ready to be asked."""
    attention.choose_kernel(run.config["model"]["attention"])
    lm = prepared_models.load(build_models(run.config).model, place)
    loading.move(lm.model, "cuda" if torch.cuda.is_available() else "cpu")
    lm.model.eval()
    return lm


def replies(lm: LanguageModel, questions: Sequence[str], asked: Asked) -> list[str]:
    """The greedy answer to each question with its NLL, and the probability of the answer that was given."""
    prompts = [asked.item(question, "a") for question in questions]  # the answer is left out, and needs a letter
    texts = generations(lm, prompts, batch_size=8, max_new_tokens=asked.max_new_tokens)
    return [f"{text or '(nothing)'}\n{_numbers(lm, q, text, asked)}" for q, text in zip(questions, texts, strict=True)]


def _numbers(lm: LanguageModel, question: str, text: str, asked: Asked) -> str:
    try:
        said = f"NLL {_nll(lm, question, text, asked):.3f} nats a token"
    except UsageError as error:  # such as an answer whose first character joins the prompt's last
        said = f"no NLL: {error}"
    if asked.answer is None:
        return said
    return f"{said}; probability of the given answer {math.exp(-_nll(lm, question, asked.answer, asked)):.3g}"


def _nll(lm: LanguageModel, question: str, answer: str, asked: Asked) -> float:
    """The mean negative log-likelihood of the tokens of `answer` and its end."""
    (read,) = likelihoods(lm, [asked.item(question, answer)], batch_size=1)
    return float(-read.logp.mean())


def shown(question: str, said: Mapping[str, str]) -> str:
    """The question, and below it what each model said, in at most 100 columns."""
    lines = textwrap.wrap(question, WIDTH) or [""]
    for name, text in said.items():
        inner = [part for line in text.split("\n") for part in textwrap.wrap(line, WIDTH - 12) or [""]]
        lines += [f"{name if i == 0 else '':<11} {line}".rstrip() for i, line in enumerate(inner)]
    return "\n".join([*lines, ""])


def ask(folder: Path, questions: Sequence[str], asked: Asked) -> Iterator[str]:
    """What the models of the run in `folder` say to each question; without one, to each line of standard input.

    All questions are put to one model after another, so that one is held at a time; only a dialogue holds all.
    """
    run, places, absent = subjects(folder)
    yield "\n".join([run.caption, *absent, ""])
    if not questions and sys.stdin.isatty():
        held = {name: load(run, place) for name, place in places.items()}
        while question := input("> ").strip():
            yield shown(question, {name: replies(lm, [question], asked)[0] for name, lm in held.items()})
        return
    questions = questions or [line.strip() for line in sys.stdin if line.strip()]
    said = {name: replies(load(run, place), questions, asked) for name, place in places.items()}
    for i, question in enumerate(questions):
        yield shown(question, {name: texts[i] for name, texts in said.items()})


def main() -> None:
    """Prints the answers; exits 2 for bad input."""
    parser = argparse.ArgumentParser(
        "python -m soul_exp.ask", description="Put questions to the original, the unlearned and the retrained model."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run: runs/tofu/default")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="without one: a dialogue, or standard input")
    parser.add_argument("--answer", help="also give each model's probability of this answer, a token's geometric mean")
    parser.add_argument("--raw", action="store_true", help="running text to go on with, without the model's template")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="the longest answer (100)")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: expected a whole number of 1 or more")
    library.disable_progress_bar()
    library.set_verbosity_error()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    try:
        for text in ask(args.run, args.questions, Asked(args.raw, args.answer, args.max_new_tokens)):
            print(text, flush=True)
    except (KeyboardInterrupt, EOFError):
        print()
    except UsageError as error:
        print(f"soul_exp.ask: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
