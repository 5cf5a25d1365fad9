"""What the page cache lacks of a file is read ahead of the engine that maps it."""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from galerne.runtime import page_cache
from galerne.runtime.page_cache import read_ahead

SIZE = (9 << 20) + 5
PAGES = -(-SIZE // mmap.PAGESIZE)


def cached_pages(path: Path) -> int:
    """Return how many of a file's pages the cache holds."""
    held = (ctypes.c_ubyte * PAGES)()
    mapped = np.memmap(path, np.uint8, "r")
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(SIZE), held) == 0
    return sum(page & 1 for page in held)


@pytest.fixture
def evicted(tmp_path: Path) -> Path:
    """Write a file and have the cache drop it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux: other systems do not drop a file from their cache when asked to")
    path = tmp_path / "weights.bin"
    with path.open("wb") as file:
        file.write(os.urandom(SIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(path):
        pytest.skip(f"needs a file system that drops what it is told to, which that of {tmp_path} does not")
    return path


def test_an_absent_file_comes_in_whole(evicted: Path) -> None:
    read_ahead(evicted)
    assert cached_pages(evicted) == PAGES


def test_what_is_there_is_not_read_again(evicted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = 2 << 20
    monkeypatch.setattr(page_cache, "_PIECE", huge)
    read_ahead(evicted)
    with evicted.open("rb") as file:
        os.posix_fadvise(file.fileno(), 2 * huge, huge, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert page_cache.absent_pieces(ctypes.CDLL(None, use_errno=True), mapped) == [2 * huge]
    read_ahead(evicted)
    assert cached_pages(evicted) == PAGES


def test_a_file_larger_than_the_memory_left_is_not_read(evicted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "machine_memory", lambda: (1 << 34, SIZE - 1))
    read_ahead(evicted)
    assert cached_pages(evicted) == 0


def test_what_cannot_be_read_ahead_is_left_to_the_engine(tmp_path: Path) -> None:
    read_ahead(tmp_path / "missing")
    (tmp_path / "empty").write_bytes(b"")
    read_ahead(tmp_path / "empty")


def test_a_kernel_that_cannot_is_left_alone(evicted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_MADV_POPULATE_READ", 9999)
    read_ahead(evicted)
    assert cached_pages(evicted) == 0
