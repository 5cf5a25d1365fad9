"""Puts DequantizeLinear between a product and its quantized weight, and QuantizeLinear before its rounded input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

VALUES_SUFFIX, SCALE_SUFFIX, ZERO_POINT_SUFFIX = "_quantized", "_scale", "_zero_point"
INPUT_SCALE_SUFFIX, INPUT_ZERO_POINT_SUFFIX = "_input_scale", "_input_zero_point"


@dataclass(frozen=True)
class RoundedInput:
    """What a product's input is rounded to: value = round(x / scale), clipped to what the type holds; the zero point is 0."""

    kind: Literal["int8", "float8e4m3fn"]
    scale: float


def opset_of(graph: ir.Graph) -> int:
    """Return the first ONNX opset whose DequantizeLinear reads a graph's weights.

    Source: ONNX's changelog of operators. int4 and blocks came in 21, float8 and scales in float16 and bfloat16 in 19.
    """
    quantized = [node for node in graph if node.op_type == "DequantizeLinear"]
    fours = (ir.DataType.INT4, ir.DataType.UINT4)
    if any("block_size" in node.attributes or _dtype(node.inputs[0]) in fours for node in quantized):
        return 21
    return 19 if quantized else 1


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype


def insert_dequantize(
    graph: ir.Graph,
    weight: ir.Value,
    values_type: ir.DataType,
    block: int | None,
    scale_type: ir.DataType,
    *,
    zero_points: bool = False,
) -> tuple[ir.Value, ...]:
    """Replace a float weight [in, out] by DequantizeLinear of new initializers that have no data yet, in place.

    Args:
        values_type: what the values are stored in.
        block: how many weights along `in` share a scale; None for one scale for each output.
        scale_type: of the scales, and so of what DequantizeLinear gives; a Cast to the weight's type follows where it differs.
        zero_points: whether there are zero points, of the values' type.
    Returns: the values [in, out], the scales [in // block, out] or [out], and, where there are any, the zero points,
        shaped as the scales.
    """
    assert weight.name is not None and weight.shape is not None and weight.dtype is not None
    rows, columns = weight.shape.numpy()
    groups = [columns] if block is None else [rows // block, columns]
    made = [
        _initializer(graph, weight.name + VALUES_SUFFIX, values_type, [rows, columns]),
        _initializer(graph, weight.name + SCALE_SUFFIX, scale_type, groups),
    ]
    if zero_points:
        made.append(_initializer(graph, weight.name + ZERO_POINT_SUFFIX, values_type, groups))
    attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
    for product, index in tuple(weight.uses()):
        assert product.name is not None
        base = product.name.removesuffix("MatMul")
        nodes = [ir.node("DequantizeLinear", made, attributes, name=base + "DequantizeLinear")]
        if scale_type != weight.dtype:
            nodes[0].outputs[0].name = f"{nodes[0].name}_output_0"
            cast_to = {"to": weight.dtype.value}
            nodes.append(ir.node("Cast", nodes[0].outputs, cast_to, name=base + "DequantizeLinear/Cast"))
        nodes[-1].outputs[0].name = f"{nodes[-1].name}_output_0"
        graph.insert_before(product, nodes)
        product.replace_input_with(index, nodes[-1].outputs[0])
    del graph.initializers[weight.name]
    return tuple(made)


def _initializer(graph: ir.Graph, name: str, dtype: ir.DataType, shape: list[int]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.initializers[name] = value
    return value


def round_inputs(graph: ir.Graph, weight: ir.Value, rounded: RoundedInput) -> None:
    """Round the input of each product of a float weight by QuantizeLinear and DequantizeLinear, in place.

    The product is in float32 then, and its weight is made float32 here, before `insert_dequantize`: ONNX Runtime multiplies the
    two in int8 in float32 graphs only, and TensorRT whatever the type. An input that a norm computed in float32 is taken before
    it is cast, so it may exceed float16.

    Args:
        weight: an initializer [in, out] without data.
    """
    assert weight.name is not None
    narrow, wide = weight.dtype, ir.DataType.FLOAT
    kind = ir.DataType.INT8 if rounded.kind == "int8" else ir.DataType.FLOAT8E4M3FN
    scale = new_constant(graph, weight.name + INPUT_SCALE_SUFFIX, np.array(rounded.scale, np.float32))
    zero = new_constant(graph, weight.name + INPUT_ZERO_POINT_SUFFIX, np.array(0, kind.numpy()))
    weight.type = ir.TensorType(wide)  # a new one: parts of a product that was split share theirs
    for product, _ in tuple(weight.uses()):
        assert product.name is not None and product.inputs[0] is not None
        base = f"{product.name.removesuffix('MatMul')}input/"
        x = _before_cast(product.inputs[0])
        nodes = []
        if _type_of(x) != wide:
            nodes.append(new_node("Cast", [x], {"to": wide.value}, f"{base}Cast", wide))
            x = nodes[0].outputs[0]
        nodes.append(new_node("QuantizeLinear", [x, scale, zero], {}, f"{base}QuantizeLinear", kind))
        nodes.append(
            new_node("DequantizeLinear", [nodes[-1].outputs[0], scale, zero], {}, f"{base}DequantizeLinear", wide)
        )
        graph.insert_before(product, nodes)
        unrounded = product.inputs[0]
        product.replace_input_with(0, nodes[-1].outputs[0])
        drop_unused_cast(graph, unrounded)
        if narrow is not None and narrow != wide:
            _narrow_output(graph, product, narrow)


def _before_cast(x: ir.Value) -> ir.Value:
    """Return the float32 value that a value was cast from; the value itself if it was not."""
    cast = x.producer()
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    return source if source is not None and _type_of(source) == ir.DataType.FLOAT else x


def _type_of(value: ir.Value) -> ir.DataType | None:
    """Return a value's type; the last step of a norm, which the exporter leaves without one, has that of its weight."""
    node = value.producer()
    if value.dtype is not None or node is None or node.op_type not in ("RMSNormalization", "Mul"):
        return value.dtype
    return next((dtype for dtype in map(_dtype, node.inputs) if dtype is not None), None)


def drop_unused_cast(graph: ir.Graph, value: ir.Value) -> None:
    cast = value.producer()
    if cast is not None and cast.op_type == "Cast" and not value.uses() and not value.is_graph_output():
        graph.remove(cast, safe=True)


def _narrow_output(graph: ir.Graph, product: ir.Node, narrow: ir.DataType) -> None:
    """Cast a float32 product's output back for its users, but for those that cast it to float32."""
    output = product.outputs[0]
    output.type = ir.TensorType(ir.DataType.FLOAT)
    for user, _ in tuple(output.uses()):
        if user.op_type == "Cast" and user.attributes["to"].as_int() == ir.DataType.FLOAT.value:
            cast = user.outputs[0]
            if cast.is_graph_output():  # the logits: their name stays
                continue
            ir.convenience.replace_all_uses_with(cast, output)
            graph.remove(user, safe=True)
    users = [(user, index) for user, index in output.uses() if user.op_type != "Cast"]
    if not users:
        return
    cast_back = new_node("Cast", [output], {"to": narrow.value}, f"{product.name}/Cast", narrow)
    graph.insert_after(product, cast_back)
    for user, index in users:
        user.replace_input_with(index, cast_back.outputs[0])


def new_node(
    kind: str, inputs: Sequence[ir.Value], attributes: Mapping[str, int | Sequence[int]], name: str, dtype: ir.DataType
) -> ir.Node:
    """Return a node with one output of a type, named after it."""
    node = ir.node(kind, inputs, attributes, name=name)
    node.outputs[0].name, node.outputs[0].type = f"{name}_output_0", ir.TensorType(dtype)
    return node


def new_constant(graph: ir.Graph, name: str, data: np.ndarray) -> ir.Value:
    """Return a new initializer that holds an array."""
    value = ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(ir.tensor(data).dtype))
    value.const_value = ir.tensor(data, name=name)
    graph.initializers[name] = value
    return value
