"""Tables and figures of documents are what their runs give: analysis/documents.py makes them, and finds stale ones."""

from __future__ import annotations

import importlib.util
import io
import json
import lzma
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import markdown
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_tables import UNLEARNED, left, made, tables_in

from soul_exp import results, tables
from soul_exp.errors import UsageError
from soul_exp.report.order import typed_order

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("documents", ROOT / "analysis/documents.py")
assert SPEC is not None and SPEC.loader is not None
documents = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(documents)

MARK = "<!-- tables small --metrics log10_forget_quality,utility,mia_auc --without mia_auc_delta -->"
README = f"# Title\n\n{MARK}\n<!-- end -->\n\nMore.\n"
PAGE = "<!-- figure small plane -->\n![a plane](plane.png)\n<!-- end -->\n\n![other](other.png) ![x](https://x.org/x.png)\n"
SWEEP = {"overrides": {"task": ["optimizer=sophia,adam", "seed=0,1", "task.source=/data/tofu"]}, "sweeper": {}}
ARCHIVE = "docs/runs/small.tar.xz"


def update(root: Path, *, write: bool = True) -> list[str]:
    found: list[str] = documents.update(root, root / "runs", write=write)
    return found


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a table and a figure of a sweep of four runs, made."""
    root = tmp_path_factory.mktemp("repository")
    runs = {
        f"{optimizer}-{seed}": made(
            "npo", optimizer, seed, source="/data/tofu", metrics={**UNLEARNED, "utility": value}
        )
        for optimizer, seed, value in (("adam", 0, 0.5), ("adam", 1, 0.54), ("sophia", 0, 0.7), ("sophia", 1, 0.72))
    }
    folder = left(root / "runs/small", **runs)
    (folder / "multirun.yaml").write_text(json.dumps({"hydra": SWEEP}))
    for number, name in enumerate(("sophia-0", "sophia-1", "adam-0", "adam-1")):
        (folder / name / ".hydra").mkdir()
        (folder / name / ".hydra/hydra.yaml").write_text(f"hydra:\n  job:\n    num: {number}\n")
        (folder / name / "records").mkdir()
        (folder / name / "records/forget.jsonl").write_text("{}\n")
    (root / "docs").mkdir()
    (root / "README.md").write_text(README)
    (root / "docs/page.md").write_text(PAGE)
    assert len(update(root)) == 3
    return root


@pytest.fixture
def root(repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(repository, tmp_path / "root"))


def kept(root: Path) -> dict[str, bytes]:
    with tarfile.open(root / ARCHIVE) as tar:
        return {each.name: tar.extractfile(each).read() for each in tar}  # type: ignore[union-attr]


def archive_of(root: Path, files: dict[str, bytes], *links: tarfile.TarInfo) -> None:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:xz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for link in links:
            tar.addfile(link)
    (root / ARCHIVE).write_bytes(written.getvalue())


def changed(path: Path) -> None:
    """Another utility in a results.json."""
    found = results.read(path)
    assert found is not None
    results.write(path, replace(found, metrics={**found.metrics, "unlearned": {**UNLEARNED, "utility": 0.1}}))


def test_a_region_holds_the_printed_table_without_heading_and_notes(root: Path) -> None:
    text = (root / "README.md").read_text()
    (rows,) = tables_in(text)
    (printed, *_) = tables_in(tables.table(root / "runs/small", ["log10_forget_quality", "utility", "mia_auc"]))
    assert rows == [{key: row[key] for key in row if not key.startswith("Δ")} for row in printed]
    assert [row["optimizer"] for row in rows] == ["", "", "sophia", "adam"]  # as the sweep listed them
    assert "**0.710 [0.583, 0.837]**" in text and text.startswith(README.partition("<!-- end")[0] + "| loss")
    assert text.endswith(" |\n<!-- end -->\n\nMore.\n") and max(map(len, text.splitlines())) < 120


def test_marks_do_not_show_and_what_is_between_them_does(root: Path) -> None:
    html = markdown.markdown((root / "README.md").read_text(), extensions=["tables"])
    shown = re.sub("<!--.*?-->", "", html)
    assert shown.count("<tr>") == 5 and "<td>sophia</td>" in shown and "metrics" not in shown and "end" not in shown


def test_runs_that_are_gone_leave_their_archive_which_gives_the_same(root: Path) -> None:
    assert update(root, write=False) == []
    shutil.rmtree(root / "runs")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert update(root, write=False) == update(root) == []
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    with tarfile.open(root / ARCHIVE) as tar:
        tar.extractall(root / "runs/small", filter="data")
    assert update(root, write=False) == []  # such runs are those of the archive


def test_an_archive_has_results_and_order_alone_and_no_path_of_a_machine(root: Path, tmp_path: Path) -> None:
    files = kept(root)
    assert sorted(files) == [*(f"000{number}/results.json" for number in range(4)), "multirun.yaml"]
    found = json.loads(files["0002/results.json"])  # the third job
    assert found["choices"]["optimizer"] == "adam" and found["config"]["task"]["source"] == "tofu"
    assert b'"cache": "0"' in files["0000/results.json"] and b'"/' not in b"".join(files.values())
    with tarfile.open(root / ARCHIVE) as tar:
        assert {(each.mtime, each.uid, each.uname, each.mode) for each in tar} == {(0, 0, "", 0o644)}
        tar.extractall(tmp_path / "kept", filter="data")
    assert typed_order(tmp_path / "kept") == typed_order(root / "runs/small") == {
        "optimizer": ["sophia", "adam"], "seed": ["0", "1"],
    }  # fmt: skip
    before = (root / ARCHIVE).read_bytes()
    (root / ARCHIVE).unlink()
    update(root)
    assert (root / ARCHIVE).read_bytes() == before


TABLE, FIGURE = "README.md, line 3: the table of small", "docs/page.md, line 1: plane.png, the figure plane of small"


def by_hand(root: Path) -> None:
    text = (root / "README.md").read_text()
    assert text.count("0.710") == 1
    (root / "README.md").write_text(text.replace("0.710", "0.810"))


def by_an_editor(root: Path) -> None:
    with Image.open(root / "docs/plane.png") as png:
        darker = Image.eval(png.convert("RGB"), lambda value: value * 9 // 10)
        darker.save(root / "docs/plane.png", pnginfo=None)


def by_another_run(root: Path) -> None:
    changed(root / "runs/small/adam-0")


def by_another_archive(root: Path) -> None:
    shutil.rmtree(root / "runs")
    files = kept(root)
    found = json.loads(files["0000/results.json"])
    found["metrics"]["unlearned"]["utility"] = 0.1
    archive_of(root, {**files, "0000/results.json": json.dumps(found).encode()})


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (by_hand, [TABLE]),
        (by_an_editor, [FIGURE]),
        (by_another_run, ["small.tar.xz, the archive of {root}/runs/small", TABLE, FIGURE]),
        (by_another_archive, [TABLE, FIGURE]),
        (lambda root: (root / "docs/plane.png").unlink(), [FIGURE]),
    ],
)
def test_what_is_not_what_the_runs_give_is_named_and_made_again(
    change: Callable[[Path], None], stale: list[str], root: Path
) -> None:
    change(root)
    expected = [each.format(root=root) for each in stale]
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert update(root, write=False) == expected
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before  # a check changes nothing
    assert update(root) == expected and update(root) == []


def test_pixels_that_another_machine_rounds_otherwise_make_no_figure_stale(root: Path) -> None:
    path = root / "docs/plane.png"
    with Image.open(path) as png:
        caption, noisy = png.info["Description"], png.convert("RGB")
    noisy.putpixel((50, 50), (200, 200, 200))
    for text, expected in ((caption, []), (f"{caption} And more.", [FIGURE])):
        info = PngInfo()
        info.add_itxt("Description", text)
        noisy.save(path, "png", pnginfo=info)
        assert update(root, write=False) == expected


ERRORS = {
    MARK.replace("small", "other")
    + "\n<!-- end -->": "found neither .*runs/other nor .*other.tar.xz: run a sweep with",
    MARK.replace("small", "../small") + "\n<!-- end -->": "found `<!-- tables ../small .*, expected `<!-- tables NAME",
    MARK: "found `<!-- tables small .*`, expected .*`<!-- end -->` below it",
    f"{MARK}\n{MARK}\n<!-- end -->": "found `<!-- tables small",
    "Text.\n<!-- end -->": "found `<!-- end -->`, expected `<!-- tables NAME",
    "<!-- tables small -->\n<!-- end -->": "found `<!-- tables small -->`, expected",
    "<!-- figure small -->\n<!-- end -->": "found `<!-- figure small -->`, expected",
    "<!-- tables small --metrics utilty -->\n<!-- end -->": "--metrics: no run has 'utilty', choose from",
    "<!-- tables small --metrics utility --without n,x -->\n<!-- end -->": "no column 'x', choose from loss, opt",
    "<!-- figure small plain -->\n![](a.png)\n<!-- end -->": "there is no figure 'plain', choose from plane, ",
    "<!-- figure small plane -->\n<!-- end -->": "found 0 images below this mark, expected the figure's",
    "<!-- figure small plane-B -->\n![](a.png)\n<!-- end -->": r"no figure plane-B: choose from \['plane'\]",
    "<!-- figure small diagnostics -->\n![](a.png)\n<!-- end -->": "alone gives no figure diagnostics: no",
}


@pytest.mark.parametrize("region", ERRORS)
def test_a_region_that_cannot_be_made_is_one_line_and_nothing_is_written(region: str, root: Path) -> None:
    (root / "docs/a.md").write_text(f"\n{region}\n")
    with pytest.raises(UsageError, match=f"^docs/a.md, line [23]: .*{ERRORS[region]}"):
        update(root)
    assert (root / "docs/a.md").read_text() == f"\n{region}\n"


def test_a_table_may_not_leave_out_that_a_run_diverged(root: Path) -> None:
    mark = "<!-- tables small --metrics utility --without status -->\n<!-- end -->\n"
    (root / "docs/a.md").write_text(mark)
    assert len(update(root)) == 1
    left(
        root / "runs/small",
        diverged=replace(made("npo", "sgd", source="/data/tofu"), status="diverged", reason="loss 99"),
    )
    with pytest.raises(UsageError, match="--without status: a run diverged or collapsed, which its row has to say"):
        update(root)


def test_a_row_of_runs_of_two_environments_is_no_table(root: Path) -> None:
    found = results.read(root / "runs/small/adam-0")
    assert found is not None
    results.write(root / "runs/small/adam-0", replace(found, versions={"torch": "3.0"}))
    with pytest.raises(
        UsageError, match="a row has runs that were not made alike: DIFFERENT version of torch, also with"
    ):
        update(root)


def test_runs_that_are_not_comparable_or_differ_in_a_path_alone_are_no_table(root: Path) -> None:
    left(root / "runs/small", other=replace(made("npo", "sgd"), caption="another task"))
    with pytest.raises(UsageError, match="found 2 tables, as not all of these runs are comparable, expected one"):
        update(root)
    shutil.rmtree(root / "runs/small/other")
    for place in ("a", "b"):
        run = made("npo", "sgd", source="/data/tofu")
        path = f"/{place}/model"
        left(root / "runs/small", **{place: replace(run, config={**run.config, "model": {"path": path}})})
    with pytest.raises(UsageError, match="would give another table: it cuts paths to their last names"):
        update(root)


def test_an_archive_that_is_damaged_or_reaches_outside_is_one_line(root: Path) -> None:
    shutil.rmtree(root / "runs")
    link = tarfile.TarInfo("0000/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    whole = (root / ARCHIVE).read_bytes()
    for spoil in (
        lambda: archive_of(root, {"../outside": b""}),
        lambda: archive_of(root, kept(root), link),
        lambda: (root / ARCHIVE).write_bytes(whole[:-50]),
        lambda: (root / ARCHIVE).write_bytes(lzma.compress(b"no tar")),
    ):
        (root / ARCHIVE).write_bytes(whole)
        spoil()
        with pytest.raises(UsageError, match=r"small.tar.xz is damaged \(.*\): restore it from git, or remove it"):
            update(root)


def test_the_command_names_what_is_stale_and_what_it_cannot_check(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(documents, "ROOT", root)

    def typed(*arguments: str) -> tuple[object, list[str]]:
        monkeypatch.setattr("sys.argv", ["documents.py", *arguments])
        with pytest.raises(SystemExit) as end:
            documents.main()
        return end.value.code, capsys.readouterr().out.splitlines()

    numbers = "| lr | mean |\n|---|---|\n| 1e-3 | 0.5 ± 0.1 |\n"
    (root / "docs/b.md").write_text(f"{numbers}\n| key | meaning |\n|---|---|\n| `lr` | 3 |\n\n{numbers}")
    last = "not checked, as their runs are not kept: docs/other.png, 2 tables of docs/b.md"
    assert typed("--check") == (0, [last])
    by_hand(root)
    assert typed("--check") == (1, [f"{TABLE} is stale: type `python analysis/documents.py`", last])
    assert typed() == (0, [f"{TABLE} is made again", last])
    assert typed("--check") == (0, [last])


def test_the_documents_of_this_repository_are_what_their_archives_give(tmp_path: Path) -> None:
    assert documents.update(ROOT, tmp_path, write=False) == []
