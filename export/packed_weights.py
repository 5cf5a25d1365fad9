"""Puts weights that were quantized before into the graph as they are."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.packed import Bytes, PackedTensor
from galerne.optimize.graph.weights import Weight
from galerne.optimize.quantize.qdq import RoundedInput, insert_dequantize, round_inputs
from galerne.optimize.quantize.rounding import pack_int4

Array = NDArray[Any]


def packed_sources(weight: Weight, checkpoint: Checkpoint) -> list[PackedTensor]:
    """Return a weight's sources as the checkpoint stores them; empty where they are floats."""
    if weight.role != "linear":
        return []
    return [packed for packed in map(checkpoint.packed, weight.sources) if packed is not None]


def packed_initializers(
    graph: ir.Graph, value: ir.Value, parts: list[PackedTensor]
) -> list[tuple[ir.Value, int, Callable[[], Array]]]:
    """Make the graph read a weight through DequantizeLinear, and its product's input rounded where it is, in place.

    Scales are stored in the weight's type where it holds them exactly, and else in float32, with a Cast after.

    Args:
        value: the weight's initializer, [in, out].
        parts: of one form, side by side along `out`.
    Returns: the initializers, each with its size in bytes and what makes its data, in the file's order.
    """
    first = parts[0]
    if first.order is not None:
        _reorder_inputs(graph, value, first.order)
    if first.input_kind is not None and first.input_scale is not None:
        round_inputs(graph, value, RoundedInput(first.input_kind, first.input_scale))
    assert value.dtype is not None
    scales = np.concatenate([part.scales.astype(np.float32) for part in parts], axis=1)
    with np.errstate(over="ignore"):  # what does not fit is not exact
        narrow = scales.astype(value.dtype.numpy())
    exact = bool((narrow.astype(np.float32) == scales).all())
    zero_points = _zero_points(parts)
    kind = first.kind if zero_points is None else f"u{first.kind}"
    made = insert_dequantize(
        graph,
        value,
        ir.DataType["FLOAT8E4M3FN" if kind == "float8e4m3fn" else kind.upper()],
        first.block,
        value.dtype if exact else ir.DataType.FLOAT,
        zero_points=zero_points is not None,
    )
    data = [partial(_values, parts, kind), partial(_given, narrow if exact else scales)]
    if zero_points is not None:
        data.append(partial(_given, _stored(zero_points, kind)))
    return [(initializer, _size(initializer), make) for initializer, make in zip(made, data, strict=True)]


def _reorder_inputs(graph: ir.Graph, value: ir.Value, order: NDArray[np.int64]) -> None:
    assert value.name is not None
    name = f"{value.name}_order"
    indices = ir.Value(name=name, shape=ir.Shape(order.shape), type=ir.TensorType(ir.DataType.INT64))
    indices.const_value = ir.tensor(order, name=name)
    graph.initializers[name] = indices
    for product, _ in tuple(value.uses()):
        assert product.name is not None
        gather = ir.node(
            "Gather", [product.inputs[0], indices], {"axis": -1}, name=product.name.removesuffix("MatMul") + "Gather"
        )
        gather.outputs[0].name = f"{gather.name}_output_0"
        graph.insert_before(product, gather)
        product.replace_input_with(0, gather.outputs[0])


def _zero_points(parts: list[PackedTensor]) -> Bytes | None:
    if all(part.zero_points is None for part in parts):
        return None
    return np.concatenate(
        [
            np.full(part.scales.shape, part.middle, np.uint8) if part.zero_points is None else part.zero_points
            for part in parts
        ],
        axis=1,
    )


def _values(parts: list[PackedTensor], kind: str) -> Array:
    codes = np.empty((parts[0].shape[1], sum(part.shape[0] for part in parts)), np.uint8)
    first = 0
    for part in parts:
        part.write_codes(codes[:, first : first + part.shape[0]])
        first += part.shape[0]
    if kind in ("int4", "int8"):
        np.bitwise_xor(codes, parts[0].middle, out=codes)  # from codes from 0 to two's complement
    return _stored(codes, kind)


def _given(data: Array) -> Array:
    return np.ascontiguousarray(data)


def _stored(codes: Bytes, kind: str) -> Array:
    return pack_int4(codes.view(np.int8)) if kind.endswith("int4") else codes


def _size(value: ir.Value) -> int:
    assert value.shape is not None and value.dtype is not None
    return -(-math.prod(value.shape.numpy()) * value.dtype.bitwidth // 8)
