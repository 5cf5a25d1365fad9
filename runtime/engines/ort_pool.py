"""Rings on a device of ONNX Runtime's, and where they go when nobody needs them any more."""

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from galerne.errors import BackendError, one_line
from galerne.runtime.engines.ort import RingLayout

CUDA = "cuda"

_PROVIDERS = {CUDA: "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


class Placement:
    """A device, as ONNX Runtime names it. "cpu" stands for one in tests: its memory is ONNX Runtime's own all the same."""

    def __init__(self, device: str) -> None:
        self.device, self.provider = device, _PROVIDERS[device]

    def new(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Any:
        """Return new memory on the device. Raises: BackendError if there is not enough."""
        try:
            return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self.device, 0)
        except Exception as exc:  # onnxruntime's errors share no base class of their own
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot allocate {size} bytes on {self.device}: {one_line(exc)}"
            ) from exc

    def put(self, array: npt.NDArray[Any]) -> Any:
        """Return a copy of an array on the device."""
        value = self.new(array.shape, array.dtype)
        value.update_inplace(np.ascontiguousarray(array))
        return value


class Rings:
    """The rings of some rows on the device, and the runs that are bound to them.

    values: the rings, in the layout's order. capacities: their slots C, of each kind of layer.
    bindings: `DeviceBinding`s, by S and K.
    """

    def __init__(
        self,
        placement: Placement,
        batch: int,
        layout: Sequence[RingLayout],
        capacities: Sequence[int],
        dtype: np.dtype[Any],
    ) -> None:
        self.capacities = tuple(capacities)
        # Zeros: a masked slot's value meets a weight of zero, and zero times NaN is NaN.
        self.values = [placement.put(np.zeros(ring.shape(batch, capacities[ring.kind]), dtype)) for ring in layout]
        self.bindings: dict[tuple[int, int], Any] = {}


class Pool:
    """Makes rings, and keeps what is given back where runs are recorded.

    A recording belongs to the memory that it was made over, and ONNX Runtime frees none before its session ends. So rings go
    from one sequence to the next with their recordings, and have few sizes: the full one, its half, its quarter and so on.

    alone: held by whoever does anything on the device, where runs are recorded. While ONNX Runtime records one, CUDA may
        refuse what other threads ask of it, and what is recorded computes in scratch memory that other runs use too.
    """

    def __init__(self, placement: Placement, full: Sequence[int], *, recording: bool) -> None:
        """Make an empty one. `full` has the rings' full sizes, of each kind of layer."""
        self._placement, self._full, self._recording = placement, full, recording
        self.alone: AbstractContextManager[object] = threading.RLock() if recording else nullcontext()
        self._kept: dict[tuple[int, tuple[int, ...]], list[Rings]] = {}
        self._empty: dict[tuple[int, ...], Any] = {}
        self._recordings = 0

    def take(self, batch: int, layout: Sequence[RingLayout], capacities: Sequence[int], dtype: np.dtype[Any]) -> Rings:
        """Return rings of zeros, of at least so many slots. Raises: BackendError if there is not enough memory."""
        if not self._recording:
            return Rings(self._placement, batch, layout, capacities, dtype)
        sizes = tuple(_step(size, full) for size, full in zip(capacities, self._full, strict=True))
        kept = self._kept.get((batch, sizes))
        if not kept:
            return Rings(self._placement, batch, layout, sizes, dtype)
        rings = kept.pop()
        for value in rings.values:
            shape = tuple(value.shape())
            if shape not in self._empty:
                self._empty[shape] = self._placement.put(np.zeros(shape, dtype))
            value.update_inplace(self._empty[shape])  # within the device
        return rings

    def give(self, batch: int, rings: Rings) -> None:
        """Take back what nothing runs over any more, whoever still refers to it."""
        if self._recording:
            self._kept.setdefault((batch, rings.capacities), []).append(rings)
        else:
            rings.values, rings.bindings = [], {}

    def new_recording(self) -> int:
        """Return a number that no run was recorded under yet."""
        self._recordings += 1
        return self._recordings

    def clear(self) -> None:
        """Let go of what is kept."""
        self._kept, self._empty = {}, {}


def _step(size: int, full: int) -> int:
    """Return the smallest of `full`, its half, its quarter and so on that is not under `size`."""
    while size <= -(-full // 2) < full:
        full = -(-full // 2)
    return full
