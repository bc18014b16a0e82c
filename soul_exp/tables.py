"""`python -m soul_exp.tables runs/NAME`: the tables of a folder of runs, from their results.json and records alone."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from soul_exp.distributed.output import is_lost, open_standard_streams
from soul_exp.errors import UsageError
from soul_exp.files import write_atomically
from soul_exp.report.comparison import aggregated, comparisons
from soul_exp.report.console import summary
from soul_exp.report.labels import printable
from soul_exp.report.latex import latex
from soul_exp.report.markdown import markdown, table
from soul_exp.report.runs import CHOSEN, attacks, load, trials

__all__ = ["CHOSEN", "aggregated", "attacks", "comparisons", "load", "main", "table", "trials"]  # what notebooks use


def main() -> None:
    """Prints a table and writes it as files to the folder of runs; exits 2, with a line on stderr, if it cannot."""
    parser = argparse.ArgumentParser(
        "python -m soul_exp.tables",
        description="Compare the runs of a folder. docs/tables.md says what marks, intervals and tests mean.",
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="runs/NAME",
        help="the folder of runs; gets table.md, table.tex (booktabs), methods.csv (one row per combination: mean, "
        "interval, n), table.csv (one row per run) and, for tuned runs, trials.csv",
    )
    parser.add_argument("--metrics", metavar="A,B,C", help="the columns of the table, named as in results.json")
    shown = ("console", "markdown", "latex", "csv")
    parser.add_argument("--format", choices=shown, default="console", help="what is printed; by default few columns")
    args = parser.parse_args()
    open_standard_streams()
    metrics = args.metrics.split(",") if args.metrics else None
    try:
        found = comparisons(args.folder, metrics)
        made: Mapping[str, Callable[[], str]] = {
            "markdown": lambda: files["table.md"],
            "latex": lambda: files["table.tex"],
            "csv": lambda: files["methods.csv"],
            "console": lambda: summary(args.folder, metrics),
        }
        files = {"table.md": markdown(found), "table.tex": latex(found), "methods.csv": csv(aggregated(args.folder))}
        files["table.csv"] = csv(load(args.folder))
        if len(tried := trials(args.folder)):
            files["trials.csv"] = csv(tried)
        print(printable(made[args.format]()), end="", flush=True)
        for name, text in files.items():
            write_atomically(args.folder / name, text)
    except (UsageError, OSError) as error:
        parser.exit(2, printable(f"soul_exp.tables: {error}\n"))
    if is_lost():
        parser.exit(2)


def csv(frame: pd.DataFrame) -> str:
    """The frame as CSV. A text that a spreadsheet would compute, as =1+1, begins with an apostrophe."""

    def inert(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value

    return frame.map(inert).rename(columns=inert).to_csv(index=False)


if __name__ == "__main__":
    main()
