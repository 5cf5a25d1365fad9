"""A deserialized engine: that it keeps the graph's contract, what shapes it takes, and contexts to run it in."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from galerne.errors import BackendError, InputError
from galerne.files import read_file
from galerne.runtime.bundle import ENGINES, WEIGHTS, Bundle
from galerne.runtime.engines.owned import Owned
from galerne.runtime.engines.record import EngineRecord
from galerne.runtime.engines.tensorrt.checks import NETWORK
from galerne.runtime.engines.tensorrt.driver import Driver
from galerne.runtime.engines.tensorrt.library import Library
from galerne.runtime.engines.tensorrt.memory import DeviceMemory
from galerne.runtime.manifest import Manifest, cache_names, layer_kinds, write_index_names

IDS, POSITIONS, LOGIT_INDICES, LOGITS = "input_ids", "position_ids", "logit_indices", "logits"
# How much of streamed weights the GPU keeps, in the record's options; without it TensorRT chooses by the free memory.
_BUDGET = "weight_streaming_budget_bytes"


@dataclass(frozen=True)
class PlanProfile:
    """The shapes that one of the engine's profiles takes: fewest and most rows B, new tokens S and logits K."""

    index: int
    batch: tuple[int, int]
    tokens: tuple[int, int]
    logits: tuple[int, int]

    def takes(self, batch: int, tokens: int) -> bool:
        """Whether it takes a run of so many rows and tokens."""
        return self.batch[0] <= batch <= self.batch[1] and self.tokens[0] <= tokens <= self.tokens[1]


class Plan:
    """An engine that TensorRT has loaded.

    past, present: the rings' names, in the order of the contract.
    ring_dtype: of keys and values; uint16 stands for bfloat16, which NumPy lacks.
    ring_shapes: of one row, [num_key_value_heads, C, head_dim] for each ring.
    index_dtypes: of the small inputs, by name.
    in_place: whether present may lie where past lies. If not, each run reads one set of rings and writes another.
    """

    def __init__(
        self, library: Library, runtime: Any, engine: Any, driver: Driver, where: Path, manifest: Manifest
    ) -> None:
        self.library, self.driver, self.where = library, driver, where
        self.vocab_size = manifest.model.vocab_size
        self._shared: DeviceMemory | None = None
        self._configs: dict[bool, Owned[Any]] = {}
        self._kernels: Owned[Any] | None = None
        # Python lets go of them in this order, and TensorRT wants the engine gone before its runtime.
        self._engine, self._runtime = Owned(engine), Owned(runtime)
        kinds = layer_kinds(manifest.model.layer_windows)[1]
        self.past, self.present = (cache_names(prefix, len(kinds)) for prefix in ("past_key_values", "present"))
        self.starts = write_index_names(len(manifest.graph.capacities))
        self._check_names()
        self.ring_dtype = self._dtype(self.past[0])
        self.index_dtypes = {name: self._dtype(name) for name in (IDS, POSITIONS, *self.starts, LOGIT_INDICES)}
        if self._dtype(LOGITS) != np.float32:
            raise self._error(f"{LOGITS}: expected float32, found {self._dtype(LOGITS)}")
        facts = manifest.model
        self.ring_shapes = [
            (facts.num_key_value_heads, manifest.graph.capacities[kinds[i // 2]], facts.head_dim)
            for i in range(len(self.past))
        ]
        for name, expected in zip(self.past, self.ring_shapes, strict=True):
            found = tuple(engine.get_tensor_shape(name))[1:]
            if found != expected:
                raise self._error(f"{name}: expected rows of {list(expected)}, found {list(found)}")
        self.profiles = [self._profile(i) for i in range(engine.num_optimization_profiles)]
        alias = getattr(engine, "get_aliased_input_tensor", None)  # TensorRT has it since it has TensorScatter
        pairs = list(zip(self.past, self.present, strict=True))
        self.in_place = alias is not None and all(alias(present) == past for past, present in pairs)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The small inputs, in the contract's order."""
        return tuple(self.index_dtypes)

    def new_context(self, profile: PlanProfile, stream: int, *, one_shape: bool = False) -> Owned[Any]:
        """Return a context of a profile. All contexts compute in the same memory: only one may run at a time.

        Args:
            one_shape: whether it will run a single shape only.
        """
        trt, engine = self.library.module, self._engine.value
        by_caller = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = engine.create_execution_context(self._runtime_config(by_caller, one_shape))
        if context is None:
            raise BackendError(f"{self.where}: {self.library.name} gave no context: {self.library.cause()}")
        size = int(engine.device_memory_size_v2)
        if size:
            if self._shared is None:
                self._shared = DeviceMemory(self.driver, size)
            context.set_device_memory(self._shared.address, size)
        if not context.set_optimization_profile_async(profile.index, stream):
            raise BackendError(
                f"{self.where}: {self.library.name} refused profile {profile.index}: {self.library.cause()}"
            )
        self.driver.synchronize(stream)
        return Owned(context)

    def close(self) -> None:
        """Let go of the engine. Its contexts must be gone."""
        self._configs, self._kernels = {}, None
        self._engine, self._runtime = Owned(None), Owned(None)
        if self._shared is not None:
            self._shared.close()

    def _runtime_config(self, strategy: Any, one_shape: bool) -> Any:
        """Return what a context is made with. TensorRT-RTX compiles kernels for it, which all contexts of a plan share."""
        engine, trt = self._engine.value, self.library.module
        if not hasattr(engine, "create_runtime_config"):
            return strategy
        if one_shape not in self._configs:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if hasattr(config, "create_runtime_cache"):
                if self._kernels is None:
                    self._kernels = Owned(config.create_runtime_cache())
                config.set_runtime_cache(self._kernels.value)
            if one_shape and hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
                # At once, and not beside the first runs: a graph keeps the kernels that it was recorded with.
                eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                config.dynamic_shapes_kernel_specialization_strategy = eager
            self._configs[one_shape] = Owned(config)
        return self._configs[one_shape].value

    def _check_names(self) -> None:
        names = [self._engine.value.get_tensor_name(i) for i in range(self._engine.value.num_io_tensors)]
        expected = {IDS, POSITIONS, *self.starts, LOGIT_INDICES, LOGITS, *self.past, *self.present}
        if set(names) != expected:
            odd = sorted(expected.symmetric_difference(names))
            raise self._error(f"its inputs and outputs are not the graph's: {', '.join(odd[:3])}")

    def _profile(self, index: int) -> PlanProfile:
        def bounds(name: str) -> list[tuple[int, ...]]:
            low, _, high = self._engine.value.get_tensor_profile_shape(name, index)
            return [tuple(low), tuple(high)]

        (low, high), (fewest, most) = bounds(IDS), bounds(LOGIT_INDICES)
        return PlanProfile(index, (low[0], high[0]), (low[1], high[1]), (fewest[1], most[1]))

    def _dtype(self, name: str) -> np.dtype[Any]:
        kinds = self.library.module.DataType
        types = {
            kinds.FLOAT: np.float32,
            kinds.HALF: np.float16,
            kinds.BF16: np.uint16,
            kinds.INT32: np.int32,
            kinds.INT64: np.int64,
        }
        kind = self._engine.value.get_tensor_dtype(name)
        if kind not in types:
            raise self._error(f"{name}: this version of Galerne does not know its type {kind}")
        return np.dtype(types[kind])

    def _error(self, what: str) -> InputError:
        return InputError(f"{self.where}: {what}; build it again with this version of Galerne and --force")


def load_plan(bundle: Bundle, record: EngineRecord, path: Path, library: Library, driver: Driver) -> Plan:
    """Load an engine that passed its checks; a stripped one gets its weights from the bundle, a streamed one its budget.

    Raises: BackendError if the library refuses it, or the memory does not suffice; InputError if it is not of the contract.
    """
    runtime = library.module.Runtime(library.log)
    if record.version_compatible and library.module.__name__ == "tensorrt":
        # Such an engine brings a part of TensorRT of the version that built it. Its bytes are those of the manifest.
        runtime.engine_host_code_allowed = True
    library.check_header(runtime, path)
    engine = library.deserialize(runtime, path)
    if record.weights == "stripped":
        _refit(bundle, record, engine, path, library)
    if record.weights == "streamed":
        _set_budget(record, engine, path)
    return Plan(library, runtime, engine, driver, path, bundle.manifest)


def _refit(bundle: Bundle, record: EngineRecord, engine: Any, path: Path, library: Library) -> None:
    """Give a stripped engine its weights: TensorRT reads the lowered graph itself, and weights.bin as that graph's data."""
    trt = library.module
    network = bundle.file(f"{ENGINES}/{record.target}/{NETWORK}")
    beside = bundle.file(WEIGHTS).with_name(NETWORK)  # where the graph's data is looked for
    refitter = trt.Refitter(engine, library.log)
    parser = trt.OnnxParserRefitter(refitter, library.log)
    if not parser.refit_from_bytes(read_file(network), str(beside)):
        raise BackendError(f"{path}: {library.name} cannot refit it from {network}: {library.cause()}")
    missing: Sequence[str] = refitter.get_missing_weights()
    if missing:
        raise BackendError(
            f"{path}: {network} lacks {len(missing)} of its weights, such as {missing[0]}; build it again"
        )
    if not refitter.refit_cuda_engine():
        raise BackendError(f"{path}: {library.name} cannot refit it: {library.cause()}")


def _set_budget(record: EngineRecord, engine: Any, path: Path) -> None:
    budget = record.options.get(_BUDGET)
    engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget() if budget is None else budget
    if budget is not None and engine.weight_streaming_budget_v2 != min(budget, engine.streamable_weights_size):
        raise BackendError(f"{path}: TensorRT refused a weight streaming budget of {budget} bytes")
