"""Memory, streams and graphs of a driver as objects: freed by `close`, or with the last reference."""

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from galerne.runtime.engines.tensorrt.driver import Driver

# What TensorRT asks of the address of an input or output.
ALIGNMENT = 256


class _Handle:
    """Something of the driver's that is given back once."""

    def __init__(self, handle: int, free: Any) -> None:
        self._handle = handle
        self._free = weakref.finalize(self, free, handle)
        # When the process ends the driver frees everything, and is perhaps gone before Python comes to this.
        self._free.atexit = False

    def close(self) -> None:
        """Give it back; a second time does nothing."""
        self._free()


class DeviceMemory(_Handle):
    """Memory on the GPU. address: its first byte. size: in bytes."""

    def __init__(self, driver: Driver, size: int) -> None:
        """Allocate it. Raises: BackendError if there is not enough."""
        super().__init__(driver.allocate(size), driver.free)
        self.address, self.size = self._handle, size


class Stream(_Handle):
    """A stream. handle: what the driver and TensorRT take."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver.new_stream(), driver.free_stream)
        self.handle = self._handle


class Graph(_Handle):
    """What a stream recorded."""

    def __init__(self, driver: Driver, handle: int) -> None:
        super().__init__(handle, driver.free_graph)
        self.handle = handle


class PinnedMemory(_Handle):
    """Page-locked memory of this process, which lives as long as an array over it. address: its first byte."""

    def __init__(self, driver: Driver, size: int) -> None:
        super().__init__(driver.allocate_host(size), driver.free_host)
        self.address, self.size = self._handle, size

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike, offset: int = 0) -> npt.NDArray[Any]:
        """Return an array over a part of it, which keeps the whole of it alive."""
        array = np.asarray(_Window(self, shape, np.dtype(dtype), offset))
        assert offset + array.nbytes <= self.size
        return array


class _Window:
    """What NumPy makes an array of, and then holds."""

    def __init__(self, memory: PinnedMemory, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> None:
        self._memory = memory
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.str,
            "data": (memory.address + offset, False),
        }


def pinned_array(driver: Driver, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return a new page-locked array of zeros; the memory goes with the last view of it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    array = PinnedMemory(driver, size).array(shape, dtype)
    array[...] = 0
    return array
