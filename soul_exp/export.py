"""`python -m soul_exp.export RUN DIR`: the unlearned model of a run with a model card, fit to be uploaded to a hub."""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from soul_exp import results
from soul_exp.distributed.output import is_lost, open_standard_streams
from soul_exp.errors import UsageError
from soul_exp.files import complete_folder, hashes
from soul_exp.report.console import comparison
from soul_exp.report.labels import on_one_line, printable
from soul_exp.stages.stage import MODEL

OWN = "unlearned.json"  # of the model's folder: what a run needs to resume
PUBLISHED = (".safetensors", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")  # of weights, tokenizer, code
ADAPTER = "adapter_config.json"
LIMITS = (
    "Unlearning is measured on the questions, prompts and attacks named here. That the model answers none of them does "
    "not show that the facts cannot be brought back by others."
)


def export(folder: Path, to: Path) -> Path:
    """Write the model of the run in `folder` to the new folder `to`: weights, tokenizer, and README.md, its card.

    Raises UsageError if the run has no unlearned model, if its weights are not those that were measured, if a file of
    another kind, such as an optimizer's state, lies beside them, or if `to` holds anything.
    """
    run, model = _exportable(folder)
    if to.is_dir() and any(to.iterdir()):
        raise UsageError(f"{to} is not empty: name a new folder")
    if to.exists() and not to.is_dir():
        raise UsageError(f"{to} is a file: name a new folder")
    files = [file for file in sorted(model.iterdir()) if file.name != OWN]
    if strange := [file.name for file in files if file.suffix not in PUBLISHED]:
        raise UsageError(f"{model} has {strange[0]}, expected weights, configuration and tokenizer alone: remove it")
    card = card_of(run, folder)
    with complete_folder(to) as partial:
        for file in files:
            shutil.copyfile(file, partial / file.name)
        (partial / "README.md").write_text(str(card) + "\n")
    return to


def _exportable(folder: Path) -> tuple[results.Results, Path]:
    run, model = results.read(folder), folder / MODEL
    if run is None:
        raise UsageError(f"{folder} has no {results.NAME}: name the folder of a finished run, as runs/tofu/default")
    if "unlearn" not in run.config.get("stages", ()):
        raise UsageError(
            f"{folder} unlearned nothing, it measured {run.config['model']['path']}: upload that checkpoint"
        )
    if not model.is_dir():
        raise UsageError(f"{folder} has no folder {MODEL}: run it again with save=final")
    stated = (run.sha256.get("models") or {}).get("unlearned")
    if not stated:
        raise UsageError(f"{folder}: its results.json does not state the weights that were measured: run it again")
    if (found := hashes(model, *stated)) != dict(stated):
        changed = next(name for name in stated if found.get(name) != stated[name])
        raise UsageError(f"{model / changed} is not the file that was measured: run it again with overwrite=true")
    return run, model


def card_of(run: results.Results, folder: Path) -> ModelCard:
    """The model card of the run in `folder`, from its results.json alone."""
    is_adapter = (folder / MODEL / ADAPTER).is_file()
    data = ModelCardData(
        base_model=_hub_name(run),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["unlearning", *(f"{group}-{run.choices[group]}" for group in ("task", "loss", "optimizer"))],
    )
    body = "\n\n".join(_sections(run))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _hub_name(run: results.Results) -> str | None:
    """The checkpoint that was unlearned, if it has a name on the hub."""
    path = run.config["model"].get("path")
    return path if path and not Path(path).exists() and path.count("/") == 1 else None


def _sections(run: results.Results) -> Iterator[str]:
    yield f"# {on_one_line(run.name)}: a model that was made to forget"
    yield "## What it forgot, and what it kept"
    yield "`before` is the original model, `after` this one, and `retrained` never saw what was to be forgotten."
    yield _block(printable(comparison(run)))
    if not run.attacks:
        yield "It was not attacked: whether it stays forgotten was not measured."
    yield "## Limits"
    yield LIMITS
    yield "## How it was made"
    commit = run.commit or "unknown"
    yield f"soul_exp at commit {commit}; seeds {', '.join(f'{name} {seed}' for name, seed in run.seeds.items())}."
    options = {key: run.config[key] for key in ("model", "loss", "optimizer", "train") if key in run.config}
    yield _block(json.dumps(options, indent=1))
    yield "SHA-256 of what was measured:"
    yield "\n".join(f"- `{name}`: {digest}" for name, digest in run.sha256["models"]["unlearned"].items())


def _block(text: str) -> str:
    """`text` as it is; a fence in it does not end the block."""
    return "```text\n" + text.replace("```", "'''") + "\n```"


def main() -> None:
    """Exports, and prints the command that uploads; exits 2, with a line on stderr, if it cannot."""
    parser = argparse.ArgumentParser("python -m soul_exp.export", description="A run's model with a card, to upload.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run, as runs/tofu/default")
    parser.add_argument("to", type=Path, metavar="DIR", help="a new folder for weights, tokenizer and README.md")
    args = parser.parse_args()
    open_standard_streams()
    try:
        export(args.run, args.to)
        print(f"wrote {args.to}; to upload it: hf upload <user>/<name> {args.to}", flush=True)
    except (UsageError, OSError) as error:
        parser.exit(2, printable(f"soul_exp.export: {error}\n"))
    if is_lost():
        parser.exit(2)


if __name__ == "__main__":
    main()
