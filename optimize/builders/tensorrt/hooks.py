"""What TensorRT calls while it builds: its logger, its progress monitor and the writer of the engine.

Each is a plain class, and `hooked` makes of it one that a given TensorRT takes: there are two, and either may be missing.
"""

import functools
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, BinaryIO

from galerne.progress import Task

logger = logging.getLogger(__name__)

_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
    "VERBOSE": logging.DEBUG,
}
# Said once for each of our int64 inputs, which are int64 on purpose.
_EXPECTED = "has Int64 binding"


class Log:
    """Passes warnings to Python's logging and keeps errors, for the exception that tells them."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Take one message of TensorRT's."""
        line = " ".join(message.split())
        level = logging.DEBUG if _EXPECTED in message else _LEVELS[severity.name]
        if level >= logging.ERROR:
            # It ends up in the exception, so that it is not told twice.
            self.errors.append(line)
            level = logging.DEBUG
        logger.log(level, "TensorRT: %s", line)


class Monitor:
    """Shows the outermost phases as a task, and stops the build once `cancelled` is set."""

    def __init__(self, task: Task) -> None:
        self.cancelled = False
        self._task = task
        self._steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Note how many steps an outermost phase has."""
        if parent_phase is None:
            self._steps[phase_name] = num_steps

    def phase_finish(self, phase_name: str) -> None:
        """Forget a phase."""
        self._steps.pop(phase_name, None)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Count a step. Returns: whether to go on."""
        if phase_name in self._steps:
            self._task.advance(1 / self._steps[phase_name])
        return not self.cancelled

    @contextmanager
    def cancelling_on_ctrl_c(self) -> Iterator[None]:
        """Turn Ctrl-C into a cancelled build, since an exception cannot pass through TensorRT's own frames."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def cancel(number: int, frame: FrameType | None) -> None:
            self.cancelled = True

        before = signal.signal(signal.SIGINT, cancel)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Writer:
    """Writes the engine to a file in blocks as TensorRT serializes it; `error` holds what went wrong in doing so."""

    def __init__(self, file: BinaryIO) -> None:
        self.error: OSError | None = None
        self._file = file

    def write(self, data: Any) -> int:
        """Write one block. Returns: how many bytes were written; 0 tells TensorRT to stop."""
        if self.error is not None:
            return 0
        try:
            return self._file.write(data)
        except OSError as exc:
            self.error = exc
            return 0


def hooked(hook: type, interface: type, *args: Any) -> Any:
    """Make an object of one of the classes above that is one of TensorRT's interface too.

    Args:
        interface: the class that TensorRT knows, such as its `ILogger`. It is named after its own `__init__` was called,
            which its binding demands.
        args: for the hook.
    """

    def initialize(self: Any) -> None:
        interface.__init__(self)  # type: ignore[misc]  # the base class, by its own name
        hook.__init__(self, *args)  # type: ignore[misc]

    return type(hook.__name__, (hook, interface), {"__init__": initialize})()


@functools.cache
def log_of(interface: type) -> Any:
    """Return the logger of a TensorRT, by its `ILogger`: it has one a process, and ignores another while the first is in use."""
    return hooked(Log, interface)
