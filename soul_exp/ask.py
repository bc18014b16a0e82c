"""`python -m soul_exp.ask RUN "question"`: the answers of a run's original, unlearned and retrained model."""

import argparse
import io
import logging
import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as library

from soul_exp import results, sequence
from soul_exp.artifacts import prepared_models
from soul_exp.build import build_models, model_settings, task_fields
from soul_exp.compose import check_trusted
from soul_exp.data import Item
from soul_exp.distributed.output import is_lost, open_standard_streams
from soul_exp.errors import UsageError, built
from soul_exp.evaluation.probing import generations, likelihoods
from soul_exp.metrics.text import begins_without_blank
from soul_exp.models import attention, loading, lora
from soul_exp.models.checkpoint import Checkpoint
from soul_exp.models.language_model import LanguageModel
from soul_exp.report.console import WIDTH, wrapped
from soul_exp.report.labels import printable
from soul_exp.stages.stage import MODEL


@dataclass(frozen=True)
class Options:
    """How a question becomes a prompt: by the model's template or, if `raw`, as running text to be continued."""

    raw: bool
    answer: str | None  # whose probability is printed too
    max_new_tokens: int

    def item(self, question: str, answer: str) -> Item:
        blank = " " if self.raw and not begins_without_blank(answer) else ""
        return Item(question, f"{blank}{answer}", raw=self.raw)


def models_of(folder: Path, trust: bool = False) -> tuple[results.Results, dict[str, Checkpoint], list[str]]:
    """The run in `folder`, its models, a message for each that it has no weights of; UsageError if they are gone.

    The task of the run is built: code that its results.json names and conf/ does not list is called with `trust` only.
    """
    run = results.read(folder)
    if run is None:
        raise UsageError(f"{folder} has no {results.NAME}: give the folder of a finished run, as runs/tofu/default")
    check_trusted(folder / results.NAME, task_fields(run.config), trust)
    problem = f"{folder}, run at commit {run.commit or 'unknown'}, cannot be read by this version: run it again"
    try:
        prepared = prepared_models.checkpoints(built(lambda: build_models(run.config), problem))
    except KeyError as error:
        raise UsageError(f"{problem}: its configuration has no key {error}") from error
    found, absent = dict[str, Checkpoint](), list[str]()
    for name, role in ((each.key, each.role) for each in results.COMPARED if not each.with_system_prompt):
        checkpoint = _unlearned(run, folder) if role is None else prepared.get(role)
        if checkpoint is None:
            absent.append(f"{name}: this run had no weights of it")
            continue
        path = Path(checkpoint.path)
        if path.is_absolute() and not (path / "config.json").is_file() and not lora.is_adapter(str(path)):
            raise UsageError(f"found no {name} model in {checkpoint.path}: type {_command(folder, name)}")
        found[name] = checkpoint
    return run, found, absent


def _unlearned(run: results.Results, folder: Path) -> Checkpoint:
    """The checkpoint of the model that the run ended with; of a run without unlearning, of the model it measured."""
    if "unlearn" not in run.config["stages"]:
        return Checkpoint(run.config["model"]["path"], run.config["model"]["revision"])
    if run.config["save"] == "none":
        raise UsageError(
            f"{folder} was run with save=none, which keeps no unlearned model: type {_command(folder, 'unlearned')}"
        )
    request = run.config["task"].get("request")  # `folder` is that of the sequence, or the request's own
    last = sequence.folder_of(folder, request) if request else folder
    return Checkpoint(str((last if last.is_dir() else folder).absolute() / MODEL))


def _command(folder: Path, name: str) -> str:
    """The command that makes the model `name` of the run in `folder` again."""
    typed = results.typed(folder)
    overrides = ["<what you typed>"] if typed is None else typed
    last = ["save=final", "overwrite=true"] if name == "unlearned" else ["stages=[prepare]", "name=prepared"]
    kept = [line for line in overrides if not line.startswith(tuple(key.split("=")[0] + "=" for key in last))]
    return "python -m soul_exp " + " ".join(shlex.quote(line) for line in [*kept, *last])


def load(run: results.Results, checkpoint: Checkpoint) -> LanguageModel:
    """The model as its run loaded it, in evaluation mode, on the GPU if there is one."""
    attention.choose_kernel(run.config["model"]["attention"])
    lm = prepared_models.load(model_settings(run.config["model"]), checkpoint)
    loading.move(lm.model, "cuda" if torch.cuda.is_available() else "cpu")
    lm.model.eval()
    return lm


def answers(lm: LanguageModel, questions: Sequence[str], options: Options) -> list[str]:
    """The greedy answer to each question, with its NLL and the probability of the given answer on a line below."""
    prompts = [options.item(question, "a") for question in questions]  # generation drops the answer, but needs one
    texts = generations(lm, prompts, batch_size=8, max_new_tokens=options.max_new_tokens)
    return [
        f"{text or '(nothing)'}\n{_likelihood(lm, question, text, options)}"
        for question, text in zip(questions, texts, strict=True)
    ]


def _likelihood(lm: LanguageModel, question: str, text: str, options: Options) -> str:
    try:
        line = f"NLL {_nll(lm, question, text, options):.3f} nats per token"
    except UsageError as error:  # such as an answer whose first character shares a token with the prompt's last
        line = f"no NLL: {error}"
    if options.answer is None:
        return line
    return f"{line}; probability of the given answer {math.exp(-_nll(lm, question, options.answer, options)):.3g}"


def _nll(lm: LanguageModel, question: str, answer: str, options: Options) -> float:
    """The mean negative log-likelihood of the tokens of `answer` and the end token, in nats per token."""
    (read,) = likelihoods(lm, [options.item(question, answer)], batch_size=1)
    return float(-read.logp.mean())


def utf8(typed: str) -> str:
    """`typed`, on the command line or standard input, as UTF-8 under any locale. Raises UsageError if it is not."""
    try:
        text = os.fsencode(typed).decode()
    except UnicodeError:
        text = ""
    if not text.strip():
        raise UsageError(f"{typed!r}: expected a text in UTF-8 that is not empty")
    return text


def side_by_side(question: str, texts: Mapping[str, str]) -> str:
    """The question, and below it the text of each model, in at most 100 columns."""
    lines = wrapped([question]) or [""]
    for name, text in texts.items():
        inner = [part for line in text.split("\n") for part in wrapped([line], WIDTH - 12) or [""]]
        lines += [f"{name if i == 0 else '':<11} {line}".rstrip() for i, line in enumerate(inner)]
    return "\n".join([*lines, ""])


def reports(folder: Path, questions: Sequence[str], options: Options, trust: bool = False) -> Iterator[str]:
    """The caption of the run, then the models' answers to each question, or else to each line of standard input."""
    run, checkpoints, absent = models_of(folder, trust)
    caption = "\n".join([run.caption, *absent, ""])
    if not questions and sys.stdin.isatty():  # a dialogue holds all models; otherwise one is loaded at a time
        loaded = {name: load(run, checkpoint) for name, checkpoint in checkpoints.items()}
        yield caption
        while typed := input("> ").strip():
            question = utf8(typed)
            yield side_by_side(question, {name: answers(lm, [question], options)[0] for name, lm in loaded.items()})
        return
    questions = questions or [utf8(line).strip() for line in sys.stdin if line.strip()]
    texts = {name: answers(load(run, checkpoint), questions, options) for name, checkpoint in checkpoints.items()}
    yield caption  # once every model could be read
    for i, question in enumerate(questions):
        yield side_by_side(question, {name: of_model[i] for name, of_model in texts.items()})


def main() -> None:
    """Prints the answers; exits 2 for bad input, with a line on stderr."""
    parser = argparse.ArgumentParser(
        "python -m soul_exp.ask", description="Print the answers of a run's original, unlearned and retrained model."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run: runs/tofu/default")
    parser.add_argument(
        "questions", nargs="*", default=[], metavar="QUESTION", help="default: a dialogue, or standard input"
    )
    parser.add_argument("--answer", help="also print each model's probability of this answer: geometric mean per token")
    parser.add_argument("--raw", action="store_true", help="continue running text, without the model's template")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="the longest answer, in tokens (100)")
    parser.add_argument("--trust", action="store_true", help="call code that results.json names and conf/ does not")
    open_standard_streams()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # for `utf8`
    args = parser.parse_intermixed_args()  # questions may stand behind an option
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens {args.max_new_tokens}: expected a whole number of 1 or more")
    library.disable_progress_bar()
    library.set_verbosity_error()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    try:
        questions, answer = [utf8(text) for text in args.questions], None if args.answer is None else utf8(args.answer)
        for text in reports(args.run, questions, Options(args.raw, answer, args.max_new_tokens), args.trust):
            print(printable(text), flush=True)
    except (KeyboardInterrupt, EOFError):
        print()
    except UsageError as error:
        parser.exit(2, printable(f"soul_exp.ask: {error}\n"))
    if is_lost():
        parser.exit(2)


if __name__ == "__main__":
    main()
