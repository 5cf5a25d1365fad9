"""Gives memory that was freed back to the system."""

import ctypes
import sys


def give_back() -> None:
    """Let the C library return what it holds of freed memory; does nothing where it is not glibc.

    Loading a model frees as much as a third of what it allocated, and glibc keeps all of it that lies below something that is
    still in use.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # a C library other than glibc
        return
    trim(0)
