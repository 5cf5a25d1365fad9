"""The portable graph as TensorRT-RTX takes it: a static ring, an additive mask, attention that may be decomposed.

It changes a graph in memory only; what is in `model.onnx` stays as it is.
"""

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from galerne.optimize.lower.table import words_for_bytes

# Far below any score, yet with room in float16 for a score to be added without reaching minus infinity, which a tile of
# the attention kernel that sees no key at all would turn into NaN. In float32, exp of it is exactly 0.
HIDDEN = -30000.0

_PAST, _SLOTS_AXIS, _MASK_INPUT = "past_key_values.", 2, 3
_ADDITIVE, _SEEN, _HIDDEN = "/additive", "/lower/mask/seen", "/lower/mask/hidden"
_NUMBERS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def lower(model: onnx.ModelProto, capacities: Sequence[int], compute_type: str) -> dict[str, Any]:
    """Rewrite a graph in place for TensorRT-RTX.

    Args:
        model: the portable graph, with or without its external data.
        capacities: for each layer the ring's full size C in slots.
        compute_type: of the attention, as the manifest names it.
    Returns: the names of what was done, for the engine's record.
    """
    done: dict[str, Any] = {}
    _fix_rings(model.graph, capacities)
    if _add_mask(model.graph, compute_type):
        done["mask"] = "additive"
    if words_for_bytes(model.graph):
        done["table"] = "words"
    if _allow_decomposing(model.graph):
        done["attention"] = "decomposable"
    return done


def _fix_rings(graph: onnx.GraphProto, capacities: Sequence[int]) -> None:
    """Make C static, which TensorScatter demands when it is parsed."""
    sizes = {
        value.type.tensor_type.shape.dim[_SLOTS_AXIS].dim_param: capacities[int(value.name.split(".")[1])]
        for value in graph.input
        if value.name.startswith(_PAST)
    }
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def _add_mask(graph: onnx.GraphProto, compute_type: str) -> bool:
    """Turn each attention's bool mask, true where a key is seen, into a float one that is added to the scores.

    With a bool mask and a dynamic S, TensorRT-RTX 1.7 fails to compile two or more layers where it pads the attention
    ("Graph contains more than one op named …_iota"): at S up to 32 with heads of 64, up to 64 with heads of 128 or in
    bfloat16. With an additive mask it compiles all of them.
    """
    readers = [node for node in graph.node if node.op_type == "Attention" and len(node.input) > _MASK_INPUT]
    masks = {node.input[_MASK_INPUT] for node in readers}
    for node in readers:
        node.input[_MASK_INPUT] += _ADDITIVE
    number = _NUMBERS[compute_type]
    for name, value in ((_SEEN, 0.0), (_HIDDEN, HIDDEN)):
        graph.initializer.append(helper.make_tensor(name, number, [], [value]))
    # Backwards, so that an insertion does not move what is still to come.
    for i in reversed(range(len(graph.node))):
        for mask in masks.intersection(graph.node[i].output):
            name = mask + _ADDITIVE
            graph.node.insert(i + 1, helper.make_node("Where", [mask, _SEEN, _HIDDEN], [name], name=name))
    return bool(masks)


def _allow_decomposing(graph: onnx.GraphProto) -> bool:
    """Let TensorRT build attention from basic kernels where it has no dedicated one: float32, or fewer than four heads.

    Without this such a graph is refused; one that has a dedicated kernel gives an engine of the same size either way.
    """
    found = [node for node in graph.node if node.op_type == "Attention"]
    for node in found:
        node.attribute.append(helper.make_attribute("TRT_decomposable", 1))
    return bool(found)
