"""Lowering for CPUs: compute in float32, since their kernels are made for it, and store as before.

Measured on two AVX-512 cores, 1.1 B weights at int4: the whole `cpu` engine, of which this is a part, decodes at
1.2 to 1.4 times the rate of the portable graph.
"""

import onnx_ir as ir

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOAT = ir.DataType.FLOAT


def widen(model: ir.Model) -> None:
    """Make a float16 or bfloat16 graph compute in float32, in place.

    Stored tensors keep their type and are cast where they are read: tables after the rows are picked, so that they are never
    widened whole; the rest, and the casts to float32 that are void now, ONNX Runtime folds. The ring becomes float32.
    """
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype in _NARROW:
            value.dtype = _FLOAT
    for node in list(graph):
        if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) in _NARROW:
            source = node.inputs[0]
            assert source is not None
            if source.dtype == ir.DataType.INT8:  # rows of a quantized table
                node.attributes["to"] = ir.AttrInt64("to", _FLOAT.value)
                continue
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            graph.remove(node, safe=True)
    for value in list(graph.initializers.values()):
        if value.dtype in _NARROW:
            readers = {node for node, _ in value.uses()}
            gathers = [node for node in readers if node.op_type == "Gather"]
            for gather in gathers:
                _cast_after(graph, gather.outputs[0])
            if others := readers.difference(gathers):
                _cast_before(graph, value, others)
    for node in graph:
        picks_rows = node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].dtype in _NARROW
        for output in node.outputs:
            if output.dtype in _NARROW and not picks_rows:
                output.dtype = _FLOAT


def _cast_after(graph: ir.Graph, value: ir.Value) -> None:
    users = tuple(value.uses())
    cast = ir.node("Cast", [value], {"to": _FLOAT.value}, name=f"{value.name}/Cast")
    cast.outputs[0].name = f"{value.name}/Cast_output"
    producer = value.producer()
    assert producer is not None
    graph.insert_after(producer, cast)
    for node, index in users:
        node.replace_input_with(index, cast.outputs[0])


def _cast_before(graph: ir.Graph, value: ir.Value, readers: set[ir.Node]) -> None:
    cast = ir.node("Cast", [value], {"to": _FLOAT.value}, name=f"{value.name}/Cast")
    cast.outputs[0].name = f"{value.name}/Cast_output"
    graph.insert_before(graph[0], cast)
    for node, index in tuple(value.uses()):
        if node in readers:
            node.replace_input_with(index, cast.outputs[0])
