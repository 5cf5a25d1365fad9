"""A file or folder appears whole or not at all, whatever happens on the way."""

import hashlib
import os
from pathlib import Path

import pytest

from galerne import files
from galerne.errors import InputError
from galerne.files import sha256_file, staged_folder, write_atomic


class Stop(BaseException):
    """Stands for what no `except Exception` catches, such as Ctrl-C."""


def test_sha256_over_more_than_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", 7)
    data = bytes(range(100))
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_sha256_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert sha256_file(tmp_path / "f") == hashlib.sha256().hexdigest()


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "f", b"one")
    write_atomic(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["f"]


def test_write_atomic_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "f", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_staged_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_folder(target) as staging:
        (staging / "f").write_text("x")
        assert staging.parent == tmp_path
        assert not target.exists()
    assert (target / "f").read_text() == "x"
    assert target.stat().st_mode & 0o777 == 0o755
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("error", [ValueError, Stop])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException], replace: bool) -> None:
    def fail() -> None:
        with staged_folder(tmp_path / "out", replace=replace) as staging:
            (staging / "f").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


def test_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: already exists; choose another"), staged_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert os.listdir(tmp_path) == ["out"]


def test_missing_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: no such folder"), staged_folder(tmp_path / "none" / "out"):
        pytest.fail("the block ran")


def test_replace_takes_the_old_folder_s_place_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with staged_folder(target, replace=True) as staging:
        (staging / "new").touch()
        assert os.listdir(target) == ["old"]
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_replace_without_an_old_folder(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", replace=True) as staging:
        (staging / "new").touch()
    assert os.listdir(tmp_path / "out") == ["new"]


def test_replace_that_fails_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()

    def fail() -> None:
        with staged_folder(target, replace=True):
            raise Stop

    with pytest.raises(Stop):
        fail()
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["out"]


def test_last_rename_that_fails_puts_the_old_folder_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()

    def lose_the_staging() -> None:
        with staged_folder(target, replace=True) as staging:
            staging.rmdir()

    with pytest.raises(FileNotFoundError):
        lose_the_staging()
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["out"]
