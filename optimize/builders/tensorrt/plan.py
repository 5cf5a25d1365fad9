"""Plans an engine: refuses what the target cannot take, lowers the graph, and says what `compile` is to build of it."""

import hashlib
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from galerne.errors import InputError
from galerne.optimize.builders.tensorrt.build_plan import NETWORK, PLAN, SCHEMA_VERSION, BuildPlan
from galerne.optimize.builders.tensorrt.options import Options, check_options, profiles
from galerne.optimize.check import check
from galerne.optimize.lower.tensorrt import lower
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.record import inputs_of, parity_of
from galerne.runtime.manifest import layer_kinds
from galerne.targets.target import Stack, Target, load_all

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


def plan(bundle: Bundle, target: Target, stack: Stack, folder: Path, options: Options | None = None) -> BuildPlan:
    """Check a bundle against a target and write `network.onnx` and `build.json` into a folder.

    The ring has its full size C. The profiles are `decode` for one token, `prefill` for up to a chunk, with logits for one token
    or for any number of them, and on request `draft`.

    Args:
        folder: an existing one. With the bundle's `weights.bin`, its two files are all that `compile_plan` needs.
    Raises: InputError if the target or the stack lacks a type, an operator or an option, or the graph has adapter slots.
    """
    options = options or Options()
    if stack.backend == "onnxruntime" or target.compute_capability is None:
        raise InputError(f"--target {target.name}: {stack.backend} takes no build plan; choose a target with a GPU")
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
    check_options(options, target, stack)
    _check_operators(bundle, target, stack)
    facts = bundle.manifest.graph
    _, kinds = layer_kinds(bundle.manifest.model.layer_windows)
    lowered = lower(model, [facts.capacities[kind] for kind in kinds], facts.compute_type)
    network = model.SerializeToString(deterministic=True)
    made = BuildPlan(
        schema_version=SCHEMA_VERSION,
        target=target.name,
        title=target.title,
        stack=stack.name,
        backend=stack.backend,
        # Ahead of time and on a machine with the same GPU the version is the builder's own affair; a box has just one.
        version=stack.version if stack.builds_on == "device" else None,
        compute_capability=target.compute_capability,
        cuda=stack.cuda,
        network_sha256=hashlib.sha256(network).hexdigest(),
        inputs=inputs_of(bundle, (GRAPH, WEIGHTS)),
        parity=parity_of(bundle),
        profiles=profiles(options, facts.chunk, stack.backend),
        lowered=lowered,
        weights=options.weights,
        hardware_compatibility=options.hardware_compatibility,
        version_compatible=options.version_compatible,
    )
    (folder / NETWORK).write_bytes(network)
    (folder / PLAN).write_bytes(made.to_json())
    return made


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
                f"export with --precision {' or '.join(precisions)}"
                + (f", or choose among {', '.join(others)}" if others else "")
            )


def _check_operators(bundle: Bundle, target: Target, stack: Stack) -> None:
    """Refuse a graph that the stack's parser does not read, before anything is built."""
    dialect = bundle.manifest.graph.dialect
    if stack.dialect == "primitive" != dialect:
        raise InputError(
            f"{bundle.path}: is of dialect {dialect}, and {stack.name} of {target.name} reads primitive only; "
            "export with --dialect primitive"
        )
    refusals = check(bundle.file(GRAPH), target, stack)
    if refusals:
        more = f", and {len(refusals) - 1} more" if len(refusals) > 1 else ""
        raise InputError(
            f"{bundle.path}: {stack.name} of {target.name} does not take {refusals[0].line}{more}; "
            f"see `galerne check --target {target.name}`"
        )
