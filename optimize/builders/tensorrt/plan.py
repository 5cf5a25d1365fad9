"""Plans an engine: refuses what the target cannot take, lowers the graph, and says what `compile` is to build of it."""

import hashlib
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from galerne.errors import InputError
from galerne.optimize.builders.tensorrt.build_plan import NETWORK, PLAN, SCHEMA_VERSION, BuildPlan
from galerne.optimize.builders.tensorrt.options import Options, check_options, profiles
from galerne.optimize.check import check_cache, check_graph
from galerne.optimize.lower.tensorrt import lower
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.record import inputs_of, parity_of
from galerne.runtime.manifest import layer_kinds
from galerne.targets.target import Stack, Target


def plan(bundle: Bundle, target: Target, stack: Stack, folder: Path, options: Options | None = None) -> BuildPlan:
    """Check a bundle against a target and write `network.onnx` and `build.json` into a folder.

    The ring has its full size C. The profiles are `decode` for one token, `prefill` for up to a chunk, with logits for one token
    or for any number of them, and on request `draft`.

    Args:
        folder: an existing one. With the bundle's `weights.bin`, its two files are all that `compile_plan` needs.
    Raises: InputError if the target or the stack lacks a type, an operator or an option, or the graph has adapter slots or
        rounded rings.
    """
    options = options or Options()
    if (stack.backend != "tensorrt" and stack.backend != "tensorrt_rtx") or target.compute_capability is None:
        raise InputError(f"--target {target.name}: {stack.backend} takes no build plan; choose a stack of TensorRT")
    if bundle.manifest.graph.adapter_slots:
        raise InputError(
            f"{bundle.path}: has adapter slots, which the {stack.backend} builder does not take; merge the adapter instead: "
            "`galerne export --adapter`"
        )
    check_cache(bundle, target, stack)
    check_options(options, target, stack)
    try:
        model = onnx.load(str(bundle.file(GRAPH)), load_external_data=False)
    except DecodeError as exc:
        raise InputError(f"{bundle.file(GRAPH)}: not an ONNX graph ({exc}); export the bundle again") from exc
    check_graph(bundle, target, stack)
    facts = bundle.manifest.graph
    _, kinds = layer_kinds(bundle.manifest.model.layer_windows)
    lowered: dict[str, Any] = {"capacities": list(facts.capacities)}
    lowered |= lower(model, [facts.capacities[kind] for kind in kinds], facts.compute_type)
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
