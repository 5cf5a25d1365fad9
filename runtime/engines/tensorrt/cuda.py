"""The driver over cuda-python. Source: CUDA driver API 13; the calls are the same in cuda-python 12.6 and later."""

import importlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt

from galerne.errors import BackendError, one_line
from galerne.runtime.engines.tensorrt.driver import Device

logger = logging.getLogger(__name__)

_PORTABLE_HOST = 1  # CU_MEMHOSTALLOC_PORTABLE
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_LOST = "the GPU's context is lost: start the process anew"

# What to do about the errors that a user can meet. Source: CUDA driver API, CUresult.
_REMEDIES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "close other programs or models, or take a smaller batch, context or recipe",
    "CUDA_ERROR_NO_DEVICE": "this machine has no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver's parts differ in version: restart the machine after its update",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "the driver is too old for this cuda-python: update it",
    "CUDA_ERROR_SYSTEM_NOT_READY": "the driver's services are not up: see `nvidia-smi`",
    "CUDA_ERROR_OPERATING_SYSTEM": "the operating system refused it: see its log",
    "CUDA_ERROR_UNKNOWN": "see the system's log",
    "CUDA_ERROR_ECC_UNCORRECTABLE": "the GPU's memory has failed: restart the machine, and replace the GPU if it comes back",
    "CUDA_ERROR_ILLEGAL_ADDRESS": _LOST,
    "CUDA_ERROR_LAUNCH_FAILED": _LOST,
    "CUDA_ERROR_LAUNCH_TIMEOUT": _LOST,
    "CUDA_ERROR_HARDWARE_STACK_ERROR": _LOST,
    "CUDA_ERROR_ASSERT": _LOST,
}


def open_cuda() -> "CudaDriver":
    """Open the first GPU that CUDA shows.

    Raises: BackendError if cuda-python is not installed, or there is no driver or no GPU.
    """
    try:
        api = importlib.import_module("cuda.bindings.driver")
    except (ImportError, OSError) as exc:
        raise BackendError(
            f"cuda-python cannot be imported ({one_line(exc)}); install galerne[tensorrt] or galerne[rtx]"
        ) from exc
    return CudaDriver(api)


class CudaDriver:
    """See `Driver` for what each call does. It works in the GPU's primary context, as TensorRT does."""

    def __init__(self, api: Any, ordinal: int = 0) -> None:
        """Open a GPU. `api` is `cuda.bindings.driver`, or what stands for it. Raises: BackendError."""
        self._api = api
        self._lock = threading.RLock()
        self._pid, self._pinned, self._closed = os.getpid(), 0, False
        try:
            self._call("cuInit", 0)
        except BackendError:
            raise
        except Exception as exc:  # how cuda-python says that there is no libcuda differs from version to version
            raise BackendError(
                f"this machine has no NVIDIA driver ({one_line(exc)}); run with `--engine portable` or an engine for `cpu`"
            ) from exc
        gpu = self._call("cuDeviceGet", ordinal)
        attribute = api.CUdevice_attribute
        major, minor = (
            self._call("cuDeviceGetAttribute", which, gpu)
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        version = self._call("cuDriverGetVersion")
        name = self._call("cuDeviceGetName", 256, gpu).split(b"\0")[0].decode(errors="replace")
        self.device = Device(name, f"{major}.{minor}", f"{version // 1000}.{version % 1000 // 10}")
        self._gpu, self._context = gpu, self._call("cuDevicePrimaryCtxRetain", gpu)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU's context this thread's own for a while."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._quietly("cuCtxPopCurrent")

    def free_bytes(self) -> int:
        """Return how much of the GPU's memory is free."""
        return int(self._call("cuMemGetInfo")[0])

    def allocate(self, size: int) -> int:
        """Return the address of new memory on the GPU."""
        return int(self._call("cuMemAlloc", size, size=size))

    def free(self, address: int) -> None:
        """Give memory on the GPU back."""
        self._release("cuMemFree", address)

    def allocate_host(self, size: int) -> int:
        """Return the address of new page-locked memory of this process."""
        address = int(self._call("cuMemHostAlloc", size, _PORTABLE_HOST, size=size))
        with self._lock:
            self._pinned += 1
        return address

    def free_host(self, address: int) -> None:
        """Give page-locked memory back; also after `close`."""
        self._release("cuMemFreeHost", address)
        with self._lock:
            self._pinned -= 1
            self._leave()

    def new_stream(self) -> int:
        """Return a new stream, which waits for no other."""
        return int(self._call("cuStreamCreate", _NON_BLOCKING))

    def free_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._release("cuStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for everything in a stream, without the GIL."""
        self._call("cuStreamSynchronize", stream)

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy from page-locked memory to the GPU."""
        self._call("cuMemcpyHtoDAsync", target, source, size, stream)

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy from the GPU to page-locked memory."""
        self._call("cuMemcpyDtoHAsync", target, source, size, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy within the GPU."""
        self._call("cuMemcpyDtoDAsync", target, source, size, stream)

    def clear(self, target: int, size: int, stream: int) -> None:
        """Fill with zeros."""
        self._call("cuMemsetD8Async", target, 0, size, stream)

    def write(self, target: int, source: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the GPU and wait for it."""
        self._call("cuMemcpyHtoD", target, source.ctypes.data, source.nbytes)

    def read(self, target: npt.NDArray[Any], source: int) -> None:
        """Copy from the GPU into a contiguous array and wait for it."""
        self._call("cuMemcpyDtoH", target.ctypes.data, source, target.nbytes)

    def begin_capture(self, stream: int) -> None:
        """Record what this thread puts into a stream, and do none of it, until `end_capture`."""
        # Relaxed: memory that Python's collector, or another thread, frees meanwhile does not spoil the recording.
        self._call("cuStreamBeginCapture", stream, self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)

    def end_capture(self, stream: int) -> int:
        """Return what was recorded, as a graph that `launch` runs."""
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return int(self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._quietly("cuGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Do what a graph recorded."""
        self._call("cuGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        """Give a graph back."""
        self._release("cuGraphExecDestroy", graph)

    def close(self) -> None:
        """Let go of the GPU; its context ends when the last page-locked memory has been freed too."""
        with self._lock:
            self._closed = True
            self._leave()

    def _leave(self) -> None:
        if self._closed and not self._pinned and self._context is not None:
            self._context = None
            if os.getpid() == self._pid:
                self._quietly("cuDevicePrimaryCtxRelease", self._gpu)

    def _call(self, name: str, *arguments: Any, size: int | None = None) -> Any:
        """Call the driver. Returns: what it gives besides its status. Raises: BackendError."""
        status, *values = getattr(self._api, name)(*arguments)
        if int(status) != 0:
            raise BackendError(self._message(name, status, size))
        return values[0] if len(values) == 1 else values

    def _message(self, name: str, status: Any, size: int | None) -> str:
        error = getattr(status, "name", str(status))
        asked = "" if size is None else f" for {size} bytes"
        if size is not None:
            failed, *values = self._api.cuMemGetInfo()
            asked += "" if int(failed) else f" of {values[0]} free"
        remedy = _REMEDIES.get(error)
        return f"{name}{asked}: {error}" + (f"; {remedy}" if remedy else "")

    def _release(self, name: str, handle: int) -> None:
        # In a forked child the memory is the parent's, and CUDA does not work there.
        if os.getpid() != self._pid or self._context is None:
            return
        try:
            with self.current():
                self._quietly(name, handle)
        except BackendError as exc:  # a lost context took it all along
            logger.debug("%s", exc)

    def _quietly(self, name: str, *arguments: Any) -> None:
        status = getattr(self._api, name)(*arguments)[0]
        if int(status) != 0:  # nobody could do anything about it, and the error was told by the call that it broke
            logger.debug("%s: %s", name, getattr(status, "name", status))
