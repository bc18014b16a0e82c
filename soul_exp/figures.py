"""`python -m soul_exp.figures runs/NAME`: the figures of a folder of runs, as PDF and PNG, each with its caption."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from soul_exp.distributed.output import is_lost, open_standard_streams
from soul_exp.errors import UsageError
from soul_exp.files import write_atomically
from soul_exp.report.drawing import FORMATS, Drawn, NoDataError, image
from soul_exp.report.figures import (
    NAMES,
    cost,
    diagnostics,
    drawn,
    plane,
    relearning,
    robustness,
    sensitivity,
    trajectories,
    trials,
)
from soul_exp.report.frames import Frames, load
from soul_exp.report.labels import printable

__all__ = [  # what notebooks use
    "cost",
    "diagnostics",
    "main",
    "plane",
    "relearning",
    "robustness",
    "sensitivity",
    "show",
    "trajectories",
    "trials",
]


def main() -> None:
    """Writes the figures and prints their names, and why there is none; exits 2, with a line on stderr, without any."""
    parser = argparse.ArgumentParser("python -m soul_exp.figures", description="Draw the runs of a folder.")
    parser.add_argument(
        "folder", type=Path, metavar="runs/NAME", help="the folder of runs; gets figures/*.pdf and *.png"
    )
    parser.add_argument("--only", metavar="A,B,C", help=f"some of the figures: {', '.join(NAMES)}")
    args = parser.parse_args()
    open_standard_streams()
    names = args.only.split(",") if args.only else NAMES
    try:
        if unknown := [name for name in names if name not in NAMES]:
            raise UsageError(f"--only: there is no figure {unknown[0]!r}, choose from {', '.join(NAMES)}")
        if not write(args.folder, names):
            raise UsageError(f"{args.folder} has no data for {', '.join(names)}: see above")
    except (UsageError, OSError) as error:
        parser.exit(2, printable(f"soul_exp.figures: {error}\n"))
    if is_lost():
        parser.exit(2)


def write(folder: Path, names: Sequence[str]) -> int:
    """Write the figures of these names to `folder`/figures and print a line for each; returns how many there are."""
    frames, place, written = load(folder), folder / "figures", 0
    for name in names:
        for title, found in drawn(frames, name).items():
            if isinstance(found, NoDataError):
                print(printable(f"{title}: {found}"), flush=True)
                continue
            place.mkdir(exist_ok=True)
            for kind in FORMATS:
                write_atomically(place / f"{title}.{kind}", image(found, kind))
            write_atomically(place / f"{title}.txt", f"{found.caption}\n")
            print(printable(f"{title}: {place / title}.{{{','.join((*FORMATS, 'txt'))}}}"), flush=True)
            written += 1
    return written


def show(frames: Frames, *names: str) -> None:
    """Show the figures of these names in a notebook, each with its caption, or why there is none."""
    from IPython.display import display

    for name in names:
        for title, found in drawn(frames, name).items():
            if isinstance(found, Drawn):
                display(found)
            print(printable(f"{title}: {found.caption if isinstance(found, Drawn) else found}"))


if __name__ == "__main__":
    main()
