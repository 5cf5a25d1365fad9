"""One user at a time: the second is refused, not kept waiting."""

import threading
from types import TracebackType

from galerne.errors import BusyError


class Exclusive:
    """A context that one thread at a time may be in.

    It refuses instead of waiting, since two threads that feed one sequence are a mistake: the tokens' order would be
    anyone's guess.
    """

    def __init__(self, what: str) -> None:
        """Guard something that an error calls `what`."""
        self._what, self._lock = what, threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise BusyError(f"{self._what}: another thread is using it; wait for that one, or give each thread its own")

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.release()
