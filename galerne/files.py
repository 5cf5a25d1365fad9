"""Folders and files that appear whole or not at all, and their hashes."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path

from galerne.errors import InputError

_BLOCK_BYTES = 4 << 20


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in blocks so that a large one needs little memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
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


@contextmanager
def staged_folder(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `destination` that takes its place when the block ends well.

    Args:
        destination: where the folder shall stand.
        replace: whether a folder that is there already gives way.
    Raises: InputError if `destination` exists (and `replace` is off) or its parent does not.
    """
    if destination.exists() and not replace:
        raise InputError(f"{destination}: already exists; choose another output folder or remove it")
    if not destination.parent.is_dir():
        raise InputError(f"{destination.parent}: no such folder; create it first")
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as exc:
        raise InputError(f"{destination.parent}: cannot write there ({exc.strerror})") from exc
    try:
        os.chmod(staging, 0o755)
        yield staging
        if replace and destination.exists():
            _swap(staging, destination)
        else:
            os.rename(staging, destination)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


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
