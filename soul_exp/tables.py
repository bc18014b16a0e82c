"""`python -m soul_exp.tables runs/NAME`: the tables of a folder of runs, from their results.json alone."""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from soul_exp.distributed.output import is_lost, open_standard_streams
from soul_exp.errors import UsageError
from soul_exp.files import write_atomically
from soul_exp.report.labels import printable
from soul_exp.report.markdown import table
from soul_exp.report.runs import CHOSEN, attacks, load, trials

__all__ = ["CHOSEN", "attacks", "load", "main", "table", "trials"]  # what notebooks use


def main() -> None:
    """Prints the table, writes it and CSV files of runs and trials; exits 2, with a line on stderr, if it cannot."""
    parser = argparse.ArgumentParser("python -m soul_exp.tables", description="Compare the runs of a folder.")
    parser.add_argument(
        "folder",
        type=Path,
        metavar="runs/NAME",
        help="the folder of runs; gets table.md, table.csv (one row per run) and, for tuned runs, trials.csv",
    )
    parser.add_argument("--metrics", metavar="A,B,C", help="the columns of the table, named as in results.json")
    args = parser.parse_args()
    open_standard_streams()
    try:
        text = table(args.folder, args.metrics.split(",") if args.metrics else None)
        print(text, end="", flush=True)
        write_atomically(args.folder / "table.md", text)
        write_atomically(args.folder / "table.csv", csv(load(args.folder)))
        if len(tried := trials(args.folder)):
            write_atomically(args.folder / "trials.csv", csv(tried))
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
