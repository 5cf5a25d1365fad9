"""The driver over cuda-python, as far as that goes without a GPU: its errors, its order, and that what it calls exists."""

import ast
import inspect
import re
from collections.abc import Iterator
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

from galerne.errors import BackendError
from galerne.runtime.engines.tensorrt import cuda
from galerne.runtime.engines.tensorrt.cuda import CudaDriver, open_cuda
from galerne.runtime.engines.tensorrt.driver import gpu_count
from galerne.runtime.engines.tensorrt.memory import pinned_array
from tests.runtime.engines import fake_tensorrt


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ECC_UNCORRECTABLE = 214
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class Api:
    """Answers as `cuda.bindings.driver` does: a status, then values. fails: what a call shall answer."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)
    values: dict[str, tuple[Any, ...]] = {  # noqa: RUF012
        "cuDeviceGet": (0,),
        "cuDriverGetVersion": (12060,),
        "cuDeviceGetName": (b"Orin\0\0",),
        "cuDevicePrimaryCtxRetain": (1,),
        "cuMemGetInfo": (1000, 2000),
        "cuMemAlloc": (4096,),
        "cuStreamCreate": (5,),
        "cuStreamEndCapture": (6,),
        "cuGraphInstantiate": (7,),
        "cuCtxPopCurrent": (1,),
    }

    def __init__(self, **fails: Result) -> None:
        self.fails, self.calls = fails, []  # type: tuple[dict[str, Result], list[str]]
        self.host = bytearray(64)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name in self.fails:
                return (self.fails[name], *(None for _ in self.values.get(name, ())))
            if name == "cuDeviceGetAttribute":
                return Result.CUDA_SUCCESS, 8 if arguments[0] == 75 else 7
            if name == "cuMemHostAlloc":
                import numpy as np

                return Result.CUDA_SUCCESS, np.frombuffer(self.host, np.uint8).ctypes.data
            return (Result.CUDA_SUCCESS, *self.values.get(name, ()))

        return call


def test_what_the_gpu_is() -> None:
    driver = CudaDriver(Api())
    assert (driver.device.name, driver.device.compute_capability, driver.device.driver_version) == (
        "Orin",
        "8.7",
        "12.6",
    )
    assert driver.free_bytes() == 1000


@pytest.mark.parametrize(
    ("call", "result", "message"),
    [
        ("cuInit", Result.CUDA_ERROR_NO_DEVICE, "^cuInit: CUDA_ERROR_NO_DEVICE; this machine has no NVIDIA GPU"),
        (
            "cuMemAlloc",
            Result.CUDA_ERROR_OUT_OF_MEMORY,
            "^cuMemAlloc for 5000 bytes of 1000 free: CUDA_ERROR_OUT_OF_MEMORY; ",
        ),
        ("cuStreamSynchronize", Result.CUDA_ERROR_ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE; the GPU's memory"),
        (
            "cuStreamSynchronize",
            Result.CUDA_ERROR_ILLEGAL_ADDRESS,
            "CUDA_ERROR_ILLEGAL_ADDRESS; the GPU's context is lost",
        ),
    ],
)
def test_an_error_is_one_line(call: str, result: Result, message: str) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        driver = CudaDriver(Api(**{call: result}))
        driver.allocate(5000)
        driver.synchronize(5)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3


def test_a_missing_driver_is_one_line() -> None:
    class NoLibrary(Api):
        def cuInit(self, flags: int) -> None:  # noqa: N802
            raise RuntimeError("libcuda.so.1: cannot open\nshared object file")

    with pytest.raises(BackendError, match=r"no NVIDIA driver \(libcuda.so.1: cannot open shared object file\)"):
        CudaDriver(NoLibrary())


def test_the_context_is_pushed_and_popped_and_released_last() -> None:
    api = Api()
    driver = CudaDriver(api)
    with driver.current():
        logits = pinned_array(driver, (4,), "f4")
    driver.close()
    assert "cuDevicePrimaryCtxRelease" not in api.calls  # someone still holds logits
    logits[...] = 1
    del logits
    assert api.calls.count("cuCtxPushCurrent") == api.calls.count("cuCtxPopCurrent") == 2
    assert api.calls[-4:] == ["cuCtxPushCurrent", "cuMemFreeHost", "cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"]


def test_freeing_what_an_error_took_says_nothing() -> None:
    driver = CudaDriver(
        Api(cuMemFree=Result.CUDA_ERROR_ILLEGAL_ADDRESS, cuCtxPushCurrent=Result.CUDA_ERROR_ILLEGAL_ADDRESS)
    )
    driver.free(4096)
    driver.free_stream(5)


def test_a_failed_recording_gives_its_graph_back() -> None:
    api = Api(cuGraphInstantiate=Result.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(BackendError, match="cuGraphInstantiate: CUDA_ERROR_OUT_OF_MEMORY"):
        CudaDriver(api).end_capture(5)
    assert api.calls[-1] == "cuGraphDestroy"


def _called() -> Iterator[str]:
    for node in ast.walk(ast.parse(inspect.getsource(cuda))):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch("cu[A-Z][A-Za-z]+", node.value)
        ):
            yield node.value
        if isinstance(node, ast.Attribute) and node.attr.startswith("CU_"):
            yield node.attr


def test_cuda_python_has_every_call() -> None:
    """By the names in the source, against the installed package: the right number of arguments too."""
    api = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    members = set(dir(api)) | set(dir(api.CUdevice_attribute)) | set(dir(api.CUstreamCaptureMode))
    names = set(_called())
    assert len(names) > 25
    assert names <= members
    errors = {name for name in cuda._REMEDIES if name not in api.CUresult.__members__}
    assert errors == set()


@pytest.mark.skipif(bool(gpu_count()), reason="there is a GPU here, and it opens")
def test_no_driver_here_is_one_line() -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    with pytest.raises(BackendError, match="^this machine has no NVIDIA driver .*--engine portable"):
        open_cuda()


@pytest.mark.tensorrt
def test_the_fake_tensorrt_has_nothing_that_tensorrt_lacks() -> None:
    """What the engine calls on the fake, it finds in TensorRT-RTX under the same name."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX's Python package is not installed")
    fakes = {
        trt.ICudaEngine: fake_tensorrt.FakeEngine,
        trt.IExecutionContext: fake_tensorrt.FakeContext,
        trt.ExecutionContextAllocationStrategy: fake_tensorrt.ExecutionContextAllocationStrategy,
        trt.SeekPosition: fake_tensorrt.SeekPosition,
        trt.IRuntimeConfig: fake_tensorrt.FakeConfig,
        trt.DynamicShapesKernelSpecializationStrategy: fake_tensorrt.DynamicShapesKernelSpecializationStrategy,
        trt.ILogger: fake_tensorrt.ILogger,
    }
    for real, fake in fakes.items():
        own = {name for name in vars(fake) if not name.startswith("_")}
        assert own and own <= set(dir(real)), (real, own - set(dir(real)))
    assert {"Runtime", "Refitter", "OnnxParserRefitter", "IStreamReaderV2", "DataType"} <= set(dir(trt))
    assert {"deserialize_cuda_engine", "engine_host_code_allowed", "engine_header_size"} <= set(dir(trt.Runtime))
    assert {"get_missing_weights", "refit_cuda_engine"} <= set(dir(trt.Refitter))
    assert "refit_from_bytes" in dir(trt.OnnxParserRefitter)
    assert "dynamic_shapes_kernel_specialization_strategy" in dir(trt.IRuntimeConfig)
    given = {"device_memory_size_v2", "weight_streaming_budget_v2", "streamable_weights_size", "num_io_tensors"}
    assert given <= set(dir(trt.ICudaEngine))
