"""A file or a folder is absent, old or complete."""

import fcntl
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from soul_exp import files
from soul_exp.errors import UsageError
from soul_exp.files import complete_folder, is_intact, locked, remove, seal, shared_folder, write_atomically


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


def test_a_folder_is_as_readable_as_the_one_above_it_whatever_the_umask(tmp_path: Path) -> None:
    """safetensors writes files that nobody else can read."""
    before = os.umask(0o077)
    try:
        for mode, of_folder, of_file in ((0o777, 0o755, 0o644), (0o750, 0o750, 0o640), (0o700, 0o700, 0o600)):
            cache = tmp_path / f"{mode:o}"
            cache.mkdir()
            cache.chmod(mode)
            models = shared_folder(cache / "models")
            assert models.stat().st_mode & 0o777 == mode
            with complete_folder(models / "a") as partial:
                (partial / "weights").write_text("w")
            assert (models / "a").stat().st_mode & 0o777 == of_folder
            assert (models / "a" / "weights").stat().st_mode & 0o777 == of_file
    finally:
        os.umask(before)


def test_what_another_user_has_completed_meanwhile_stays_where_it_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise UsageError("of another user")

    monkeypatch.setattr(files, "remove", refuse)
    with complete_folder(tmp_path / "a") as partial:
        (partial / "mine").write_text("x")
        (tmp_path / "a").mkdir()
    assert [*tmp_path.rglob("*")] == [tmp_path / "a"]


def as_user(body: Callable[[], object]) -> str:
    """What `body` returns or raises, as text, in a process of a user that owns nothing."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(4242)
            os.setuid(4242)
            text = str(body())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that every user can write to."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        for folder in (Path(name), Path(name) / "cache"):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o777)
        yield Path(name) / "cache"


def test_two_users_share_a_cache(cache: Path) -> None:
    models = shared_folder(cache / "models")

    def make(name: str) -> list[str]:
        with locked(models / f"{name}.lock"), complete_folder(models / name) as partial:
            (partial / "weights").write_text(name)
            seal(partial / "DONE", {})
        return sorted(path.name for path in models.iterdir() if path.is_dir())

    assert make("a") == ["a"] and as_user(lambda: make("b")) == "['a', 'b']"
    assert (models / "a.lock").stat().st_mode & 0o777 == 0o666 == (models / "b.lock").stat().st_mode & 0o777
    assert as_user(lambda: is_intact(models / "a" / "DONE")) == "True" == str(is_intact(models / "b" / "DONE"))

    def lock(timeout: float) -> str:
        with locked(models / "a.lock", timeout):
            return "locked"

    with locked(models / "a.lock"):
        assert as_user(lambda: lock(0)).startswith("Timeout: ")
    (models / "a.lock").chmod(0o644)  # of an earlier version
    assert as_user(lambda: lock(0)) == "locked" and (models / "a.lock.4242").exists()


def test_what_another_user_cannot_replace_is_named_with_what_to_do(cache: Path) -> None:
    models = shared_folder(cache / "models")
    (models / "a").mkdir()
    (models / "a" / "weights").write_text("damaged")
    message = f"UsageError: {models / 'a'} is damaged or cannot be read, and this user cannot remove it"
    assert as_user(lambda: remove(models / "a")).startswith(message) and (models / "a" / "weights").exists()
    models.chmod(0o755)

    def lock() -> None:
        with locked(models / "b.lock"):
            pass

    assert as_user(lock).startswith(f"UsageError: {models / 'b.lock'} cannot be locked (Permission denied): remove it")
    (models / "c.lock").mkdir()
    with (
        pytest.raises(UsageError, match=r"c\.lock cannot be locked \(Is a directory\): remove it"),
        locked(models / "c.lock"),
    ):
        pass


def test_waiting_for_another_process_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "SILENT", 0.01)
    other = (tmp_path / "a.lock").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)
    threading.Timer(0.3, other.close).start()
    with caplog.at_level(logging.INFO), locked(tmp_path / "a.lock"):
        assert caplog.messages == [f"waiting for another process, which holds {tmp_path / 'a.lock'}"]


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


def test_a_folder_that_is_removed_while_a_command_works_in_it_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "run"
    with (
        pytest.raises(UsageError, match="run was removed or moved while this command worked in it: type the same"),
        files.explain_full_disk(gone, tmp_path),
    ):
        (gone / "train.jsonl").write_text("{}")
