"""Gives memory that was freed back to the system."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # a C library other than glibc
        return None
    return trim


def give_back() -> None:
    """Let the C library return what it holds of freed memory; does nothing where it is not glibc.

    Loading a model frees as much as a third of what it allocated, and glibc keeps all of it that lies below something that is
    still in use.
    """
    if (trim := _trim()) is not None:
        trim(0)
