"""Puts DequantizeLinear between a product and its quantized weight."""

import onnx_ir as ir

from galerne.optimize.quantize.recipe import AnyRecipe, CheckpointRecipe

VALUES_SUFFIX, SCALE_SUFFIX, ZERO_POINT_SUFFIX = "_quantized", "_scale", "_zero_point"


def opset_of(recipe: AnyRecipe) -> int:
    """Return the first ONNX opset whose DequantizeLinear reads a recipe's weights.

    Source: ONNX's changelog of operators. int4 and blocks came in 21, scales in float16 and bfloat16 in 19.
    """
    if isinstance(recipe, CheckpointRecipe):  # any weight may be in blocks
        return 21
    bits = {form.bits for form in recipe.formats}
    return 21 if 4 in bits else 19 if 8 in bits else 1


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
