"""Makes the graph pick the rows of an embedding table that is stored in int8, one scale for each token's row."""

import numpy as np
import onnx_ir as ir

from galerne.optimize.quantize.qdq import SCALE_SUFFIX, VALUES_SUFFIX, new_constant, new_node

_WIDTH_LAST = (1, 2, 0)


def insert_quantized_table(graph: ir.Graph, table: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Replace a float table [rows, width] by new initializers that have no data yet, in place.

    Returns: the values [rows, width] int8 and the scales [rows], of the table's type.
    """
    assert table.name is not None and table.shape is not None
    made = _initializer(graph, table, VALUES_SUFFIX, table.shape, ir.DataType.INT8)
    scale = _initializer(graph, table, SCALE_SUFFIX, ir.Shape(table.shape[:1]), table.dtype)
    _pick_rows(graph, table, made, scale, axis=0)
    return made, scale


def share_quantized_table(graph: ir.Graph, table: ir.Value, projection: str) -> None:
    """Let a float table [rows, width] be the quantized weight [width, rows] of a product, with one scale for each row, in place.

    The two have initializers of their own that lie in one place of the file: of a weight that something else reads too, engines
    make no kernel for products.

    Args:
        projection: the product's weight, by the name that it had before it was quantized; it is written.
    """
    made = []
    for suffix in (VALUES_SUFFIX, SCALE_SUFFIX):
        stored = graph.initializers[projection + suffix]
        assert stored.shape is not None and isinstance(stored.const_value, ir.ExternalTensor)
        made.append(_initializer(graph, table, suffix, stored.shape, stored.dtype))
        place = stored.const_value
        made[-1].const_value = ir.ExternalTensor(
            place.location,
            place.offset,
            place.length,
            place.dtype,
            shape=ir.Shape(stored.shape.numpy()),
            name=str(made[-1].name),
            base_dir=place.base_dir,
        )
    _pick_rows(graph, table, *made, axis=1)


def _initializer(graph: ir.Graph, table: ir.Value, suffix: str, shape: ir.Shape, dtype: ir.DataType | None) -> ir.Value:
    assert table.name is not None and dtype is not None
    value = ir.Value(name=table.name + suffix, shape=shape, type=ir.TensorType(dtype))
    graph.initializers[str(value.name)] = value
    return value


def _pick_rows(graph: ir.Graph, table: ir.Value, values: ir.Value, scale: ir.Value, *, axis: int) -> None:
    """Gather rows before they are dequantized: DequantizeLinear would have to take all of the table.

    Args:
        axis: of the values, that the rows lie along.
    """
    assert table.name is not None and table.dtype is not None and scale.dtype is not None
    for gather, _ in tuple(table.uses()):
        assert gather.name is not None and gather.op_type == "Gather" and gather.inputs[1] is not None
        base, ids, picked = gather.name.removesuffix("Gather"), gather.inputs[1], gather.outputs[0]
        rows = new_node("Gather", [values, ids], {"axis": axis}, gather.name, ir.DataType.INT8)
        nodes = [rows]
        if axis:  # [width, B, S] to [B, S, width]
            nodes.append(
                new_node("Transpose", rows.outputs, {"perm": _WIDTH_LAST}, f"{base}Transpose", ir.DataType.INT8)
            )
        nodes.append(new_node("Cast", nodes[-1].outputs, {"to": table.dtype.value}, f"{base}Cast", table.dtype))
        wide = nodes[-1].outputs[0]
        nodes.append(new_node("Gather", [scale, ids], {"axis": 0}, f"{base}scale/Gather", scale.dtype))
        if scale.dtype != table.dtype:
            nodes.append(
                new_node("Cast", nodes[-1].outputs, {"to": table.dtype.value}, f"{base}scale/Cast", table.dtype)
            )
        last = new_constant(graph, f"{base}scale/axes", np.array([-1], np.int64))
        nodes.append(new_node("Unsqueeze", [nodes[-1].outputs[0], last], {}, f"{base}scale/Unsqueeze", table.dtype))
        nodes.append(new_node("Mul", [wide, nodes[-1].outputs[0]], {}, f"{base}Mul", table.dtype))
        graph.insert_before(gather, nodes)
        ir.convenience.replace_all_uses_with(picked, nodes[-1].outputs[0])
        graph.remove(gather, safe=True)
    del graph.initializers[table.name]
