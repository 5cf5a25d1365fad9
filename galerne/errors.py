"""The errors that Galerne raises on purpose, and the exit status each one means.

    GalerneError
    |- CheckFailed   exit 1   it ran and the answer is no (parity, fit, quality)
    |- InputError    exit 2   the caller can mend it (an option, a checkpoint, a bundle, a TOML file)
    |- BackendError  exit 3   this machine lacks what it takes, or ONNX Runtime or TensorRT failed
    |- BusyError     exit 4   another thread is using the session, which serves one at a time
    `- Cancelled     exit 130 someone asked it to stop, as Ctrl-C does

Anything else that escapes is a bug of ours: traceback, exit 70.
"""


class GalerneError(Exception):
    """Base of all of them. The message is one line that says what was found, what was expected and what to do."""

    exit_code = 70


def one_line(exc: BaseException) -> str:
    """Return another library's error on one line: its text, or its type's name where it has none."""
    return " ".join(str(exc).split()) or type(exc).__name__


class CheckFailed(GalerneError):
    """A check ran and said no."""

    exit_code = 1


class InputError(GalerneError):
    """Something that the caller gave cannot be used."""

    exit_code = 2


class BackendError(GalerneError):
    """This machine lacks what the command needs, or the backend failed."""

    exit_code = 3


class BusyError(GalerneError):
    """Another thread is using what serves one thread at a time. Nothing was changed; try again when it is done."""

    exit_code = 4


class Cancelled(GalerneError):
    """Work was stopped because another thread asked for it. What was done before stays done."""

    exit_code = 130
