"""TensorRT or TensorRT-RTX: imported when needed, its logger, and an engine's file read as it loads it.

Source: TensorRT 10.3 to 11.4 and TensorRT-RTX 1.7, Python API. Where they differ, what is there is used.
"""

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from galerne.errors import BackendError, one_line
from galerne.runtime.engines.tensorrt.package import NAMES, Log, hooked, import_package

# At most so much of an engine is in memory beside where TensorRT puts it.
_BLOCK_BYTES = 64 << 20
# TensorRT-RTX's word for a GPU's compute capability that it does not know.
_NO_GPU_OF_ITS = "unsupported_cc"


class Library:
    """One of the two libraries.

    name: as people write it. version: of the library. errors: what it logged as an error, the last ones last.
    """

    def __init__(self, module: Any, backend: str) -> None:
        self.module, self.name, self.version = module, NAMES[backend], str(module.__version__)
        self.log: Any = hooked(Log, module.ILogger, self.name)
        self.errors: list[str] = self.log.errors

    def cause(self) -> str:
        """Return what the library last complained about, on one line."""
        return self.errors[-1] if self.errors else "it gave no reason"

    def check_header(self, runtime: Any, path: Path) -> None:
        """Ask the library whether it takes an engine, by the head of its file.

        Raises: BackendError with the library's reasons if not. TensorRT before 11 and some after it cannot say, and pass.
        """
        if not hasattr(runtime, "get_engine_validity"):
            return
        with path.open("rb") as file:
            validity, found = runtime.get_engine_validity(file.read(runtime.engine_header_size))
        if validity != self.module.EngineValidity.INVALID:
            return
        known = self.module.EngineInvalidityDiagnostics.__members__
        reasons = [name.lower() for name, flag in known.items() if found & int(flag)]
        remedy = "build it again on this machine with --force"
        if _NO_GPU_OF_ITS in reasons:  # however it was built
            remedy = (
                "it runs on no GPU of this kind: build for another stack of `galerne targets`, such as onnxruntime-cuda"
            )
        why = ", ".join(reasons) or "it gave no reason"
        raise BackendError(f"{path}: {self.name} {self.version} does not take this engine ({why}); {remedy}")

    def deserialize(self, runtime: Any, path: Path) -> Any:
        """Load an engine, block by block, so that host memory never holds it a second time.

        Raises: BackendError if the library refuses it, InputError if the file cannot be read.
        """
        self.errors.clear()
        with path.open("rb") as file:
            if hasattr(self.module, "IStreamReaderV2"):
                position = self.module.SeekPosition
                places = {position.SET: os.SEEK_SET, position.CUR: os.SEEK_CUR, position.END: os.SEEK_END}
                reader = hooked(_Reader, self.module.IStreamReaderV2, file, places)
                engine = runtime.deserialize_cuda_engine(reader)
                if reader.error is not None:
                    raise BackendError(f"{path}: cannot read it ({one_line(reader.error)})")
            else:  # 10.3 to 10.6: pages of the file, which the system takes back when it needs memory
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
                    engine = runtime.deserialize_cuda_engine(pages)
        if engine is None:
            raise BackendError(f"{path}: {self.name} {self.version} cannot load it: {self.cause()}")
        return engine


def open_library(backend: str) -> Library:
    """Import the library of a record's backend. Raises: BackendError if it is not installed here."""
    return Library(import_package(backend), backend)


class _Reader:
    """Reads the engine's file where TensorRT asks. error: what went wrong, which cannot pass through its frames."""

    def __init__(self, file: BinaryIO, places: Mapping[Any, int]) -> None:
        self.error: OSError | None = None
        self._file, self._places = file, places

    def read(self, num_bytes: int, stream: int) -> bytes:
        """Return the next bytes: fewer than asked for if that is much, and TensorRT asks again."""
        try:
            return bytes(self._file.read(min(num_bytes, _BLOCK_BYTES)))
        except OSError as exc:
            self.error = exc
            return b""

    def seek(self, offset: int, where: Any) -> bool:
        """Go to a place in the file."""
        try:
            self._file.seek(offset, self._places[where])
        except OSError as exc:
            self.error = exc
            return False
        return True
