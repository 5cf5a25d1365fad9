"""Puts DequantizeLinear between a product and its quantized weight."""

import onnx_ir as ir

from galerne.optimize.quantize.recipe import Recipe

VALUES_SUFFIX, SCALE_SUFFIX = "_quantized", "_scale"


def opset_of(recipe: Recipe) -> int:
    """Return the first ONNX opset whose DequantizeLinear reads a recipe's weights.

    Source: ONNX's changelog of operators. int4 and blocks came in 21, scales in float16 and bfloat16 in 19.
    """
    bits = {recipe.weights.bits, recipe.lm_head.bits}
    return 21 if 4 in bits else 19 if 8 in bits else 1


def insert_dequantize(
    graph: ir.Graph, weight: ir.Value, bits: int, block: int, compute: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """Replace a float weight [in, out] by DequantizeLinear of two new initializers that have no data yet, in place.

    Args:
        bits: 4 for int4 in blocks along `in`, 8 for int8 with one scale for each output.
        block: the block's length; for int8 the whole input axis.
        compute: the type of the scale, and so of the product.
    Returns: the values [in, out] and the scales, [in // block, out] for int4 and [out] for int8.
    """
    assert weight.name is not None and weight.shape is not None
    rows, columns = weight.shape.numpy()
    blocked = bits == 4
    values = ir.Value(
        name=weight.name + VALUES_SUFFIX,
        shape=ir.Shape([rows, columns]),
        type=ir.TensorType(ir.DataType.INT4 if blocked else ir.DataType.INT8),
    )
    scale = ir.Value(
        name=weight.name + SCALE_SUFFIX,
        shape=ir.Shape([rows // block, columns] if blocked else [columns]),
        type=ir.TensorType(compute),
    )
    attributes = {"axis": 0, "block_size": block} if blocked else {"axis": 1}
    for product, index in tuple(weight.uses()):
        node = ir.node("DequantizeLinear", [values, scale], attributes)
        assert product.name is not None
        node.name = product.name.removesuffix("MatMul") + "DequantizeLinear"
        node.outputs[0].name = node.name + "_output_0"
        graph.insert_before(product, node)
        product.replace_input_with(index, node.outputs[0])
    del graph.initializers[weight.name]
    for value in (values, scale):
        graph.initializers[str(value.name)] = value
    return values, scale
