"""What TensorRT-RTX calls while it builds: its logger, its progress monitor and the writer of the engine.

Importing this needs the `tensorrt_rtx` package.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import BinaryIO

import tensorrt_rtx as trt

from galerne.progress import Task

logger = logging.getLogger(__name__)

_LEVELS = {
    trt.ILogger.INTERNAL_ERROR: logging.ERROR,
    trt.ILogger.ERROR: logging.ERROR,
    trt.ILogger.WARNING: logging.WARNING,
    trt.ILogger.INFO: logging.DEBUG,
    trt.ILogger.VERBOSE: logging.DEBUG,
}
# Said once for each of our int64 inputs, which are int64 on purpose.
_EXPECTED = "has Int64 binding"


class Log(trt.ILogger):  # type: ignore[misc]  # TensorRT has no type stubs
    """Passes warnings to Python's logging and keeps errors, for the exception that tells them."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        """Take one message of TensorRT's."""
        level = logging.DEBUG if _EXPECTED in message else _LEVELS[severity]
        if level >= logging.ERROR:
            # It ends up in the exception, so that it is not told twice.
            self.errors.append(one_line(message))
            level = logging.DEBUG
        logger.log(level, "TensorRT-RTX: %s", one_line(message))


# TensorRT has one logger a process and ignores another while the first is in use.
LOG = Log()


class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """Shows the outermost phases as a task, and stops the build once `cancelled` is set."""

    def __init__(self, task: Task) -> None:
        trt.IProgressMonitor.__init__(self)
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


class Writer(trt.IStreamWriter):  # type: ignore[misc]
    """Writes the engine to a file in blocks as TensorRT serializes it; `error` holds what went wrong in doing so."""

    def __init__(self, file: BinaryIO) -> None:
        trt.IStreamWriter.__init__(self)
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes) -> int:
        """Write one block. Returns: how many bytes were written; 0 tells TensorRT to stop."""
        if self.error is not None:
            return 0
        try:
            return self._file.write(data)
        except OSError as exc:
            self.error = exc
            return 0


def one_line(message: str) -> str:
    """Return a message of TensorRT's with its line breaks taken out."""
    return " ".join(message.split())
