"""`python -m soul_exp.report runs/NAME`: one self-contained HTML page about a folder of runs."""

import argparse
import os
from pathlib import Path

from soul_exp.errors import UsageError, first_line
from soul_exp.files import write_atomically
from soul_exp.report.comparison import aggregated
from soul_exp.report.labels import printable
from soul_exp.report.page import html
from soul_exp.report.runs import find

NAME = "report.html"
SECONDS = 30.0  # that connecting may take
BESIDE = ("table.md", "table.tex", "methods.csv", "table.csv", "trials.csv", "figures/*.pdf", "figures/*.png")


def main() -> None:
    """Writes the page and prints where it is; exits 2, with a line on stderr, if it cannot."""
    parser = argparse.ArgumentParser(
        "python -m soul_exp.report",
        description="One HTML page about the runs of a folder: tables, figures, and the answers of their models side "
        "by side. It needs no network and no other file. It quotes the forgotten rows.",
    )
    parser.add_argument("folder", type=Path, metavar="runs/NAME", help="the folder of runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page; by default runs/NAME/{NAME}")
    parser.add_argument(
        "--wandb",
        choices=("online", "offline"),
        help="copy the page, the means as a table, and what tables and figures wrote before, to Weights & Biases: one "
        "run of job type report in the group of the runs",
    )
    args = parser.parse_args()
    out = args.out or args.folder / NAME
    try:
        if args.out and not out.parent.is_dir():
            raise UsageError(f"--out: {out.parent} is not a folder: make it first")
        text = html(args.folder, out.parent)
        write_atomically(out, text)
        print(printable(f"{out}: {len(text.encode()) / 1e6:.1f} MB"), flush=True)
        if args.wandb:
            print(printable(copy(args.folder, out, args.wandb)))
    except (UsageError, OSError) as error:
        parser.exit(2, printable(f"soul_exp.report: {error}\n"))


def copy(folder: Path, page: Path, mode: str) -> str:
    """Copy the page and what stands beside it to wandb, in the project and group of the runs; says what was copied.

    Raises UsageError where wandb cannot be reached.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve() / "wandb"))  # of files on their way
    import wandb

    first = next(iter(find(folder)[0].values()))
    settings = first.config.get("wandb") or {}
    (folder / "wandb").mkdir(exist_ok=True)
    try:
        with wandb.init(
            project=settings.get("project") or "soul_exp",
            entity=settings.get("entity"),
            dir=str(folder),
            name=f"{first.name} report",
            group=first.name,
            job_type="report",
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(init_timeout=SECONDS),
        ) as run:
            artifact = wandb.Artifact(f"{first.name}-report", type="report")
            files = [page, *(file for pattern in BESIDE for file in sorted(folder.glob(pattern)))]
            for file in files:
                artifact.add_file(str(file))
            run.log_artifact(artifact)
            images = {f"figures/{file.stem}": wandb.Image(str(file)) for file in files if file.suffix == ".png"}
            run.log({"methods": wandb.Table(dataframe=aggregated(folder)), **images})
    except (wandb.Error, ValueError, TimeoutError) as error:
        raise UsageError(f"wandb: {first_line(error)}: type --wandb offline, then wandb sync") from error
    return f"{folder / 'wandb'}: {', '.join(file.name for file in files)}"


if __name__ == "__main__":
    main()
