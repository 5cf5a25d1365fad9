"""Reads a graph the way that an operator table of `targets/operators/` speaks of one."""

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, defs, helper, numpy_helper, shape_inference

from galerne.errors import InputError
from galerne.targets.operator_table import Input, Use

_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "double",
    TensorProto.INT64: "int64",
    TensorProto.INT32: "int32",
    TensorProto.INT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.UINT8: "uint8",
    TensorProto.BOOL: "bool",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT4E2M1: "fp4",
}


def uses_of(path: Path, lower: Callable[[onnx.GraphProto], object] | None = None) -> tuple[int, list[Use]]:
    """Return a graph's opset and what each of its nodes asks of a parser.

    Args:
        path: of the ONNX file; its external data is not read.
        lower: changes the graph in memory before it is looked at.
    Raises: InputError if it is no valid ONNX graph.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        if lower is not None:
            lower(model.graph)
        model = shape_inference.infer_shapes(model, strict_mode=True)
    except (DecodeError, shape_inference.InferenceError) as exc:
        raise InputError(f"{path}: not a valid ONNX graph ({' '.join(str(exc).split())}); export it again") from exc
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    values = _values(model.graph)
    return opset, [_use(node, opset, values) for node in model.graph.node]


def _use(node: onnx.NodeProto, opset: int, values: Mapping[str, Input]) -> Use:
    unknown = Input(None)
    return Use(
        node=node.name,
        operator=node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}",
        types=tuple(kind for name in _data(node) if (kind := values.get(name, unknown).type) is not None),
        since=_since(node.op_type, opset) if node.domain in ("", "ai.onnx") else 1,
        inputs=tuple(values.get(name, unknown) if name else None for name in node.input),
        outputs=sum(map(bool, node.output)),
        attributes={attribute.name: _value(attribute) for attribute in node.attribute},
    )


def _values(graph: onnx.GraphProto) -> dict[str, Input]:
    """Return what is known of each value by its name: constants, inputs, outputs and what shape inference found."""
    found = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        found[value.name] = Input(
            _type_name(tensor.elem_type), len(tensor.shape.dim) if tensor.HasField("shape") else None
        )
    for tensor in graph.initializer:
        found[tensor.name] = Input(_type_name(tensor.data_type), len(tensor.dims), constant=True, zero=_is_zero(tensor))
    return found


def _type_name(element: int) -> str | None:
    if element == TensorProto.UNDEFINED:
        return None
    return _TYPES.get(element) or str(TensorProto.DataType.Name(element)).lower()


def _is_zero(tensor: TensorProto) -> bool:
    """Whether all values of a constant are zero; of external data, which is not read, they are taken not to be."""
    external = tensor.data_location == TensorProto.EXTERNAL
    return not external and not numpy_helper.to_array(tensor).astype("float32").any()


def _value(attribute: onnx.AttributeProto) -> object:
    value = helper.get_attribute_value(attribute)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _data(node: onnx.NodeProto) -> list[str]:
    """Return the values whose types tables list: the first input, what Where chooses from, what Cast gives."""
    more = {"Where": node.input[1:2], "Cast": node.output}.get(node.op_type, ())
    return [*node.input[:1], *more]


def _since(operator: str, opset: int) -> int:
    """Return the oldest opset with the same inputs, outputs and attributes of an operator; types may have been added."""
    schema = defs.get_schema(operator, opset, "")
    while schema.since_version > 1:
        try:
            older = defs.get_schema(operator, schema.since_version - 1, "")
        except defs.SchemaError:  # there was none
            break
        if _form(older) != _form(schema):
            break
        schema = older
    return schema.since_version


def _form(schema: defs.OpSchema) -> object:
    attributes = {name: (a.required, a.default_value.SerializeToString()) for name, a in schema.attributes.items()}
    return [value.name for value in schema.inputs], [value.name for value in schema.outputs], attributes
