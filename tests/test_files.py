"""A file or a folder is absent, old or complete."""

import os
from pathlib import Path

import pytest

from soul_exp.files import complete_folder, write_atomically


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table.md").write_text("old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "table.md", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("table.md", "old")]


def test_text_and_bytes_are_written_as_they_are_for_all_to_read(tmp_path: Path) -> None:
    assert write_atomically(tmp_path / "text", "café\n").read_bytes() == "café\n".encode()
    assert write_atomically(tmp_path / "bytes", b"\x00\xff").read_bytes() == b"\x00\xff"
    assert (tmp_path / "text").stat().st_mode & 0o777 == 0o644


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_takes_the_place_of_the_old_one_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "answers" / "model"
    for text in ("old", "new"):
        with complete_folder(folder) as partial:
            assert partial.parent == folder.parent and not any(partial.iterdir())  # so that it can be renamed
            (partial / f"{text}.txt").write_text(text)
            assert contents(folder) == ({} if text == "old" else {"old.txt": "old"})
    assert contents(tmp_path) == {"answers/model/new.txt": "new"}


def test_an_error_or_a_kill_while_a_folder_is_written_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with complete_folder(folder) as partial:
        (partial / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), complete_folder(folder) as partial:
        (partial / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"model/a.txt": "old"}
    partial.mkdir()  # a kill leaves it
    (partial / "half.txt").write_text("half")
    with complete_folder(folder) as partial:
        (partial / "b.txt").write_text("new")
    assert contents(tmp_path) == {"model/b.txt": "new"}
