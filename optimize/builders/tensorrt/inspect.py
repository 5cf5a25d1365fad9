"""Looks at an engine file as far as a machine without a GPU can."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from galerne.errors import BackendError, InputError
from galerne.optimize.builders.tensorrt.hooks import log_of
from galerne.optimize.builders.tensorrt.library import import_library

Validity = Literal["valid", "suboptimal", "unknown"]


@dataclass(frozen=True)
class EngineFile:
    """What an engine file shows without being run.

    size: in bytes.
    validity: on this machine's GPU; "unknown" where there is none, since only the header's form was checked.
    """

    size: int
    validity: Validity


def inspect_engine(path: Path) -> EngineFile:
    """Read an engine's header with TensorRT-RTX, the one that can without a GPU.

    Raises: BackendError if it is no engine, was built by another version, or does not run on this machine's GPU;
        InputError if there is no such file.
    """
    library = import_library("tensorrt_rtx")
    trt = library.module
    if not path.is_file():
        raise InputError(f"{path}: no such engine file; build it with `galerne build`")
    runtime = trt.Runtime(log_of(trt.ILogger))
    with path.open("rb") as file:
        validity, found = runtime.get_engine_validity(file.read(runtime.engine_header_size))
    reasons = [name for name, flag in trt.EngineInvalidityDiagnostics.__members__.items() if found & int(flag)]
    # Without a driver the answer is "invalid" and no reason, or a CUDA error, which says nothing about the file.
    if validity == trt.EngineValidity.INVALID and reasons not in ([], ["CUDA_ERROR"]):
        raise BackendError(
            f"{path}: {library.title} does not take this engine ({', '.join(reasons).lower()}); "
            "build it again with --force"
        )
    names: dict[Any, Validity] = {trt.EngineValidity.VALID: "valid", trt.EngineValidity.SUBOPTIMAL: "suboptimal"}
    return EngineFile(path.stat().st_size, names.get(validity, "unknown"))
