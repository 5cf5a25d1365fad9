"""Rounds keys and values as they enter the rings: QuantizeLinear before the ring's update, DequantizeLinear after it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from galerne.optimize.quantize.qdq import drop_unused_cast, new_constant, new_node
from galerne.runtime.manifest import CacheType, cache_names

# Where each way of updating a ring reads what is new: the dialects have one each.
_NEW = {"TensorScatter": 1, "ScatterND": 2}


@dataclass(frozen=True)
class CacheScales:
    """What a layer's keys and values are rounded to: value = round(x / scale), clipped to what the type holds; zero point 0."""

    kind: CacheType
    key: float
    value: float


def round_cache(graph: ir.Graph, scales: Mapping[int, CacheScales]) -> None:
    """Make the rings of some layers int8, in place.

    Attention reads what the ring holds, the newest tokens included, so that how a text is cut into runs changes nothing. Scales
    are float32, and so is what DequantizeLinear gives; a Cast to the type that the graph computes in follows where it is another.

    Args:
        scales: by the layer's number.
    """
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    count = len(cache_names("present", max(scales, default=-1) + 1)) // 2
    past, present = (cache_names(prefix, count) for prefix in ("past_key_values", "present"))
    for layer, own in scales.items():
        for part, scale in enumerate((own.key, own.value)):
            index, kind = 2 * layer + part, "kv"[part]
            name = f"model.layers.{layer}.self_attn.{kind}"
            _round_ring(graph, inputs[past[index]], outputs[present[index]], name, scale)


def _round_ring(graph: ir.Graph, past: ir.Value, present: ir.Value, name: str, scale: float) -> None:
    """Round one ring. `name`: what its initializers are called after."""
    update, compute = present.producer(), past.dtype
    assert update is not None and compute is not None and update.name is not None
    new = update.inputs[_NEW[update.op_type]]
    assert new is not None
    step = new_constant(graph, f"{name}_scale", np.array(scale, np.float32))
    zero = new_constant(graph, f"{name}_zero_point", np.array(0, np.int8))
    before: list[ir.Node] = []
    cast, x = new.producer(), new
    if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None:
        x = cast.inputs[0]  # keys as the rotation leaves them, in float32
    elif new.dtype != ir.DataType.FLOAT:
        before.append(new_node("Cast", [x], {"to": ir.DataType.FLOAT.value}, f"{update.name}/Cast", ir.DataType.FLOAT))
        x = before[0].outputs[0]
    before.append(new_node("QuantizeLinear", [x, step, zero], {}, f"{update.name}/QuantizeLinear", ir.DataType.INT8))
    graph.insert_before(update, before)
    update.replace_input_with(_NEW[update.op_type], before[-1].outputs[0])
    drop_unused_cast(graph, new)
    readers = tuple(present.uses())
    after = [
        new_node("DequantizeLinear", [present, step, zero], {}, f"{update.name}/DequantizeLinear", ir.DataType.FLOAT)
    ]
    if compute != ir.DataType.FLOAT:
        to = {"to": compute.value}
        after.append(new_node("Cast", [after[0].outputs[0]], to, f"{update.name}/DequantizeLinear/Cast", compute))
    graph.insert_after(update, after)
    for reader, index in readers:
        reader.replace_input_with(index, after[-1].outputs[0])
    for ring in (past, present):
        ring.type = ir.TensorType(ir.DataType.INT8)
