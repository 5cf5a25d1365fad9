"""Hashes the source while it is read for the export, and not after it."""

import os
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Condition
from types import TracebackType

from galerne.runtime.bundle import entry_of
from galerne.runtime.manifest import FileEntry


class SourceHashes:
    """Hashes files on a thread of their own while the block runs, a little ahead of who else reads them.

    So the files come off the disk once: what the hash has read is still in the page cache when it is wanted. Leaving the block
    ends it, done or not.
    """

    def __init__(self, files: Sequence[Path], lead_bytes: int | None = None) -> None:
        """Prepare to hash.

        Args:
            lead_bytes: how far ahead; by default a quarter of the machine's memory.
        """
        self._files, self._lead = files, _quarter_of_memory() if lead_bytes is None else lead_bytes
        self._changed, self._left, self._hashed, self._used = Condition(), False, 0, 0.0
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> "SourceHashes":
        self._entries = self._pool.submit(lambda: {file.name: entry_of(file, self._advance) for file in self._files})
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        with self._changed:
            self._left = True
            self._changed.notify()
        self._pool.shutdown()

    def used(self, count: float) -> None:
        """Say that the export has read `count` more bytes of the files."""
        with self._changed:
            self._used += count
            self._changed.notify()

    def entries(self) -> dict[str, FileEntry]:
        """Wait for the rest and return the entries by the files' names."""
        self.used(float("inf"))
        return self._entries.result()

    def _advance(self, count: int) -> None:
        with self._changed:
            self._hashed += count
            self._changed.wait_for(lambda: self._left or self._hashed - self._used <= self._lead)
            if self._left:
                raise CancelledError


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
