"""The engine for ONNX Runtime's CUDA provider: the graph lowered for it, over the bundle's own weights. It needs no GPU."""

from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from galerne.errors import InputError
from galerne.optimize.check import check_graph
from galerne.optimize.lower.device_slots import device_slots
from galerne.optimize.lower.group_heads import group_heads
from galerne.optimize.lower.narrow import narrow
from galerne.optimize.lower.short_blocks import short_blocks
from galerne.optimize.lower.skip_norms import skip_norms
from galerne.optimize.lower.spell_attention import spell_attention
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.ort_cuda import ENGINE_GRAPH
from galerne.runtime.engines.record import SCHEMA_VERSION, EngineRecord, inputs_of, parity_of
from galerne.targets.target import Stack, Target


def build_ort_cuda(bundle: Bundle, target: Target, stack: Stack, folder: Path) -> EngineRecord:
    """Build the engine into `folder`, which exists and is empty.

    Raises: InputError if the bundle has a type that the stack does not take, or adapter slots.
    """
    facts = bundle.manifest.model
    check_graph(bundle, target, stack)
    if bundle.manifest.graph.adapter_slots:
        raise InputError(
            f"{bundle.path}: {stack.name} of {target.name} takes no adapter slots; export without --adapter-slots, or run "
            "this bundle with `--engine cuda`"
        )
    model = ir.load(bundle.file(GRAPH))
    group_heads(model, facts.num_attention_heads, facts.num_key_value_heads, facts.head_dim)
    spell_attention(model, facts.head_dim)
    narrow(model)
    skip_norms(model)
    short_blocks(model)
    device_slots(model)
    ir.save(model, folder / ENGINE_GRAPH)
    return EngineRecord(
        schema_version=SCHEMA_VERSION,
        target=target.name,
        backend=stack.backend,
        backend_version=ort.__version__,
        file=ENGINE_GRAPH,
        compute_capability=None,
        cpu_features=None,
        profiles=(),
        inputs=inputs_of(bundle, (GRAPH, WEIGHTS)),
        parity=parity_of(bundle),
        options={
            "lowerings": ["group_heads", "spell_attention", "narrow", "skip_norms", "short_blocks", "device_slots"]
        },
        stack=stack.name,
    )
