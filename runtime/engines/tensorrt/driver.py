"""What an engine asks of a GPU's driver: memory, copies, streams and recorded graphs."""

import ctypes
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")


@dataclass(frozen=True)
class Device:
    """The GPU.

    compute_capability: such as "8.9".
    driver_version: the newest CUDA version that the driver runs, such as "13.0".
    """

    name: str
    compute_capability: str
    driver_version: str


class Driver(Protocol):
    """One GPU. Addresses and handles are integers, sizes bytes.

    Calls that take a stream return at once and happen in the stream's order; host memory that they read or write belongs to
    them until `synchronize`. All but `current` need to be inside of `current`, in the calling thread; what frees need not,
    and raises nothing.

    Raises: BackendError from every call that CUDA refuses, with the call's name and CUDA's name of the error.
    """

    @property
    def device(self) -> Device:
        """The GPU itself."""

    def current(self) -> AbstractContextManager[None]:
        """Make the GPU's context this thread's own for a while."""

    def free_bytes(self) -> int:
        """Return how much of the GPU's memory is free."""

    def allocate(self, size: int) -> int:
        """Return the address of new memory on the GPU, aligned to 256 bytes. Its contents are anything."""

    def free(self, address: int) -> None:
        """Give memory on the GPU back."""

    def allocate_host(self, size: int) -> int:
        """Return the address of new page-locked memory of this process."""

    def free_host(self, address: int) -> None:
        """Give page-locked memory back; also after `close`."""

    def new_stream(self) -> int:
        """Return a new stream, which waits for no other."""

    def free_stream(self, stream: int) -> None:
        """Give a stream back."""

    def synchronize(self, stream: int) -> None:
        """Wait for everything in a stream, without the GIL."""

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy from page-locked memory to the GPU."""

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy from the GPU to page-locked memory."""

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy within the GPU."""

    def clear(self, target: int, size: int, stream: int) -> None:
        """Fill with zeros."""

    def write(self, target: int, source: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the GPU and wait for it. No stream may be using the target."""

    def read(self, target: npt.NDArray[Any], source: int) -> None:
        """Copy from the GPU into a contiguous array and wait for it. No stream may be using the source."""

    def begin_capture(self, stream: int) -> None:
        """Record what this thread puts into a stream, and do none of it, until `end_capture`."""

    def end_capture(self, stream: int) -> int:
        """Return what was recorded, as a graph that `launch` runs."""

    def launch(self, graph: int, stream: int) -> None:
        """Do what a graph recorded."""

    def free_graph(self, graph: int) -> None:
        """Give a graph back."""

    def close(self) -> None:
        """Let go of the GPU. Page-locked memory that is still in use stays until it is freed."""


def gpu_count() -> int | None:
    """Return how many GPUs the NVIDIA driver shows; None if there is no driver or it does not start.

    Source: the CUDA driver API, cuInit and cuDeviceGetCount, so that nothing heavy is imported to find out.
    """
    for name in _LIBRARIES:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return None
