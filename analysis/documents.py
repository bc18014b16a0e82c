"""Tables and figures of README.md and docs/, made from the runs behind them, whose results docs/runs/ keeps.

A region of a document stands between a mark, alone on its line, and `<!-- end -->`:

    <!-- tables NAME --metrics A,B,C -->                  the table of these metrics, as soul_exp.tables writes it
    <!-- tables NAME --metrics A,B,C --without D,E -->    the same, without some of its columns
    <!-- figure NAME KIND -->                             an image, whose file soul_exp.figures draws

The runs are those of runs/NAME where that folder exists, and docs/runs/NAME.tar.xz follows it; else the archive's.
"""

import argparse
import io
import itertools
import json
import lzma
import re
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from soul_exp import figures, results, tables
from soul_exp.errors import UsageError, counted, explained
from soul_exp.files import write_atomically
from soul_exp.report.markdown import markdown
from soul_exp.report.order import in_job_order, typed_order
from soul_exp.report.runs import find
from soul_exp.report.table import Comparison

ROOT, COMMAND = Path(__file__).parents[1], "python analysis/documents.py"
REGION = re.compile(
    r"^(?P<mark><!-- (?:(?P<is_table>tables)|figure) (?P<name>\w[\w.-]*) "
    r"(?(is_table)--metrics (?P<metrics>\S+)(?: --without (?P<without>\S+))?|(?P<kind>[\w-]+)) -->\n)"
    r"(?P<inside>(?:(?!<!-- ).*\n)*)<!-- end -->$",
    re.M,
)
MARK = re.compile(r"^<!-- *(?:tables|figure|end)\b.*$", re.M)
EXPECTED = "`<!-- tables NAME --metrics A,B,C -->` or `<!-- figure NAME KIND -->`, and `<!-- end -->` below it"
IMAGE = re.compile(r"!\[[^\]]*\]\((?!\w+:)([^)\s]+)\)")
TABLE = re.compile(r"(?:^\|.*\|\n)+", re.M)
FOLDERS = re.compile(r'(?<=[",])/(?:[^",/]*/)*')  # of an absolute path in JSON or in a list of values: one machine's
MIXED = r"DIFFERENT .*, also within a row"
TOLERANCE = 0.5  # of pixels, 0 to 255, root mean square: another machine may round the edge of a letter otherwise


def update(root: Path, runs: Path, *, write: bool) -> list[str]:
    """What of the documents in `root` is not what its runs give, a line for each; with `write` it is made again.

    `runs` has the folders NAME. Raises UsageError, with document and line, for a region that cannot be made.
    """
    stale: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        for page in pages(root):
            text, parts, done = page.read_text(), [], 0
            rest = REGION.sub(lambda region: "\n" * region[0].count("\n"), text)
            if lost := MARK.search(rest):
                raise UsageError(f"{line(root, page, rest, lost)}: found `{lost[0]}`, expected {EXPECTED}")
            for region in REGION.finditer(text):
                where, name = line(root, page, text, region), region["name"]
                kept = Path(place) / name
                try:
                    if not kept.is_dir():
                        stale += unpacked(root / f"docs/runs/{name}.tar.xz", runs / name, kept, write=write)
                    inside, found = made(region, page.parent, runs / name, kept, write=write)
                except UsageError as error:
                    raise UsageError(f"{where}: {error}") from error
                stale += [f"{where}: {each} of {name}" for each in found]
                parts += [text[done : region.end("mark")], inside]
                done = region.end("inside")
            if write and (new := "".join([*parts, text[done:]])) != text:
                write_atomically(page, new)
    return stale


def pages(root: Path) -> list[Path]:
    """The documents of `root`."""
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")])


def line(root: Path, page: Path, text: str, found: re.Match[str]) -> str:
    """Where in `page` with this `text` something was `found`."""
    return f"{page.relative_to(root)}, line {text.count(chr(10), 0, found.start()) + 1}"


def unchecked(root: Path) -> list[str]:
    """The images of documents outside regions, whose runs are not kept, and how many tables of numbers a page has."""
    outside = {page: REGION.sub("", page.read_text()) for page in pages(root)}
    links = ((page.parent / link).resolve() for page, text in outside.items() for link in IMAGE.findall(text))
    images = sorted({str(link.relative_to(root.resolve())) for link in links})
    numbers = {page: sum(map(is_of_numbers, TABLE.findall(text))) for page, text in outside.items()}
    return [*images, *(f"{counted(n, 'table')} of {page.relative_to(root)}" for page, n in numbers.items() if n)]


def is_of_numbers(rows: str) -> bool:
    """Whether a third of the cells of a Markdown table or more begin with a number: it was measured, once."""
    cells = [cell.strip(" *") for cell in re.split(r"[|\n]", rows) if cell.strip(" -")]
    return 3 * sum(bool(re.match(r"[-−]?\d", cell)) for cell in cells) >= len(cells)


def unpacked(archive: Path, given: Path, kept: Path, *, write: bool) -> list[str]:
    """Fills the folder `kept` with what `archive` has to hold; returns a line if it does not hold that.

    That is what `packed` takes of the runs `given` or, without these, what it holds. `write` makes the archive again.
    """
    if not archive.is_file() and not given.is_dir():
        raise UsageError(f"found neither {given} nor {archive}: run a sweep with name={given.name}, or change the name")
    with explained((lzma.LZMAError, tarfile.TarError), f"{archive} is damaged", "restore it from git, or remove it"):
        old = lzma.decompress(archive.read_bytes()) if archive.is_file() else b""
        new = packed(given) if given.is_dir() else old
        with tarfile.open(fileobj=io.BytesIO(new)) as tar:
            tar.extractall(kept, filter="data")
    if new == old:
        return []
    if write:
        archive.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(archive, lzma.compress(new))
    return [f"{archive.name}, the archive of {given}"]


def packed(folder: Path) -> bytes:
    """What tables and figures need of the runs below `folder`, as .tar: the same bytes for the same runs.

    That is results.json of each, in folders numbered as the jobs were, and the order in which sweeps listed values.
    """
    runs = in_job_order(folder, find(folder)[0])
    files = {f"{number:04}/{results.NAME}": folder / name / results.NAME for number, name in enumerate(runs)}
    contents = {path: json.loads(file.read_text()) for path, file in files.items()}
    params = {key: ",".join(values) for key, values in typed_order(folder).items()}
    contents["multirun.yaml"] = {"hydra": {"overrides": {"task": []}, "sweeper": {"params": params}}}
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for path, value in contents.items():
            content = FOLDERS.sub("", json.dumps(value, indent=1)).encode()
            entry = tarfile.TarInfo(path)  # without time and owner
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return written.getvalue()


def made(region: re.Match[str], folder: Path, given: Path, kept: Path, *, write: bool) -> tuple[str, list[str]]:
    """What has to stand in the region of a document in `folder`, and what there is stale."""
    inside, kind = region["inside"], region["kind"]
    if region["is_table"]:
        new = table(kept, region)
        if given.is_dir() and table(given, region) != new:
            raise UsageError(f"an archive of {given} would give another table: it cuts paths to their last names")
        return new, ["the table"] * (new != inside)
    links, png = IMAGE.findall(inside), figure(kept, kind)
    if len(links) != 1:
        raise UsageError(f"found {counted(len(links), 'image')} below this mark, expected the figure's")
    if is_same(folder / links[0], png):
        return inside, []
    if write:
        write_atomically(folder / links[0], png)
    return inside, [f"{links[0]}, the figure {kind}"]


def table(folder: Path, region: re.Match[str]) -> str:
    """The table of the runs below `folder` that the region names, without heading and notes.

    Raises UsageError for runs that are not comparable, and for a column that the table cannot be without.
    """
    without = region["without"].split(",") if region["without"] else []
    compared = [each for each in tables.comparisons(folder, region["metrics"].split(",")) if each.tables]
    found, notes = [each.tables[0] for each in compared], [note for each in compared for note in each.notes]
    if len(found) > 1:
        raise UsageError(f"found {len(found)} tables, as not all of these runs are comparable, expected one")
    if mixed := next((note for note in notes if re.match(MIXED, note)), None):
        raise UsageError(f"a row has runs that were not made alike: {mixed}; expected one machine and one environment")
    columns, rows = found[0].columns, found[0].rows
    known = [column.key for column in columns]
    if unknown := [key for key in without if key not in known]:
        raise UsageError(f"--without: there is no column {unknown[0]!r}, choose from {', '.join(known)}")
    if "status" in without and not all(row.is_sound for row in rows):
        raise UsageError("--without status: a run diverged or collapsed, which its row has to say")
    is_shown = [key not in without for key in known]
    rows = tuple(replace(row, cells=tuple(itertools.compress(row.cells, is_shown))) for row in rows)
    shown = replace(found[0], about="", columns=tuple(itertools.compress(columns, is_shown)), rows=rows)
    return markdown([Comparison("", "", (shown,), ())]).rstrip() + "\n"


def figure(folder: Path, kind: str) -> bytes:
    """The figure `kind` of the runs below `folder` as PNG; of several tables, kind is `cost-A` and so on."""
    name = kind.partition("-")[0]
    if name not in figures.NAMES:
        raise UsageError(f"there is no figure {kind!r}, choose from {', '.join(figures.NAMES)}")
    found = figures.drawn(figures.load(folder), name)
    if not isinstance(drawn := found.get(kind), figures.Drawn):
        raise UsageError(f"results.json alone gives no figure {kind}: {drawn or f'choose from {[*found]}'}")
    return figures.image(drawn, "png")


def is_same(path: Path, png: bytes) -> bool:
    """Whether the image `path` has the caption of `png` and, up to TOLERANCE, its pixels."""
    try:
        old, new = Image.open(path), Image.open(io.BytesIO(png))
        if (old.size, old.info.get("Description")) != (new.size, new.info.get("Description")):
            return False
        gaps = np.asarray(old.convert("RGB"), float) - np.asarray(new.convert("RGB"), float)
    except OSError:  # missing or damaged
        return False
    return float(np.sqrt(np.mean(gaps**2))) <= TOLERANCE


def main() -> None:
    """Makes what is stale, or with --check names it and exits 1; exits 2, with a line on stderr, if it cannot."""
    parser = argparse.ArgumentParser(COMMAND, description="Tables and figures of README.md and docs/, from their runs.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table or figure is stale")
    args = parser.parse_args()
    try:
        stale = update(ROOT, ROOT / "runs", write=not args.check)
    except (UsageError, OSError) as error:
        parser.exit(2, f"{COMMAND}: {error}\n")
    for each in stale:
        print(f"{each} is stale: type `{COMMAND}`" if args.check else f"{each} is made again")
    print(f"not checked, as their runs are not kept: {', '.join(unchecked(ROOT)) or 'no figure'}")
    sys.exit(int(args.check and bool(stale)))


if __name__ == "__main__":
    main()
