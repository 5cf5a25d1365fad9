"""Writes a tar file whose bytes depend on nothing but its members, compressed where its name ends in .zst."""

import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from galerne.errors import BackendError, InputError
from galerne.files import atomic_file, sha256_file

# Weights at 4 bits hardly shrink; higher levels take minutes and gain nothing.
_LEVEL = 3
_MTIME = 315532800  # 1980: tar warns about times before
SUFFIXES = (".tar.zst", ".tar")


@dataclass(frozen=True)
class Member:
    """A file of the archive: its bytes, or the file that has them and their hex SHA-256 where it is known already."""

    content: bytes | Path
    executable: bool = False
    known_sha256: str | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def sha256(self) -> str:
        """Return the hex SHA-256 of its bytes."""
        if self.known_sha256 is not None:
            return self.known_sha256
        if isinstance(self.content, Path):
            return sha256_file(self.content)
        return hashlib.sha256(self.content).hexdigest()


def check_name(out: Path) -> None:
    """Raises: InputError if an archive cannot be written under this name."""
    if not out.name.endswith(SUFFIXES):
        raise InputError(f"--out {out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder; create it first")


def write(out: Path, top: str, members: Mapping[str, Member]) -> None:
    """Write an archive; it is there whole or not at all.

    Args:
        top: the folder in the archive that holds everything.
        members: by their path under it, with / between folders.
    Raises: InputError if it cannot be written; BackendError if the zstandard package is missing.
    """
    check_name(out)
    try:
        with (
            atomic_file(out) as file,
            _compressed(file, out) as stream,
            tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as archive,
        ):
            for name, member in sorted(members.items()):
                entry = tarfile.TarInfo(f"{top}/{name}")
                entry.size, entry.mtime, entry.mode = member.size, _MTIME, 0o755 if member.executable else 0o644
                if isinstance(member.content, Path):
                    with member.content.open("rb") as source:
                        archive.addfile(entry, source)
                else:
                    archive.addfile(entry, io.BytesIO(member.content))
    except OSError as exc:
        raise InputError(f"{out}: cannot write the package there ({exc.strerror})") from exc


@contextmanager
def _compressed(file: BinaryIO, out: Path) -> Iterator[BinaryIO]:
    if out.suffix != ".zst":
        yield file
        return
    try:
        import zstandard
    except ImportError as exc:
        raise BackendError(f"{out}: zstandard is not installed; install galerne[export], or name it .tar") from exc
    # One thread: the bytes then do not depend on how many there are.
    with zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).stream_writer(file, closefd=False) as stream:
        yield stream
