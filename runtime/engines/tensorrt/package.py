"""The Python packages of TensorRT and TensorRT-RTX: importing one, its version, and objects that it calls."""

import importlib
import logging
from types import ModuleType
from typing import Any

from galerne.errors import BackendError, one_line

logger = logging.getLogger(__name__)

# As people write them, by the name of a stack's backend, which is the package's too.
NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_INSTALL = {
    "tensorrt": "install galerne[tensorrt]; on a Jetson, JetPack brings it",
    "tensorrt_rtx": "install galerne[rtx]",
}
# Said once for each of our int64 inputs, which are int64 on purpose.
_EXPECTED = "has Int64 binding"
_KEPT_ERRORS = 10


def import_package(backend: str) -> ModuleType:
    """Import a backend's package. Raises: BackendError if it is not installed or does not load."""
    try:
        return importlib.import_module(backend)
    except (ImportError, OSError) as exc:
        raise BackendError(f"{NAMES[backend]} cannot be imported ({one_line(exc)}); {_INSTALL[backend]}") from exc


def numbers(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers: "10.16.2" and "10.16.2.post1" are both (10, 16, 2)."""
    found: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


class Log:
    """Passes warnings to Python's logging and keeps the last errors, for the exception that tells them.

    name: of the library. errors: on one line each.
    """

    def __init__(self, name: str) -> None:
        self.name, self.errors = name, list[str]()

    def log(self, severity: Any, message: str) -> None:
        """Take one message of the library's."""
        line = " ".join(message.split())
        if severity.name in ("INTERNAL_ERROR", "ERROR"):
            self.errors[:] = [*self.errors[1 - _KEPT_ERRORS :], line]
        quiet = severity.name != "WARNING" or _EXPECTED in line
        logger.log(logging.DEBUG if quiet else logging.WARNING, "%s: %s", self.name, line)


def hooked(hook: type, interface: type, *args: Any) -> Any:
    """Make an object of a plain class that is one of a library's interface too: either library may be missing.

    Args:
        hook: has the methods that the library calls.
        interface: the class that it knows, such as its `ILogger`. It is named after its own `__init__` was called, which its
            binding demands.
        args: for the hook.
    """

    def initialize(self: Any) -> None:
        interface.__init__(self)  # type: ignore[misc]  # the base class, by its own name
        hook.__init__(self, *args)  # type: ignore[misc]

    return type(hook.__name__, (hook, interface), {"__init__": initialize})()
