"""`fake_tensorrt`: a stand-in for the `tensorrt` package, which builds on a GPU only, in any of its versions.

Networks, parser and kernels are TensorRT-RTX's own, so what is parsed and built is real. Made up are what a version of TensorRT
has and lacks (by the tags v10.3.0 to v11.1 of NVIDIA/TensorRT) and the timing cache, which TensorRT-RTX has no use for.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType
from typing import Any

import pytest

from galerne.optimize.builders.tensorrt import compile as compiler

STAND_IN = "SM86"  # what TensorRT-RTX builds for, whatever the plan's own is


@dataclass
class Told:
    """What the builder was told, for a test to look at."""

    network_flags: list[int] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    hardware_compatibility: str = "NONE"
    measured: list[str] = field(default_factory=list)
    streamed: bool = False


class TimingCache:
    """Of the form `version|layer|layer`; a layer here is a whole profile."""

    def __init__(self, version: str, data: bytes) -> None:
        header, *layers = data.decode().split("|") if data else [version]
        self.matches, self.layers, self._header = header == version, layers, version

    def serialize(self) -> bytearray:
        return bytearray("|".join([self._header, *self.layers]).encode())


class FakeConfig:
    def __init__(self, real: Any, rtx: ModuleType, version: str, told: Told) -> None:
        self.real, self._version, self._told = real, version, told
        told.flags, told.hardware_compatibility = set(), "NONE"
        self._cache: TimingCache | None = None
        self._layers: list[str] = []
        real.num_compute_capabilities = 1
        real.set_compute_capability(getattr(rtx.ComputeCapability, STAND_IN), 0)

    def set_flag(self, flag: IntEnum) -> None:
        self._told.flags.add(flag.name)

    @property
    def progress_monitor(self) -> Any:
        return self.real.progress_monitor

    @progress_monitor.setter
    def progress_monitor(self, monitor: Any) -> None:
        self.real.progress_monitor = monitor

    @property
    def hardware_compatibility_level(self) -> str:
        return self._told.hardware_compatibility

    @hardware_compatibility_level.setter
    def hardware_compatibility_level(self, level: IntEnum) -> None:
        self._told.hardware_compatibility = level.name

    def add_optimization_profile(self, profile: Any) -> int:
        sizes = repr([tuple(size) for size in profile.get_shape("input_ids")])
        self._layers.append(hashlib.sha256(sizes.encode()).hexdigest()[:8])
        return int(self.real.add_optimization_profile(profile))

    def create_timing_cache(self, data: bytes) -> TimingCache:
        return TimingCache(self._version, data)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if cache.matches or ignore_mismatch:
            self._cache = cache
        return cache.matches or ignore_mismatch

    def get_timing_cache(self) -> TimingCache | None:
        return self._cache

    def measure(self) -> bool:
        """Enter what is not in the cache, or fail on it. Returns: whether to go on."""
        missing = [layer for layer in self._layers if self._cache is None or layer not in self._cache.layers]
        if missing and "ERROR_ON_TIMING_CACHE_MISS" in self._told.flags:
            return False
        self._told.measured += missing
        if self._cache is not None:
            self._cache.layers += missing
        return True


class FakeBuilder:
    def __init__(self, log: Any, rtx: ModuleType, version: str, told: Told) -> None:
        self._real, self._rtx, self._log, self._version, self._told = rtx.Builder(log), rtx, log, version, told

    def create_network(self, flags: int) -> Any:
        self._told.network_flags.append(flags)
        return self._real.create_network(0)

    def create_optimization_profile(self) -> Any:
        return self._real.create_optimization_profile()

    def create_builder_config(self) -> FakeConfig:
        return FakeConfig(self._real.create_builder_config(), self._rtx, self._version, self._told)

    def build_serialized_network(self, network: Any, config: FakeConfig) -> Any:
        if not config.measure():
            self._log.log(self._rtx.ILogger.ERROR, "Error Code 2: a tactic is not in the timing cache")
            return None
        return self._real.build_serialized_network(network, config.real)


class StreamingBuilder(FakeBuilder):
    def build_serialized_network_to_stream(self, network: Any, config: FakeConfig, writer: Any) -> bool:
        self._told.streamed = True
        built = self.build_serialized_network(network, config)
        return built is not None and writer.write(memoryview(built)) > 0


@pytest.fixture
def fake_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Told]:
    """Return a function that installs a version of `tensorrt`, such as "10.3.0", and a GPU of a compute capability."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX's Python package is not installed")

    def install(version: str, gpu: str | None = "8.7") -> Told:
        module = _module(rtx, version)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(compiler, "compute_capability_here", lambda: gpu)
        told: Told = vars(module)["told"]
        return told

    return install


def _module(rtx: ModuleType, version: str) -> ModuleType:
    number = tuple(map(int, version.split(".")[:2]))
    module, told = ModuleType("tensorrt"), Told()
    flags = ["REFIT_IDENTICAL", "STRIP_PLAN", "WEIGHT_STREAMING", "VERSION_COMPATIBLE", "ERROR_ON_TIMING_CACHE_MISS"]
    levels = ["NONE", "AMPERE_PLUS"]
    builder: type[FakeBuilder] = FakeBuilder
    if number >= (10, 8):
        flags.append("EDITABLE_TIMING_CACHE")
    if number >= (10, 9):
        levels.append("SAME_COMPUTE_CAPABILITY")
    if number >= (10, 13):
        builder = StreamingBuilder
        vars(module)["IStreamWriter"] = rtx.IStreamWriter
    vars(module).update(
        __version__=version,
        told=told,
        ILogger=rtx.ILogger,
        IProgressMonitor=rtx.IProgressMonitor,
        OnnxParser=rtx.OnnxParser,
        Builder=lambda log: builder(log, rtx, version, told),
        BuilderFlag=IntEnum("BuilderFlag", flags, start=0),
        HardwareCompatibilityLevel=IntEnum("HardwareCompatibilityLevel", levels, start=0),
        NetworkDefinitionCreationFlag=IntEnum("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"], start=0),
    )
    return module
