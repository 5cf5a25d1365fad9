"""The driver over cuda-python on a real GPU: memory, streams and recorded graphs, as the TensorRT engine uses them."""

from collections.abc import Iterator

import numpy as np
import pytest

from galerne.errors import BackendError
from galerne.runtime.engines.tensorrt.cuda import CudaDriver, open_cuda
from galerne.runtime.engines.tensorrt.driver import gpu_count
from galerne.runtime.engines.tensorrt.memory import pinned_array

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_count(), reason="needs an NVIDIA GPU, its driver, and cuda-python"),
]

COUNT = 1000
SIZE = COUNT * 4


@pytest.fixture
def driver() -> Iterator[CudaDriver]:
    opened = open_cuda()
    with opened.current():
        yield opened
    opened.close()


def test_copies_in_a_stream(driver: CudaDriver) -> None:
    source, target = (pinned_array(driver, (COUNT,), np.float32) for _ in range(2))
    source[:] = np.arange(COUNT)
    first, second, stream = driver.allocate(SIZE), driver.allocate(SIZE), driver.new_stream()
    driver.upload(first, source.ctypes.data, SIZE, stream)
    driver.clear(second, SIZE, stream)
    driver.copy(second, first, SIZE // 2, stream)
    driver.download(target.ctypes.data, second, SIZE, stream)
    driver.synchronize(stream)
    assert np.array_equal(target[: COUNT // 2], source[: COUNT // 2])
    assert not target[COUNT // 2 :].any()
    plain = np.arange(COUNT, dtype=np.float32) + 7
    driver.write(first, plain)
    driver.read(target, first)
    assert np.array_equal(target, plain)
    for address in (first, second):
        driver.free(address)
    driver.free_stream(stream)


def test_a_recorded_graph_copies_what_is_there_when_it_runs(driver: CudaDriver) -> None:
    """A step of the TensorRT engine is recorded so: new ids lie at the same address each time."""
    source, target = (pinned_array(driver, (COUNT,), np.float32) for _ in range(2))
    address, stream = driver.allocate(SIZE), driver.new_stream()
    target[:] = -1
    driver.begin_capture(stream)
    driver.upload(address, source.ctypes.data, SIZE, stream)
    driver.download(target.ctypes.data, address, SIZE, stream)
    graph = driver.end_capture(stream)
    assert (target == -1).all()  # recording does nothing
    for value in (1, 2, 3):
        source[:] = value
        driver.launch(graph, stream)
        driver.synchronize(stream)
        assert (target == value).all()
    driver.free_graph(graph)
    driver.free(address)
    driver.free_stream(stream)


def test_memory_goes_and_comes_back(driver: CudaDriver) -> None:
    before, size = driver.free_bytes(), 1 << 28
    address = driver.allocate(size)
    assert before - driver.free_bytes() >= size
    driver.free(address)
    assert before - driver.free_bytes() < size
    with pytest.raises(
        BackendError, match=r"cuMemAlloc for \d+ bytes of \d+ free: CUDA_ERROR_OUT_OF_MEMORY; close other"
    ):
        driver.allocate(1 << 50)
    assert driver.device.compute_capability
    assert driver.device.name
