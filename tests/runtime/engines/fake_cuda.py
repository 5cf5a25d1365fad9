"""A GPU's driver that is not there, for tests that say so in their name: numpy memory, and streams that do nothing until
waited for.

It is stricter than a GPU. What real memory would let pass now and then fails here each time: memory that was freed or never
written to the end, two streams at the same memory without waiting, host memory read before the copy into it was waited for
(it holds NaN until then), calls without a current context, anything left at `close`.
"""

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from galerne.errors import BackendError
from galerne.runtime.engines.tensorrt.driver import Device

Bytes = npt.NDArray[np.uint8]
_POISON = 0xFF  # NaN in any float


class MisuseError(AssertionError):
    """What a GPU would answer with an error, or with wrong numbers."""


@dataclass
class Block:
    """Memory of one allocation, and which streams have it in use: True where they write it."""

    address: int
    data: Bytes
    pending: dict[int, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Operation:
    """Something in a stream. touches: the blocks on the device, each with whether it is written."""

    kind: str
    run: Callable[[], None]
    touches: Sequence[tuple[int, int, bool]]
    before: Callable[[], None] = lambda: None


class FakeDriver:
    """See `Driver`. counts: how often each kind of operation was put into a stream."""

    def __init__(self, *, capability: str = "8.9", memory_bytes: int = 1 << 30, driver_version: str = "13.0") -> None:
        self.device = Device("Fake GPU", capability, driver_version)
        self.memory_bytes, self.closed = memory_bytes, False
        self.counts: Counter[str] = Counter()
        self.fail_at: str | None = None
        self._blocks: dict[int, Block] = {}
        self._hosts: dict[int, Bytes] = {}
        self._streams: dict[int, list[Operation]] = {}
        self._graphs: dict[int, list[Operation]] = {}
        self._recording: dict[int, list[Operation]] = {}
        self._next, self._handles = 0x7F0000000000, 0
        self._lock, self._local = threading.RLock(), threading.local()

    @property
    def held(self) -> tuple[int, int, int, int]:
        """How many blocks on the device, streams, graphs, and page-locked blocks there are."""
        return len(self._blocks), len(self._streams), len(self._graphs), len(self._hosts)

    @contextmanager
    def current(self) -> Iterator[None]:
        self._must(not self.closed, "the driver is closed")
        self._local.depth = getattr(self._local, "depth", 0) + 1
        try:
            yield
        finally:
            self._local.depth -= 1

    def free_bytes(self) -> int:
        self._check("cuMemGetInfo")
        return self.memory_bytes - sum(len(block.data) for block in self._blocks.values())

    def allocate(self, size: int) -> int:
        self._check("cuMemAlloc")
        self._must(size > 0, "an allocation of no bytes")
        if size > self.free_bytes():
            raise BackendError(f"cuMemAlloc for {size} bytes of {self.free_bytes()} free: CUDA_ERROR_OUT_OF_MEMORY")
        with self._lock:
            address = self._next
            self._next += -(-size // 256) * 256 + 4096  # a gap, so that writing past the end finds nothing
            self._blocks[address] = Block(address, np.full(size, _POISON, np.uint8))
        return address

    def free(self, address: int) -> None:
        with self._lock:
            self._must(address in self._blocks, "memory freed twice, or never allocated")
            self._must(not self._blocks[address].pending, "memory freed while a stream uses it")
            del self._blocks[address]

    def allocate_host(self, size: int) -> int:
        self._must(size > 0, "an allocation of no bytes")
        data = np.full(size, _POISON, np.uint8)
        self._hosts[data.ctypes.data] = data
        return int(data.ctypes.data)

    def free_host(self, address: int) -> None:
        self._must(self._hosts.pop(address, None) is not None, "host memory freed twice, or never allocated")

    def new_stream(self) -> int:
        self._check("cuStreamCreate")
        self._handles += 1
        self._streams[self._handles] = []
        return self._handles

    def free_stream(self, stream: int) -> None:
        self._must(self._streams.pop(stream) == [], "a stream freed with work in it")

    def synchronize(self, stream: int) -> None:
        self._check("cuStreamSynchronize")
        self._must(stream not in self._recording, "waiting for a stream that is being recorded")
        queue, self._streams[stream] = self._streams[stream], []
        try:
            for operation in queue:
                operation.run()
        finally:
            with self._lock:
                for block in self._blocks.values():
                    block.pending.pop(stream, None)

    def upload(self, target: int, source: int, size: int, stream: int) -> None:
        self._check("cuMemcpyHtoDAsync")

        def run() -> None:
            self.device_bytes(target, size)[:] = self._host(source, size)

        self._host(source, size)
        self.enqueue(stream, Operation("upload", run, [(target, size, True)]))

    def download(self, target: int, source: int, size: int, stream: int) -> None:
        self._check("cuMemcpyDtoHAsync")

        def run() -> None:
            self._host(target, size)[:] = self.device_bytes(source, size)

        def poison() -> None:
            self._host(target, size)[:] = _POISON

        self.enqueue(stream, Operation("download", run, [(source, size, False)], poison))

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._check("cuMemcpyDtoDAsync")

        def run() -> None:
            self.device_bytes(target, size)[:] = self.device_bytes(source, size)

        self.enqueue(stream, Operation("copy", run, [(source, size, False), (target, size, True)]))

    def clear(self, target: int, size: int, stream: int) -> None:
        self._check("cuMemsetD8Async")

        def run() -> None:
            self.device_bytes(target, size)[:] = 0

        self.enqueue(stream, Operation("clear", run, [(target, size, True)]))

    def write(self, target: int, source: npt.NDArray[Any]) -> None:
        self._check("cuMemcpyHtoD")
        self._must(source.flags.c_contiguous, "an array that is not contiguous")
        self._must(not self._block(target, source.nbytes).pending, "memory written while a stream uses it")
        self.device_bytes(target, source.nbytes)[:] = source.reshape(-1).view(np.uint8)

    def read(self, target: npt.NDArray[Any], source: int) -> None:
        self._check("cuMemcpyDtoH")
        self._must(target.flags.c_contiguous, "an array that is not contiguous")
        self._must(not self._block(source, target.nbytes).pending, "memory read while a stream uses it")
        target.reshape(-1).view(np.uint8)[:] = self.device_bytes(source, target.nbytes)

    def begin_capture(self, stream: int) -> None:
        self._check("cuStreamBeginCapture")
        self._must(self._streams[stream] == [] and stream not in self._recording, "recording a stream that is in use")
        self._recording[stream] = []

    def end_capture(self, stream: int) -> int:
        recorded = self._recording.pop(stream)
        self._check("cuStreamEndCapture")
        self._handles += 1
        self._graphs[self._handles] = recorded
        return self._handles

    def launch(self, graph: int, stream: int) -> None:
        self._check("cuGraphLaunch")
        self.counts["launch"] += 1
        for operation in self._graphs[graph]:
            self.enqueue(stream, operation)

    def free_graph(self, graph: int) -> None:
        del self._graphs[graph]

    def close(self) -> None:
        self._must(not self.closed, "closed twice")
        self.closed = True
        leaked = dict(zip(("blocks", "streams", "graphs"), self.held[:3], strict=True))
        self._must(not any(leaked.values()), f"left at close: {leaked}")

    # What a fake TensorRT uses besides.

    def enqueue(self, stream: int, operation: Operation) -> None:
        """Put an operation into a stream, or into the recording of it."""
        self._check(operation.kind)
        self._must(stream in self._streams, f"no stream {stream}")
        for address, size, _ in operation.touches:
            self._block(address, size)
        if stream in self._recording:
            self._recording[stream].append(operation)
            return
        with self._lock:
            for address, size, writes in operation.touches:
                block = self._block(address, size)
                for other, written in block.pending.items():
                    self._must(
                        other == stream or not (writes or written), "two streams at the same memory without waiting"
                    )
                block.pending[stream] = writes or block.pending.get(stream, False)
        operation.before()
        self.counts[operation.kind] += 1
        self._streams[stream].append(operation)

    def is_recording(self, stream: int) -> bool:
        """Whether a stream is being recorded."""
        return stream in self._recording

    def device_bytes(self, address: int, size: int) -> Bytes:
        """Return the memory at an address on the device."""
        block = self._block(address, size)
        return block.data[address - block.address :][:size]

    def _block(self, address: int, size: int) -> Block:
        with self._lock:
            starts = sorted(self._blocks)
            index = bisect.bisect_right(starts, address) - 1
            block = self._blocks[starts[index]] if index >= 0 else None
        self._must(
            block is not None and address + size <= block.address + len(block.data),
            "memory that was freed, never allocated, or ends before",
        )
        return block  # type: ignore[return-value]

    def _host(self, address: int, size: int) -> Bytes:
        for start, data in self._hosts.items():
            if start <= address and address + size <= start + len(data):
                return data[address - start :][:size]
        raise MisuseError("host memory that is not page-locked, was freed, or ends before")

    def _check(self, call: str) -> None:
        self._must(not self.closed, f"{call} after close")
        self._must(getattr(self._local, "depth", 0) > 0, f"{call} without a current context")
        if self.fail_at == call:
            self.fail_at = None
            raise BackendError(f"{call}: CUDA_ERROR_ECC_UNCORRECTABLE")

    @staticmethod
    def _must(holds: bool, otherwise: str) -> None:
        if not holds:
            raise MisuseError(otherwise)
