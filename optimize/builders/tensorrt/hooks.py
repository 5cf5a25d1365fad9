"""What TensorRT calls while it builds: its logger, its progress monitor and the writer of the engine.

Each is a plain class, and `hooked` makes of it one that a given TensorRT takes: there are two, and either may be missing.
"""

import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, BinaryIO

from galerne.progress import Task
from galerne.runtime.engines.tensorrt.package import Log, hooked


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


@functools.cache
def log_of(interface: type) -> Any:
    """Return the logger of a TensorRT, by its `ILogger`: it has one a process, and ignores another while the first is in use."""
    return hooked(Log, interface, "TensorRT")
