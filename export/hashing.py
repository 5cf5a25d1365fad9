"""Hashes the source while it is read for the export, and not after it."""

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from galerne.runtime.bundle import entry_of
from galerne.runtime.manifest import FileEntry


@contextmanager
def hashing(files: Sequence[Path]) -> Iterator[Future[dict[str, FileEntry]]]:
    """Hash files on a thread of their own while the block runs. Leaving the block ends it, done or not.

    Yields: the entries by file name, to come.
    """
    left = Event()

    def advance(_: int) -> None:
        if left.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(lambda: {file.name: entry_of(file, advance) for file in files})
        finally:
            left.set()
