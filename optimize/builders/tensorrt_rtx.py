"""Builds an engine with TensorRT-RTX, ahead of time.

It needs no GPU: a build proves that the target takes the graph, not that the engine runs or is right.
"""

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from galerne.errors import BackendError, InputError
from galerne.optimize.lower.tensorrt import lower
from galerne.progress import Task
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.record import SCHEMA_VERSION, EngineRecord, Profile, inputs_of, parity_of
from galerne.runtime.manifest import layer_kinds
from galerne.targets.target import Stack, Target, load_all

logger = logging.getLogger(__name__)

ENGINE = "engine.plan"

Validity = Literal["valid", "suboptimal", "unknown"]

_TYPES = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT4E2M1: "fp4",
}
_PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class EngineFile:
    """What an engine file shows without being run.

    size: in bytes.
    validity: on this machine's GPU; "unknown" where there is none, since only the header's form was checked.
    """

    size: int
    validity: Validity


def build_tensorrt_rtx(bundle: Bundle, target: Target, stack: Stack, folder: Path) -> EngineRecord:
    """Build the bundle's graph for a target and write `engine.plan` into a folder.

    Two profiles, each for one sequence (B = 1, K = 1): `decode` for one token and `prefill` for 1 to `chunk` tokens.
    The ring has its full size.

    Args:
        folder: an existing folder, where only this build writes. The caller adds the record and enters both.
    Returns: the engine's record.
    Raises: InputError if the target lacks a type that the graph uses, or the graph has adapter slots; BackendError if
        TensorRT-RTX is not installed, does not build for the target, refuses a node, or fails.
    """
    if bundle.manifest.graph.adapter_slots:
        raise InputError(
            f"{bundle.path}: has adapter slots, which the {stack.backend} builder does not take; merge the adapter instead: "
            "`galerne export --adapter`"
        )
    try:
        model = onnx.load(str(bundle.file(GRAPH)), load_external_data=False)
    except DecodeError as exc:
        raise InputError(f"{bundle.file(GRAPH)}: not an ONNX graph ({exc}); export the bundle again") from exc
    _check_types(model, bundle, target, stack)
    trt = _import()
    hooks = importlib.import_module("galerne.optimize.builders.tensorrt_hooks")
    capability = _capability(trt, target)
    facts = bundle.manifest.graph
    _, kinds = layer_kinds(bundle.manifest.model.layer_windows)
    options = lower(model, [facts.capacities[kind] for kind in kinds], facts.compute_type)
    profiles = [Profile("decode", (1, 1, 1), (1, 1, 1))]
    if facts.chunk > 1:
        profiles.append(Profile("prefill", (1, 1, 1), (1, facts.chunk, facts.chunk)))

    log = hooks.LOG
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    # The parser must outlive the build: the network refers to weights that it mapped.
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString(), str(bundle.file(GRAPH))):
        raise BackendError(f"{bundle.file(GRAPH)}: {_parser_error(parser, hooks)}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)
    for profile in profiles:
        config.add_optimization_profile(_shapes(builder, network, profile))

    with Task(f"building for {target.name}", 1.0) as task, (folder / ENGINE).open("wb") as file:
        writer, monitor = hooks.Writer(file), hooks.Monitor(task)
        config.progress_monitor = monitor
        with monitor.cancelling_on_ctrl_c():
            built = builder.build_serialized_network_to_stream(network, config, writer)
        if monitor.cancelled:
            raise KeyboardInterrupt
    if writer.error is not None:
        raise BackendError(f"{folder / ENGINE}: cannot write the engine ({writer.error.strerror}); free some space")
    if not built:
        raise BackendError(f"{bundle.file(GRAPH)}: TensorRT-RTX failed to build for {target.name}: {_cause(log)}")
    size = inspect_engine(folder / ENGINE).size
    logger.debug("built %s for %s, %d bytes", folder / ENGINE, target.name, size)
    return EngineRecord(
        schema_version=SCHEMA_VERSION,
        target=target.name,
        backend="tensorrt_rtx",
        backend_version=trt.__version__,
        file=ENGINE,
        compute_capability=target.compute_capability,
        cpu_features=None,
        profiles=tuple(profiles),
        inputs=inputs_of(bundle, (GRAPH, WEIGHTS)),
        parity=parity_of(bundle),
        options=options,
        stack=stack.name,
    )


def inspect_engine(path: Path) -> EngineFile:
    """Look at an engine file as far as this machine allows; without a GPU that is its header.

    Raises: BackendError if it is no engine, was built by another version, or does not run on this machine's GPU;
        InputError if there is no such file.
    """
    trt = _import()
    hooks = importlib.import_module("galerne.optimize.builders.tensorrt_hooks")
    if not path.is_file():
        raise InputError(f"{path}: no such engine file; build it with `galerne build`")
    runtime = trt.Runtime(hooks.LOG)
    with path.open("rb") as file:
        validity, found = runtime.get_engine_validity(file.read(runtime.engine_header_size))
    reasons = [name for name, flag in trt.EngineInvalidityDiagnostics.__members__.items() if found & int(flag)]
    # Without a driver the answer is "invalid" and no reason, or a CUDA error, which says nothing about the file.
    if validity == trt.EngineValidity.INVALID and reasons not in ([], ["CUDA_ERROR"]):
        raise BackendError(
            f"{path}: TensorRT-RTX {trt.__version__} does not take this engine ({', '.join(reasons).lower()}); "
            "build it again with --force"
        )
    names: dict[Any, Validity] = {trt.EngineValidity.VALID: "valid", trt.EngineValidity.SUBOPTIMAL: "suboptimal"}
    return EngineFile(path.stat().st_size, names.get(validity, "unknown"))


def _check_types(model: onnx.ModelProto, bundle: Bundle, target: Target, stack: Stack) -> None:
    used = {_TYPES[tensor.data_type] for tensor in model.graph.initializer if tensor.data_type in _TYPES}
    # A norm's weights are float32 in every graph, and every GPU takes those; what a MatMul takes is the compute type.
    for name in sorted(used - {"float32"} | {bundle.manifest.graph.compute_type}):
        if name not in stack.types:
            others = [
                other.name
                for other in load_all()
                if any(s.backend == stack.backend and name in s.types for s in other.stacks)
            ]
            precisions = [precision for kind, precision in _PRECISIONS.items() if kind in stack.types]
            raise InputError(
                f"{bundle.path}: the graph uses {name}, which {target.name} lacks; it takes {', '.join(stack.types)}: "
                f"export with --precision {' or '.join(precisions)}, or choose among {', '.join(others)}"
            )


def _import() -> ModuleType:
    try:
        return importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError) as exc:
        raise BackendError(f"TensorRT-RTX cannot be imported ({exc}); install galerne[rtx]") from exc


def _capability(trt: ModuleType, target: Target) -> Any:
    known = {
        name.removeprefix("SM"): value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"
    }
    found = (target.compute_capability or "").replace(".", "")
    if found not in known:
        builds = ", ".join(f"{name[:-1]}.{name[-1]}" for name in known)
        raise BackendError(
            f"--target {target.name}: TensorRT-RTX {trt.__version__} builds for compute capability {builds}, "
            f"found {target.compute_capability}; choose another target, see `galerne targets`"
        )
    return known[found]


def _shapes(builder: Any, network: Any, profile: Profile) -> Any:
    """Return TensorRT's form of a profile: [min, opt, max] of each input with a dynamic dimension."""
    shapes = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        sizes = [_sized(tensor.name, tuple(tensor.shape), profile, step) for step in range(3)]
        shapes.set_shape(tensor.name, *sizes)
    return shapes


def _sized(name: str, shape: tuple[int, ...], profile: Profile, step: int) -> tuple[int, ...]:
    # By the contract axis 0 is B, and axis 1 of these two is S; the only other dynamic one is K of logit_indices.
    tokens = profile.tokens[step] if name in ("input_ids", "position_ids") else 1
    dynamic = (profile.batch[step], tokens)
    return tuple(size if size >= 0 else dynamic[axis] for axis, size in enumerate(shape))


def _parser_error(parser: Any, hooks: ModuleType) -> str:
    error = parser.get_error(0)
    node, operator = error.node_name() or f"node {error.node()}", error.node_operator() or "?"
    return (
        f"TensorRT-RTX cannot parse {node} ({operator}): {hooks.one_line(error.desc())}; export with another --dialect"
    )


def _cause(log: Any) -> str:
    # Without a GPU, TensorRT ends each failure with an error about the driver, so the last that says otherwise counts.
    causes = [error for error in log.errors if "CUDA driver version is insufficient" not in error] or log.errors
    return causes[-1] if causes else "it gave no reason"
