"""`python -m soul_exp.report runs/NAME`: one self-contained HTML page about a folder of runs."""

import argparse
from pathlib import Path

from soul_exp.errors import UsageError
from soul_exp.files import write_atomically
from soul_exp.report.labels import printable
from soul_exp.report.page import html

NAME = "report.html"


def main() -> None:
    """Writes the page and prints where it is; exits 2, with a line on stderr, if it cannot."""
    parser = argparse.ArgumentParser(
        "python -m soul_exp.report",
        description="One HTML page about the runs of a folder: tables, figures, and the answers of their models side "
        "by side. It needs no network and no other file. It quotes the forgotten rows.",
    )
    parser.add_argument("folder", type=Path, metavar="runs/NAME", help="the folder of runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page; by default runs/NAME/{NAME}")
    args = parser.parse_args()
    out = args.out or args.folder / NAME
    try:
        if args.out and not out.parent.is_dir():
            raise UsageError(f"--out: {out.parent} is not a folder: make it first")
        text = html(args.folder, out.parent)
        write_atomically(out, text)
    except (UsageError, OSError) as error:
        parser.exit(2, printable(f"soul_exp.report: {error}\n"))
    print(printable(f"{out}: {len(text.encode()) / 1e6:.1f} MB"))


if __name__ == "__main__":
    main()
