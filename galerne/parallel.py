"""Work spread over threads whose results come back in order, so that a file is the same for any number of them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered(work: Iterable[Callable[[], T]], threads: int | None = None) -> Iterator[T]:
    """Call functions on threads and yield what they return, in their order.

    Only a few are begun before their turn, so that results do not pile up. They gain from threads as far as they leave
    Python's lock alone, as numpy, hashlib and file access do. `work` itself is iterated on the caller's thread.

    Args:
        threads: by default one for each core.
    Raises: what a function raised, at its turn; none is begun after that.
    """
    threads = cores() if threads is None else threads
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for function in work:
                pending.append(pool.submit(function))
                if len(pending) > threads + 1:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
