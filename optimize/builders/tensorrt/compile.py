"""Makes an engine of a plan: `network.onnx`, `weights.bin` and `build.json` in, `engine.plan` and its record out.

It needs TensorRT or TensorRT-RTX and neither onnx nor Python 3.11, so that a box without them can build. TensorRT-RTX needs no
GPU: such a build proves that the target takes the graph, not that the engine runs or is right.
"""

import logging
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from galerne.errors import BackendError, InputError
from galerne.files import read_file, sha256_file
from galerne.optimize.builders.tensorrt import hooks
from galerne.optimize.builders.tensorrt.build_plan import BuildPlan
from galerne.optimize.builders.tensorrt.explain import build_failure, parse_error
from galerne.optimize.builders.tensorrt.library import (
    Library,
    compute_capability_here,
    import_library,
    is_version,
)
from galerne.progress import Task
from galerne.runtime.bundle import WEIGHTS
from galerne.runtime.engines.record import SCHEMA_VERSION, EngineRecord, Profile
from galerne.runtime.engines.tensorrt.package import NAMES, hooked

logger = logging.getLogger(__name__)

ENGINE, TIMING_CACHE = "engine.plan", "timing.cache"


@dataclass(frozen=True)
class Timings:
    """What TensorRT measured in an earlier build. It chooses by measuring, so only with these does a rebuild give the same.

    cache: empty where there was no earlier build.
    locked: fail where it lacks what this build needs, rather than measure.
    """

    cache: bytes = b""
    locked: bool = False


def compile_plan(
    plan: BuildPlan, network: Path, weights: Path, folder: Path, timings: Timings | None = None
) -> EngineRecord:
    """Build `engine.plan`, and `timing.cache` where TensorRT measures, into a folder.

    Args:
        network: the lowered graph that belongs to the plan.
        weights: the bundle's `weights.bin`; mapped, not read.
        folder: an existing folder, where only this build writes.
    Returns: the engine's record.
    Raises: InputError if the files do not belong together; BackendError if the builder is not installed or of another
        version, the GPU here is another, the graph is refused, or the build fails; KeyboardInterrupt after Ctrl-C.
    """
    if weights.name != WEIGHTS:
        raise InputError(f"{weights}: expected a file named {WEIGHTS}, as the graph calls it")
    if sha256_file(network) != plan.network_sha256:
        raise InputError(f"{network}: its SHA-256 is not the plan's; it belongs to another plan or was changed")
    _check_device(plan)
    library = import_library(plan.backend)
    if plan.version is not None and not is_version(library.version, plan.version):
        raise BackendError(
            f"--target {plan.target}: {plan.stack} has version {plan.version} of {plan.backend}, found {library.version}; "
            "choose another --stack, or install that version"
        )
    trt, log = library.module, hooks.log_of(library.module.ILogger)
    log.errors.clear()
    builder = _builder(library, log)
    graph = builder.create_network(library.network_flags)
    # The parser must outlive the build: the network refers to weights that it mapped.
    parser = trt.OnnxParser(graph, log)
    if not parser.parse(read_file(network), str(weights.with_name(network.name))):
        raise BackendError(f"{network}: {parse_error(parser, library.title)}")
    config = _configured(library, builder, plan)
    for profile in plan.profiles:
        config.add_optimization_profile(_shapes(builder, graph, profile))
    cache = None if library.ahead_of_time else _attach(library, config, timings or Timings(), plan)
    _build(library, builder, graph, config, folder / ENGINE, plan)
    if cache is not None:
        (folder / TIMING_CACHE).write_bytes(memoryview(config.get_timing_cache().serialize()))
    return _record(library, plan)


def _check_device(plan: BuildPlan) -> None:
    """Refuse what needs a GPU that is not here."""
    here, ahead_of_time = compute_capability_here(), plan.backend == "tensorrt_rtx"
    found = f"a GPU of {here}" if here else "no GPU with a driver"
    if ahead_of_time and plan.weights == "stripped" and here is None:
        raise BackendError(
            f"--strip: --target {plan.target}: TensorRT-RTX compiles on a GPU for this, found {found}; build without it"
        )
    if not ahead_of_time and here != plan.compute_capability:
        # Only a box fixes its builder's version.
        remedy = (
            "build on a machine with one" if plan.version is None else "make a package for the box: `galerne package`"
        )
        raise BackendError(
            f"--target {plan.target}: {NAMES[plan.backend]} builds for the GPU at hand only: expected one of compute capability "
            f"{plan.compute_capability}, found {found}; {remedy}"
        )


def _builder(library: Library, log: Any) -> Any:
    try:
        return library.module.Builder(log)
    except TypeError as exc:  # its binding got no object from TensorRT
        raise BackendError(f"{library.title} does not start here: {build_failure(log.errors)}") from exc


def _configured(library: Library, builder: Any, plan: BuildPlan) -> Any:
    trt, config = library.module, builder.create_builder_config()
    if library.ahead_of_time:
        config.num_compute_capabilities = 1
        config.set_compute_capability(library.capability(plan.compute_capability, plan.target), 0)
    if plan.weights == "streamed":
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if plan.weights == "stripped":
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if plan.hardware_compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, plan.hardware_compatibility.upper())
        config.hardware_compatibility_level = level
    if plan.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    return config


def _attach(library: Library, config: Any, timings: Timings, plan: BuildPlan) -> Any:
    """Give the build a timing cache. Returns: it, which must outlive the build."""
    trt = library.module
    # From TensorRT 10.8 on: the cache alone then decides, so that nothing is measured twice with another outcome.
    if hasattr(trt.BuilderFlag, "EDITABLE_TIMING_CACHE"):
        config.set_flag(trt.BuilderFlag.EDITABLE_TIMING_CACHE)
    if timings.locked:
        config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
    cache = config.create_timing_cache(timings.cache)
    if cache is not None and config.set_timing_cache(cache, False):
        return cache
    reason = f"the timing cache is of another GPU or version than {library.title} here"
    if timings.locked:
        raise BackendError(f"--locked: --target {plan.target}: {reason}; build without --locked to make a new one")
    logger.warning("%s: %s; making a new one", plan.target, reason)
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    return cache


def _build(library: Library, builder: Any, graph: Any, config: Any, out: Path, plan: BuildPlan) -> None:
    trt, log = library.module, hooks.log_of(library.module.ILogger)
    with Task(f"building for {plan.target}", 1.0) as task, out.open("wb") as file:
        writer = hooks.Writer(file)
        monitor = hooked(hooks.Monitor, trt.IProgressMonitor, task)
        config.progress_monitor = monitor
        with monitor.cancelling_on_ctrl_c():
            if library.streams:
                writer = hooked(hooks.Writer, trt.IStreamWriter, file)
                built = builder.build_serialized_network_to_stream(graph, config, writer)
            else:
                # Older ones hand over the whole engine, which is then in memory once more than it need be.
                serialized = builder.build_serialized_network(graph, config)
                built = serialized is not None and writer.write(memoryview(serialized)) > 0
        if monitor.cancelled:
            raise KeyboardInterrupt
    if writer.error is not None:
        raise BackendError(f"{out}: cannot write the engine ({writer.error.strerror}); free some space")
    if not built:
        raise BackendError(f"--target {plan.target}: {library.title} failed to build: {build_failure(log.errors)}")


def _shapes(builder: Any, graph: Any, profile: Profile) -> Any:
    """Return TensorRT's form of a profile: [min, opt, max] of each input with a dynamic dimension."""
    shapes = builder.create_optimization_profile()
    for i in range(graph.num_inputs):
        tensor = graph.get_input(i)
        sizes = [_sized(tensor.name, tuple(tensor.shape), profile, step) for step in range(3)]
        shapes.set_shape(tensor.name, *sizes)
    return shapes


def _sized(name: str, shape: tuple[int, ...], profile: Profile, step: int) -> tuple[int, ...]:
    # By the contract axis 0 is B, and axis 1 of these two is S; the only other dynamic one is K of logit_indices.
    along = profile.tokens if name in ("input_ids", "position_ids") else profile.logits
    dynamic = (profile.batch[step], along[step])
    return tuple(size if size >= 0 else dynamic[axis] for axis, size in enumerate(shape))


def _record(library: Library, plan: BuildPlan) -> EngineRecord:
    return EngineRecord(
        schema_version=SCHEMA_VERSION,
        target=plan.target,
        backend=plan.backend,
        backend_version=library.version,
        file=ENGINE,
        compute_capability=plan.compute_capability,
        cpu_features=None,
        profiles=plan.profiles,
        inputs=plan.inputs,
        parity=plan.parity,
        options=plan.lowered,
        stack=plan.stack,
        hardware_compatibility=plan.hardware_compatibility,
        version_compatible=plan.version_compatible,
        weights=plan.weights,
        # TensorRT-RTX's engines run on Linux and Windows alike.
        platform=None if library.ahead_of_time else f"{sys.platform}-{platform.machine()}",
        cuda=plan.cuda or _cuda(plan.backend),
        timing_cache=None if library.ahead_of_time else TIMING_CACHE,
    )


def _cuda(backend: str) -> str | None:
    """Return the CUDA version that the installed package was made for, which is in its distribution's name: tensorrt-rtx-cu13."""
    found = [name.rpartition("cu")[2] for name in metadata.packages_distributions().get(backend, []) if "cu" in name]
    return next((digits for digits in found if digits.isdecimal()), None)
