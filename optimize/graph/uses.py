"""Reads a graph the way that an operator table of `targets/operators/` speaks of one."""

from pathlib import Path

import onnx
from onnx import TensorProto, defs, shape_inference

from galerne.targets.operator_table import Use

_TYPES = {
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


def uses_of(path: Path) -> tuple[int, list[Use]]:
    """Return a graph's opset and what each of its nodes asks of a parser.

    Args:
        path: of the ONNX file; its external data is not read.
    """
    model = shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False), strict_mode=True)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    graph = model.graph
    constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
    values = (*graph.input, *graph.output, *graph.value_info)
    types = constants | {value.name: value.type.tensor_type.elem_type for value in values}
    return opset, [
        Use(
            node=node.name,
            operator=node.op_type,
            types=tuple(_TYPES.get(types[name], TensorProto.DataType.Name(types[name])) for name in _data(node)),
            since=_since(node.op_type, opset),
            inputs=len(node.input),
            constant_inputs=tuple(i for i, name in enumerate(node.input) if name in constants),
            attributes=tuple(attribute.name for attribute in node.attribute),
        )
        for node in graph.node
    ]


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
