"""Reads a file of weights ahead, so that an engine maps it in large pages."""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from galerne.errors import BackendError
from galerne.runtime.machine_memory import machine_memory

_HUGE_PAGE = 2 << 20  # of x86 and ARM where pages have 4 KiB
_PIECE = 32 * _HUGE_PAGE  # what counts as this process's memory at one time
_MADV_POPULATE_READ = 22  # since Linux 5.14; Python's mmap has no name for it


def read_ahead(path: Path) -> None:
    """Bring what the system's page cache lacks of a file into it, in huge pages where its file system has them.

    An engine that maps a file which is not in the cache brings it in page by page as it touches it. That takes longer than
    reading it in order, and the cache then holds it in single pages scattered over memory, which costs each pass over the
    weights an eighth more, as long as the file stays in the cache (`docs/measurements.md`). Does nothing for a file that
    does not fit into memory, or on a system other than Linux.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0 or size > machine_memory()[1]:
                return
            mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    except (OSError, BackendError):  # whoever opens the file to read it says what is wrong
        return
    with mapped:
        try:
            library = ctypes.CDLL(None, use_errno=True)
            for start in absent_pieces(library, mapped):
                _populate(library, mapped, start, min(_PIECE, size - start))
        except OSError:  # an older kernel: the engine reads the file as it comes
            return


def absent_pieces(library: ctypes.CDLL, mapped: mmap.mmap) -> list[int]:
    """Return where the pieces of a mapped file begin that the page cache lacks a part of, by the first page of each huge one."""
    page, absent = ctypes.c_ubyte(), []
    for start in range(0, len(mapped), _PIECE):
        for offset in range(start, min(start + _PIECE, len(mapped)), _HUGE_PAGE):
            _call(library, "mincore", mapped, offset, 1, ctypes.byref(page))
            if not page.value & 1:
                absent.append(start)
                break
    return absent


def _populate(library: ctypes.CDLL, mapped: mmap.mmap, start: int, size: int) -> None:
    for advice in (mmap.MADV_HUGEPAGE, _MADV_POPULATE_READ, mmap.MADV_DONTNEED):
        _call(library, "madvise", mapped, start, size, ctypes.c_int(advice))


def _call(library: ctypes.CDLL, name: str, mapped: mmap.mmap, start: int, size: int, argument: Any) -> None:
    """Call the C library's function on a part of a map; unlike the map's own methods this leaves the GIL free while it reads."""
    view = np.frombuffer(mapped, np.uint8)  # gone with this call, or the map could not be closed
    if library[name](ctypes.c_void_p(view.ctypes.data + start), ctypes.c_size_t(size), argument) != 0:
        raise OSError(ctypes.get_errno(), name)
