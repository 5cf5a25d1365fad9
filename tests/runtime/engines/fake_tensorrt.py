"""A TensorRT that is not there, for tests that say so in their name: it computes with ONNX Runtime in a fake GPU's memory.

Its engine file is a line of JSON and the graph as it was lowered for TensorRT, weights included. The names and arguments are
TensorRT's own; `test_tensorrt_fake_driver.py` holds them against the package where it is installed.
"""

import dataclasses
import json
from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from galerne.optimize.builders.tensorrt.build_plan import NETWORK
from galerne.optimize.builders.tensorrt.options import Options
from galerne.optimize.builders.tensorrt.options import profiles as plan_profiles
from galerne.optimize.lower.tensorrt import lower
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.record import SCHEMA_VERSION, EngineRecord, inputs_of
from galerne.runtime.manifest import layer_kinds
from tests.runtime.engines.fake_cuda import FakeDriver, MisuseError, Operation

Profiles = Sequence[dict[str, list[int]]]

SCRATCH_BYTES = 1000


class DataType(Enum):
    FLOAT, HALF, BF16, INT32, INT64, BOOL = range(6)


_ELEMENTS = {
    onnx.TensorProto.FLOAT: DataType.FLOAT,
    onnx.TensorProto.FLOAT16: DataType.HALF,
    onnx.TensorProto.BFLOAT16: DataType.BF16,
    onnx.TensorProto.INT64: DataType.INT64,
}
_NUMPY = {DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT64: np.int64}


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity


class IStreamReaderV2:
    pass


class SeekPosition(Enum):
    SET, CUR, END = range(3)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY, EAGER, NONE = range(3)


class FakeTensorRT:
    """What `import tensorrt_rtx` gives.

    in_place: whether engines say that present lies where past lies.
    streams: whether the version reads engines from a stream.
    capturable: what `is_stream_capturable` says.
    """

    __name__ = "tensorrt_rtx"
    ILogger, SeekPosition, DataType = ILogger, SeekPosition, DataType
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy

    def __init__(
        self,
        driver: FakeDriver,
        version: str = "1.7.1.116",
        *,
        in_place: bool = True,
        streams: bool = True,
        capturable: bool = True,
    ) -> None:
        self.driver, self.__version__ = driver, version
        self.in_place, self.capturable = in_place, capturable
        self.loaded = 0
        self.refitted: list[str] = []
        if streams:
            self.IStreamReaderV2 = IStreamReaderV2
        trt = self

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, source: Any) -> "FakeEngine | None":
                trt.loaded += 1
                data = _read(source) if isinstance(source, IStreamReaderV2) else bytes(source)
                head, _, graph = data.partition(b"\n")
                try:
                    return FakeEngine(trt, json.loads(head), graph)
                except ValueError:
                    self.logger.log(ILogger.ERROR, "Serialization assertion\nfailed")
                    return None

        class Refitter:
            def __init__(self, engine: FakeEngine, logger: ILogger) -> None:
                self.engine = engine

            def get_missing_weights(self) -> list[str]:
                return []

            def refit_cuda_engine(self) -> bool:
                self.engine.stripped = False
                return True

        class OnnxParserRefitter:
            def __init__(self, refitter: Refitter, logger: ILogger) -> None:
                pass

            def refit_from_bytes(self, model: bytes, path: str = "") -> bool:
                trt.refitted.append(path)
                return bool(onnx.load_from_string(model).graph.node)

        self.Runtime, self.Refitter, self.OnnxParserRefitter = Runtime, Refitter, OnnxParserRefitter


def _read(reader: Any) -> bytes:
    """Read as TensorRT does: in requests that the reader may answer in part, going back in between."""
    reader.seek(0, SeekPosition.SET)
    data = b""
    while part := reader.read(1 << 20, 0):
        data += part
    return data


class FakeEngine:
    """A deserialized engine."""

    def __init__(self, trt: FakeTensorRT, head: dict[str, Any], graph: bytes) -> None:
        self.trt, self.profiles, self.stripped = trt, head["profiles"], head["stripped"]
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        model = onnx.load_from_string(graph)
        self.tensors = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output)}
        self.outputs = {value.name for value in model.graph.output}
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(self.profiles)
        self.device_memory_size_v2, self.streamable_weights_size = SCRATCH_BYTES, 1000
        self.weight_streaming_budget_v2 = 1000

    def get_weight_streaming_automatic_budget(self) -> int:
        return 500

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.tensors)[index])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in self.tensors[name].shape.dim)

    def get_tensor_dtype(self, name: str) -> DataType:
        return _ELEMENTS[self.tensors[name].elem_type]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        profile, shape = self.profiles[profile_index], self.get_tensor_shape(name)
        second = profile["tokens" if name in ("input_ids", "position_ids") else "logits"]
        sizes = [(profile["batch"][step], second[step]) for step in range(3)]
        return [tuple(size if size >= 0 else pair[axis] for axis, size in enumerate(shape)) for pair in sizes]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present.", "past_key_values.") if self.trt.in_place and name != "logits" else None

    def create_runtime_config(self) -> "FakeConfig":
        return FakeConfig()

    def create_execution_context(self, config: "FakeConfig") -> "FakeContext":
        if config.cache is None:
            raise MisuseError("kernels compiled anew for each context")
        if config.strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise MisuseError("expected memory that the caller manages")
        if self.stripped:
            raise MisuseError("a stripped engine used without its weights")
        return FakeContext(self)


class FakeConfig:
    """What a context is made with."""

    def __init__(self) -> None:
        self.strategy: Any = None
        self.cache: object = None
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> bool:
        self.cache = cache
        return True


class FakeContext:
    """An execution context; what it was told is checked when it runs."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.driver = engine, engine.trt.driver
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.settled: dict[str, tuple[int, ...]] | None = None

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.driver.enqueue(stream_handle, Operation("profile", lambda: None, []))
        self.profile, self.shapes, self.settled = profile_index, {}, None
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.profile is None or name in self.engine.outputs:
            return False
        if name in ("input_ids", "position_ids", "logit_indices", "write_indices"):
            low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
            if not all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True)):
                return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory % 256 == 0

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.trt.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        recorded = self.driver.is_recording(stream_handle)
        if recorded and self.settled != self.shapes:
            raise MisuseError("recorded before the shapes were run once")
        self.settled = dict(self.shapes)
        if self.memory[1] < self.engine.device_memory_size_v2:
            raise MisuseError("run without scratch memory")
        sizes = self._sizes()
        touches = [(self.memory[0], self.memory[1], True)]
        for name, (shape, dtype) in sizes.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            touches.append((self.addresses[name], size, name in self.engine.outputs))
        addresses, scratch = dict(self.addresses), self.memory

        def run() -> None:
            self.driver.device_bytes(*scratch)[:] = 0xFF
            arrays = {
                name: self.driver.device_bytes(addresses[name], int(np.prod(shape)) * np.dtype(dtype).itemsize)
                .view(dtype)
                .reshape(shape)
                for name, (shape, dtype) in sizes.items()
            }
            names = [output for output in arrays if output in self.engine.outputs]
            feeds = {name: array.copy() for name, array in arrays.items() if name not in self.engine.outputs}
            for name, result in zip(names, self.engine.session.run(names, feeds), strict=True):
                arrays[name][...] = result

        self.driver.enqueue(stream_handle, Operation("run", run, touches))
        return True

    def _sizes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return each tensor's shape and type, after checking that all was told."""
        engine, sizes = self.engine, {}
        for name in engine.tensors:
            if name not in self.addresses:
                raise MisuseError(f"no address for {name}")
            if name not in engine.outputs and name not in self.shapes:
                raise MisuseError(f"no shape for {name}")
            partner = name.replace("present.", "past_key_values.")
            shape = self.shapes.get(partner, ())
            if name == "logits":
                shape = (*self.shapes["logit_indices"], engine.get_tensor_shape(name)[2])
            elif partner != name and (self.addresses[name] == self.addresses[partner]) != engine.trt.in_place:
                raise MisuseError(f"{name} and {partner}: one memory where there should be two, or two for one")
            declared = engine.get_tensor_shape(name)
            if len(shape) != len(declared) or any(0 <= size != got for size, got in zip(declared, shape, strict=True)):
                raise MisuseError(f"{name}: shape {shape} for {declared}")
            sizes[name] = (shape, _NUMPY[engine.get_tensor_dtype(name)])
        batches = {shape[0] for shape, _ in sizes.values()}
        if len(batches) != 1 or self.shapes["input_ids"] != self.shapes["position_ids"]:
            raise MisuseError(f"inputs of several batches: {batches}")
        return sizes


DECODE = {"batch": [1, 1, 1], "tokens": [1, 1, 1], "logits": [1, 1, 1]}


def prefill(chunk: int) -> dict[str, list[int]]:
    """Return the profile of a prompt's chunks, with logits for one token."""
    return {"batch": [1, 1, 1], "tokens": [1, chunk, chunk], "logits": [1, 1, 1]}


def enter_engine(
    bundle: Bundle,
    profiles: Profiles | None = None,
    *,
    name: str = "rtx-4090",
    chosen: Options | None = None,
    stripped: bool = False,
    **changes: Any,
) -> Bundle:
    """Lower the graph as `galerne build` does, and write what the fake TensorRT-RTX loads in place of compiling it.

    Args:
        profiles: in place of those that `galerne build` gives an engine.
        changes: of the record.
    """
    folder = bundle.file(f"engines/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    facts = bundle.manifest.graph
    kinds = layer_kinds(bundle.manifest.model.layer_windows)[1]
    network = onnx.load(bundle.file(GRAPH))
    lowered = lower(network, [facts.capacities[kind] for kind in kinds], facts.compute_type)
    planned = plan_profiles(chosen or Options(), facts.chunk, "tensorrt_rtx")
    (folder / NETWORK).write_bytes(network.SerializeToString())
    for node in network.graph.node:
        for attribute in [one for one in node.attribute if one.name == "TRT_decomposable"]:
            node.attribute.remove(attribute)  # TensorRT's own, which ONNX Runtime refuses
    head = {"profiles": profiles or [dataclasses.asdict(profile) for profile in planned], "stripped": stripped}
    (folder / "engine.plan").write_bytes(json.dumps(head).encode() + b"\n" + network.SerializeToString())
    settings: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "target": name,
        "backend": "tensorrt_rtx",
        "backend_version": "1.7.1.116",
        "file": "engine.plan",
        "compute_capability": "8.9",
        "cpu_features": None,
        "profiles": planned,
        "inputs": inputs_of(bundle, (GRAPH, WEIGHTS)),
        "parity": "none",
        "options": lowered,
        "cuda": "13",
        "weights": "stripped" if stripped else "inside",
    }
    record = EngineRecord(**{**settings, **changes})
    (folder / "engine.json").write_bytes(record.to_json())
    names = ("engine.json", "engine.plan", NETWORK)
    return bundle.with_files(f"engines/{name}", [f"engines/{name}/{file}" for file in names])
