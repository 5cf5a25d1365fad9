"""What a backend's library made, which ends in the process that made it only."""

import ctypes
import os
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Owned(Generic[T]):
    """Holds an object of a library that has threads or a GPU.

    A forked child has none of these, and ending the object there would wait for them for ever, or fail: the child keeps it.

    value: the object.
    """

    def __init__(self, value: T) -> None:
        self._pid, self.value = os.getpid(), value

    # Bound here, as the interpreter may have cleared its modules when it comes to this.
    def __del__(
        self,
        process: Callable[[], int] = os.getpid,
        keep: Callable[[object], object] = ctypes.pythonapi.Py_IncRef,
        reference: Callable[[object], object] = ctypes.py_object,
    ) -> None:
        if process() != self._pid:
            keep(reference(self.value))
