"""Progress on stderr: a bar where it is a terminal, a plain line now and then where it is not."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 5.0


class Task:
    """One piece of work whose progress is shown. Call `advance` as it goes; use it as a context manager."""

    def __init__(self, label: str, total: float) -> None:
        self._label, self._total, self._done = label, max(total, 1e-9), 0.0
        self._start = time.monotonic()
        self._next_line = self._start + _LINE_EVERY_S
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._id = self._bar.add_task(label, total=total)

    def __enter__(self) -> "Task":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: float = 1.0) -> None:
        """Count `amount` more of the total as done."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._id, completed=self._done)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY_S
            say(f"{self._label}: {min(self._done / self._total, 1.0):.0%}{self._time_left()}")

    def _time_left(self) -> str:
        left = (time.monotonic() - self._start) * max(self._total / max(self._done, 1e-9) - 1, 0)
        if left < _LINE_EVERY_S:
            return ""
        return f", {left / 60:.0f} min left" if left > 90 else f", {left:.0f} s left"


def say(line: str) -> None:
    """Write one line for the person at the terminal to stderr."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def step(label: str) -> Iterator[None]:
    """Say what is being done and, when it is done, how long it took."""
    start = time.perf_counter()
    say(f"{label} …")
    yield
    say(f"{label}: {time.perf_counter() - start:.1f} s")
