"""Lowering for CUDA: norms and rotation read and write float16, and compute in float32 within their kernels.

The portable graph has a Cast before and after each, which a GPU runs as a kernel of its own: eight in a layer.
The rotation's cos and sin are float16 then, as transformers has them in a float16 model; their angles stay float32.
"""

import onnx_ir as ir

_HALF = ir.DataType.FLOAT16
# The inputs that have the type of the first.
_ALIKE = {"RMSNormalization": (1,), "RotaryEmbedding": (1, 2)}


def narrow(model: ir.Model) -> None:
    """Take the casts from float16 and back away around norms and rotations, in place."""
    graph = model.graph
    narrowed: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node.op_type in _ALIKE]:
        before, after = _cast_before(node), _casts_after(node)
        if before is None or not after:
            continue
        node.replace_input_with(0, before.inputs[0])
        node.outputs[0].dtype = _HALF
        for cast in after:
            ir.convenience.replace_all_uses_with(cast.outputs[0], node.outputs[0])
            graph.remove(cast, safe=True)
        if not before.outputs[0].uses():
            graph.remove(before, safe=True)
        for index in _ALIKE[node.op_type]:
            value = node.inputs[index]
            assert value is not None
            if value not in narrowed:
                narrowed[value] = _narrowed(graph, value)
            node.replace_input_with(index, narrowed[value])


def _cast_before(node: ir.Node) -> ir.Node | None:
    """Return the Cast from float16 that a node reads."""
    cast = None if node.inputs[0] is None else node.inputs[0].producer()
    if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None:
        return None
    return cast if cast.inputs[0].dtype == _HALF else None


def _casts_after(node: ir.Node) -> list[ir.Node]:
    """Return the Casts to float16 that read a node, none if anything else does too."""
    users = [user for user, _ in node.outputs[0].uses()]
    if any(user.op_type != "Cast" or user.attributes["to"].as_int() != _HALF.value for user in users):
        return []
    return users


def _narrowed(graph: ir.Graph, value: ir.Value) -> ir.Value:
    cast = ir.node("Cast", [value], {"to": _HALF.value}, name=f"{value.name}/narrow/Cast")
    cast.outputs[0].name, cast.outputs[0].dtype = f"{cast.name}_output_0", _HALF
    producer = value.producer()
    if producer is None:  # a weight: ONNX Runtime casts it once, at loading
        graph.insert_before(graph[0], cast)
    else:
        graph.insert_after(producer, cast)
    return cast.outputs[0]
