"""`python -m soul_exp.tables runs/NAME`: the tables of a folder of runs, from their results.json alone."""

import argparse
from pathlib import Path

from soul_exp.errors import UsageError
from soul_exp.files import write_atomically
from soul_exp.report.markdown import table
from soul_exp.report.runs import CHOSEN, load, trials

__all__ = ["CHOSEN", "load", "main", "table", "trials"]  # what notebooks use


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
    try:
        text = table(args.folder, args.metrics.split(",") if args.metrics else None)
        print(text, end="", flush=True)
        write_atomically(args.folder / "table.md", text)
        write_atomically(args.folder / "table.csv", load(args.folder).to_csv(index=False))
        if len(tried := trials(args.folder)):
            write_atomically(args.folder / "trials.csv", tried.to_csv(index=False))
    except (UsageError, OSError) as error:
        parser.exit(2, f"soul_exp.tables: {error}\n")


if __name__ == "__main__":
    main()
