"""A file or folder appears whole or not at all, whatever happens on the way."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from galerne import files
from galerne.errors import BackendError, InputError
from galerne.files import check_destination, resumable_folder, sha256_file, staged_folder, write_atomic


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


def test_a_file_where_the_parent_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file: a file; expected a folder that out can be made in"):
        check_destination(tmp_path / "file" / "out")


def test_a_link_to_nowhere_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(InputError, match="out: already exists"), resumable_folder(tmp_path / "out", "key", b"1"):
        pytest.fail("the block ran")


@pytest.mark.parametrize("name", ["notes.txt", "folder/notes.txt"])
def test_a_work_folder_that_no_run_left_is_kept(tmp_path: Path, name: str) -> None:
    file = tmp_path / "out.unfinished" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    message = f"out.unfinished: holds {name.split('/')[0]}, and no key as a run leaves it; move it away"
    with pytest.raises(InputError, match=message), resumable_folder(tmp_path / "out", "key", b"1"):
        pytest.fail("the block ran")
    assert file.read_text() == "mine"


def test_a_file_in_the_work_folder_s_place_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out.unfinished").write_text("mine")
    with pytest.raises(InputError, match="a file stands where"), resumable_folder(tmp_path / "out", "key", b"1"):
        pytest.fail("the block ran")
    assert (tmp_path / "out.unfinished").read_text() == "mine"


def test_a_run_killed_before_its_key_was_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / ".key.abc").write_text("half")
    with resumable_folder(tmp_path / "out", "key", b"1") as folder:
        (folder / "f").write_text("x")
    assert sorted(os.listdir(tmp_path / "out")) == ["f", "key"]


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


def _staging(tmp_path: Path, code: str) -> "subprocess.Popen[str]":
    """Start a process that stages tmp_path/out, writes into it, says so, and goes on with `code`."""
    program = (
        "import sys, pathlib\nfrom galerne.files import staged_folder\n"
        "with staged_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'f').write_text('x')\n    print('ready', flush=True)\n    " + code
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _staging(tmp_path, "sys.stdin.read()") as process:
        process.kill()
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out.")
    with staged_folder(tmp_path / "out") as staging:
        (staging / "f").write_text("mine")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "f").read_text() == "mine"
    assert f"{left}: left behind by a run that was killed; removing it" in capsys.readouterr().err


def test_what_a_living_process_stages_is_left_alone(tmp_path: Path) -> None:
    with _staging(tmp_path, "sys.stdin.read()") as process:
        with staged_folder(tmp_path / "out"):
            pass
        (tmp_path / "out").rmdir()
        process.communicate("")
    assert process.returncode == 0
    assert (tmp_path / "out" / "f").read_text() == "x"
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    def fill() -> None:
        with staged_folder(tmp_path / "out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BackendError, match="out: no space left on its disk"):
        fill()
    assert os.listdir(tmp_path) == []
