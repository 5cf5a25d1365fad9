"""A read-only map of a file, cut into numpy views."""

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from galerne.errors import InputError


class MappedFile:
    """A file of weights, mapped and not read: a view costs no memory of its own, and pages come in as they are touched.

    The map lives as long as this object or a view of it, so there is nothing to close.
    """

    def __init__(self, path: Path) -> None:
        """Map a file. Raises: InputError if it is missing, empty or unreadable."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as exc:  # how mmap refuses an empty file
            raise InputError(f"{path}: the file is empty; download or copy it again") from exc
        except OSError as exc:
            raise InputError(f"{path}: cannot read it ({exc.strerror})") from exc
        self.size = len(self._map)

    def bytes(self, offset: int, count: int) -> bytes:
        """Return a copy of `count` bytes; fewer where the file ends."""
        return self._map[offset : offset + count]

    def view(self, offset: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return a read-only array over the file. The caller has checked that it lies within."""
        count = math.prod(shape)
        if count == 0:  # frombuffer refuses one at the file's end
            return np.empty(shape, dtype)
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def release(self, offset: int, count: int) -> None:
        """Drop the pages of `count` bytes from the resident set. Views stay valid: a touched page comes in again."""
        if count > 0 and hasattr(self._map, "madvise"):
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + count - start)
