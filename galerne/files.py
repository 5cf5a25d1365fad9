"""Small files read whole, folders and files that appear whole or not at all, and hashes."""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from typing import Any

from galerne.errors import BackendError, InputError
from galerne.progress import say

if sys.platform != "win32":
    import fcntl

_BLOCK_BYTES = 4 << 20


def read_file(path: Path) -> bytes:
    """Read a small file whole. Raises: InputError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as exc:
        raise InputError(f"{path}: cannot read it ({exc.strerror})") from exc


def read_table(path: Path) -> dict[str, Any]:
    """Return a JSON file's table. Raises: InputError if it is none."""
    try:
        table = json.loads(read_file(path))
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path}: not JSON ({exc}); download or copy it again") from exc
    if not isinstance(table, dict):
        raise InputError(f"{path}: expected a table, found {type(table).__name__}; download or copy it again")
    return table


def sha256_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """Return the hex SHA-256 of a file, read in blocks so that a large one needs little memory.

    Args:
        advance: told the size of each block in bytes. What it raises ends the reading.
    """
    digest, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            advance(count)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content in one step: a reader sees the old bytes or the new ones."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BufferedWriter]:
    """Yield a new file that takes the place of `path` in one step when the block ends well, and goes when it does not."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_destination(destination: Path, *, replace: bool = False) -> None:
    """Raises: InputError if a folder cannot appear there: it exists (and `replace` is off), or its parent does not."""
    if not replace and (destination.exists() or destination.is_symlink()):
        raise InputError(f"{destination}: already exists; choose another output folder or remove it")
    if destination.parent.exists() and not destination.parent.is_dir():
        raise InputError(f"{destination.parent}: a file; expected a folder that {destination.name} can be made in")
    if not destination.parent.is_dir():
        raise InputError(f"{destination.parent}: no such folder; create it first")


@contextmanager
def staged_folder(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `destination` that takes its place when the block ends well.

    A process that is killed meanwhile leaves its folder behind; the next one with this destination removes it.

    Args:
        destination: where the folder shall stand.
        replace: whether a folder that is there already gives way.
    Raises: InputError if `destination` exists (and `replace` is off) or its parent does not; BackendError if the disk is full.
    """
    check_destination(destination, replace=replace)
    _remove_abandoned(destination)
    try:
        staging, lock = _new_staging(destination)
    except OSError as exc:
        raise InputError(f"{destination.parent}: cannot write there ({exc.strerror})") from exc
    try:
        os.chmod(staging, 0o755)
        yield staging
        if replace and destination.exists():
            _swap(staging, destination)
        else:
            os.rename(staging, destination)
    except BaseException as exc:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
            raise BackendError(f"{destination}: no space left on its disk; nothing was kept") from exc
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def resumable_folder(destination: Path, key_name: str, key: bytes) -> Iterator[Path]:
    """Yield a folder beside `destination` that takes its place when the block ends well, and stays as it is when it is stopped.

    A later run with the same key finds the folder as it was left and goes on in it; with another key it starts afresh. Where the
    block finds that the input is bad, the folder goes.

    Args:
        key_name, key: a file of the folder, and what it holds: what the run is made from.
    Raises: InputError if `destination` exists, its parent does not, another run is at work there, or the work folder holds what
        no run left; BackendError if the disk is full.
    """
    check_destination(destination)
    folder = work_folder(destination)
    _check_work_folder(folder, key_name)
    try:
        folder.mkdir(exist_ok=True)
        lock = _locked_alone(folder)
    except OSError as exc:
        raise InputError(f"{destination.parent}: cannot write there ({exc.strerror})") from exc
    try:
        if not (folder / key_name).is_file() or read_file(folder / key_name) != key:
            if any(folder.iterdir()):
                say(f"{folder}: left by a run on other input, by another recipe or another version; starting afresh")
                for entry in folder.iterdir():
                    entry.unlink()
            write_atomic(folder / key_name, key)
        yield folder
        os.rename(folder, destination)
    except InputError:  # the same input would fail again
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise BackendError(
                f"{folder}: no space left on its disk; what is done is kept, so make room and run the same command again"
            ) from exc
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _check_work_folder(folder: Path, key_name: str) -> None:
    """Raises: InputError if something is there that no run left, which must not be removed."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: a file stands where the run would work; remove it or choose another output folder")
    # A run that was killed before its key was there leaves at most what `write_atomic` calls it meanwhile.
    left = [entry.name for entry in folder.iterdir() if not entry.name.startswith(f".{key_name}.")]
    if left and key_name not in left:
        raise InputError(
            f"{folder}: holds {min(left)}, and no {key_name} as a run leaves it; move it away or choose another output folder"
        )


def _locked_alone(folder: Path) -> int | None:
    """Lock a folder; None where the system or the file system knows no locks. Raises: InputError if another process has it."""
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(handle)
        raise InputError(f"{folder}: another run is at work there; wait for it or end it") from exc
    except OSError:
        os.close(handle)
        return None
    return handle


def work_folder(destination: Path) -> Path:
    """Return where `resumable_folder` works."""
    return destination.with_name(f"{destination.name}.unfinished")


def _staging_prefix(destination: Path) -> str:
    return f".{destination.name}.staging-"


def _new_staging(destination: Path) -> tuple[Path, int | None]:
    """Make a folder and lock it for as long as this process lives: that is how another one tells it from an abandoned one."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=_staging_prefix(destination), dir=destination.parent))
        lock = _locked(staging, wait=True)
        if staging.exists():  # else it was taken for an abandoned one before it was locked
            return staging, lock


def _remove_abandoned(destination: Path) -> None:
    prefix = _staging_prefix(destination)
    for found in sorted(entry for entry in destination.parent.iterdir() if entry.name.startswith(prefix)):
        lock = _locked(found, wait=False)
        if lock is not None:
            say(f"{found}: left behind by a run that was killed; removing it")
            shutil.rmtree(found, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder and return its descriptor; None if another process has the lock, or this system knows no such locks."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone meanwhile, or another user's
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held, or a file system without locks
        os.close(handle)
        return None
    return handle


def _swap(staging: Path, destination: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    os.rename(destination, aside / "old")
    try:
        os.rename(staging, destination)
    except BaseException:
        os.rename(aside / "old", destination)
        aside.rmdir()
        raise
    shutil.rmtree(aside)
