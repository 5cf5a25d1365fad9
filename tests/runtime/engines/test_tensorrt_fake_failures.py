"""What goes wrong, over a fake driver: errors in one line, sessions that go on, nothing left behind. Nothing ran on a GPU."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from galerne.errors import BackendError, BusyError
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines.tensorrt.memory import DeviceMemory, PinnedMemory, Stream
from galerne.runtime.model import Model
from tests.runtime.engines.conftest import NAME, FakeGpu
from tests.runtime.engines.fake_cuda import FakeDriver, MisuseError
from tests.runtime.engines.fake_tensorrt import FakeContext

WithEngine = Callable[..., Bundle]
IDS = np.random.default_rng(4).integers(0, 501, 100).tolist()


def test_fake_driver_is_left_as_it_was_a_hundred_times(with_engine: WithEngine, gpu: FakeGpu) -> None:
    """Closed in order, and dropped without closing: no memory, stream or graph stays."""
    bundle = with_engine()
    for close in [True, False] * 50:
        model = Model.open(bundle.path, NAME)
        session = model.session()
        session.append(IDS[:10])
        session.append([1])
        twin = session.fork()
        twin.append([1])
        twin.append([2])
        driver = gpu.driver
        assert driver.held[0] > 10
        if close:
            model.close()
            assert driver.held[:3] == (0, 0, 0)
        del session, twin, model
        assert driver.held == (0, 0, 0, 0)
        gpu.replace()


def test_fake_driver_memory_of_a_session_goes_with_it(with_engine: WithEngine, gpu: FakeGpu) -> None:
    with Model.open(with_engine().path, NAME) as model:
        kept = model.session()
        kept.append(IDS[:10])
        before = gpu.driver.held
        for _ in range(5):
            session = model.session()
            session.append(IDS[:3])
            session.close()
            model.session().append(IDS[:9])
            del session
            assert gpu.driver.held == before


def test_fake_driver_memory_does_not_grow_with_the_shapes_of_runs(with_engine: WithEngine, gpu: FakeGpu) -> None:
    """Prompts come in many lengths: what was bound for one goes when the next comes, and decoding keeps its graph."""
    with Model.open(with_engine().path, NAME) as model:
        session, held = model.session(), set()
        for count in (3, 1):
            session.append(IDS[:count])
        for length in range(2, 9):
            session.append(IDS[:length])
            session.append([1])
            held.add(gpu.driver.held)
        assert len(held) == 1


CALLS = [
    "cuMemcpyHtoDAsync",
    "run",
    "cuMemcpyDtoHAsync",
    "cuStreamSynchronize",
    "cuGraphLaunch",
    "cuStreamBeginCapture",
]


@pytest.mark.parametrize("call", CALLS)
def test_fake_driver_error_leaves_the_session_as_it_was(with_engine: WithEngine, gpu: FakeGpu, call: str) -> None:
    """Wherever it happens, after a prompt or in decoding; what is fed again gives the logits of a session without errors."""
    with Model.open(with_engine().path, NAME) as model:
        expected, session = model.session(), model.session()
        expected.append(IDS[:20])
        session.append(IDS[:20])
        failed = 0
        for token in IDS[20:60]:
            gpu.driver.fail_at = call
            length = session.length
            try:
                session.append([token])
            except BackendError as exc:
                failed += 1
                assert str(exc) == f"{call}: CUDA_ERROR_ECC_UNCORRECTABLE"
                assert session.length == length
                gpu.driver.fail_at = None
                session.append([token])
            gpu.driver.fail_at = None
            expected.append([token])
            assert np.array_equal(session.logits, expected.logits)
        assert failed


def test_fake_driver_out_of_memory_is_one_line_and_leaves_nothing(with_engine: WithEngine, gpu: FakeGpu) -> None:
    bundle = with_engine()
    weights = bundle.manifest.files[f"engines/{NAME}/engine.plan"].size
    gpu.replace(FakeDriver(memory_bytes=weights + 100_000))
    with Model.open(bundle.path, NAME) as model:
        rows = model.rows()
        held = gpu.driver.held
        with pytest.raises(BackendError, match=r"^cuMemAlloc for \d+ bytes of \d+ free: CUDA_ERROR_OUT_OF_MEMORY$"):
            for _ in range(1000):
                rows = model.rows(100)
        rows.close()
        del rows
        gc.collect()
        assert gpu.driver.held[0] <= held[0]


def test_fake_driver_ctrl_c_between_two_calls(
    with_engine: WithEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while work is in the stream: it is waited for, and the next run starts from a quiet stream."""
    with Model.open(with_engine().path, NAME) as model:
        expected, session = model.session(), model.session()
        expected.append(IDS[:30])
        session.append(IDS[:20])
        execute = FakeContext.execute_async_v3

        def interrupt(self: FakeContext, stream_handle: int) -> bool:
            execute(self, stream_handle)
            raise KeyboardInterrupt

        for tokens in (IDS[20:29], IDS[20:21]):
            monkeypatch.setattr(FakeContext, "execute_async_v3", interrupt)
            with pytest.raises(KeyboardInterrupt):
                session.append(tokens)
            monkeypatch.setattr(FakeContext, "execute_async_v3", execute)
            assert session.length == 20
        session.append(IDS[20:30])
        np.testing.assert_allclose(session.logits, expected.logits, rtol=0, atol=1e-5)


def test_fake_driver_close_waits_for_nobody(with_engine: WithEngine, gpu: FakeGpu) -> None:
    """A model is not closed while one of its sessions is being fed."""
    model = Model.open(with_engine().path, NAME)
    rows = model.rows()
    for _ in rows.runs([IDS[:20]], every=False):
        with pytest.raises(BusyError):
            model.close()
    model.close()
    model.close()
    assert gpu.driver.closed


# What the fake itself must not let pass: each of these would be a wrong number or a crash on a GPU.


@pytest.fixture
def bare() -> Any:
    driver = FakeDriver()
    with driver.current():
        yield driver


def test_the_fake_driver_does_nothing_until_it_is_waited_for(bare: FakeDriver) -> None:
    stream, host, memory = Stream(bare), PinnedMemory(bare, 16), DeviceMemory(bare, 16)
    array = host.array((4,), np.float32)
    array[...] = 7
    bare.upload(memory.address, host.address, 16, stream.handle)
    array[...] = 8  # too early: this is what will be uploaded
    bare.synchronize(stream.handle)
    bare.download(host.address, memory.address, 16, stream.handle)
    assert np.isnan(array).all()
    bare.synchronize(stream.handle)
    assert (array == 8).all()


def test_the_fake_driver_refuses_misuse(bare: FakeDriver) -> None:
    first, second = Stream(bare), Stream(bare)
    memory = DeviceMemory(bare, 256)
    with pytest.raises(MisuseError, match="ends before"):
        bare.clear(memory.address, 257, first.handle)
    bare.clear(memory.address, 256, first.handle)
    with pytest.raises(MisuseError, match="two streams"):
        bare.clear(memory.address, 256, second.handle)
    with pytest.raises(MisuseError, match="freed while a stream uses it"):
        bare.free(memory.address)
    bare.synchronize(first.handle)


def test_the_fake_driver_tells_leaks_and_late_calls(bare: FakeDriver) -> None:
    memory = DeviceMemory(bare, 256)
    memory.close()
    with pytest.raises(MisuseError, match="freed, never allocated"):
        bare.read(np.empty(1, np.uint8), memory.address)
    kept = DeviceMemory(bare, 256)
    with pytest.raises(MisuseError, match="left at close: .'blocks': 1"):
        bare.close()
    with pytest.raises(MisuseError, match="after close"):
        bare.allocate(1)
    kept.close()


def test_the_fake_driver_needs_a_current_context() -> None:
    with pytest.raises(MisuseError, match="without a current context"):
        FakeDriver().allocate(1)


def test_the_fake_driver_replays_addresses_and_not_objects(bare: FakeDriver) -> None:
    """As a CUDA graph does: what it recorded is freed, so replaying it fails."""
    stream, memory = Stream(bare), DeviceMemory(bare, 256)
    bare.begin_capture(stream.handle)
    bare.clear(memory.address, 256, stream.handle)
    with pytest.raises(MisuseError, match="being recorded"):
        bare.synchronize(stream.handle)
    graph = bare.end_capture(stream.handle)
    bare.launch(graph, stream.handle)
    bare.synchronize(stream.handle)
    memory.close()
    with pytest.raises(MisuseError, match="freed"):
        bare.launch(graph, stream.handle)
