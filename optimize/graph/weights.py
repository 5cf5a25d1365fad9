"""Finds the graph's weights and lays the product weights out as the contract says: fused, [in, out]."""

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

_TABLE_READERS = {"Gather"}


@dataclass(frozen=True)
class Weight:
    """A weight of the graph and the checkpoint's tensors that it is made of.

    name: of the graph's initializer.
    role: "linear" for [in, out], the right side of a product; "table" for [rows, width]; "vector" for the rest.
    sources: the checkpoint's tensors, which follow each other along `out`; those of a linear weight are [out, in] each.
    shape: of the initializer.
    """

    name: str
    role: Literal["linear", "table", "vector"]
    sources: tuple[str, ...]
    shape: tuple[int, ...]


def fold_weights(model: ir.Model, *, keep_tied: bool) -> list[Weight]:
    """Replace each Transpose(Concat(weights)) before a product, and each Concat of biases, by one initializer, in place.

    Args:
        model: a cleaned graph.
        keep_tied: leave a weight that is a table too as Transpose(table): it is stored once, and the product reads it as
            it lies. Where the product's weight is quantized and the table is not, there is nothing to share.
    Returns: all weights, in the order in which the graph reads them.
    """
    graph = model.graph
    folded: dict[str, Weight] = {}
    for node in list(graph):
        if node.op_type == "Concat" and all(map(_is_bias, node.inputs)):
            biases = [value for value in node.inputs if value is not None]
            bias = _fused_bias(biases)
            value = ir.Value(name=bias.name, shape=ir.Shape(bias.shape), type=biases[0].type)
            graph.initializers[bias.name] = value
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            folded[bias.name] = bias
        if node.op_type != "MatMul":
            continue
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        parts = _parts(transpose)
        if not parts or (keep_tied and len(parts) == 1 and _is_table(parts[0])):
            continue
        weight = _fused(parts)
        value = ir.Value(name=weight.name, shape=ir.Shape(weight.shape), type=parts[0].type)
        graph.initializers[weight.name] = value
        node.replace_input_with(1, value)
        folded[weight.name] = weight
    _drop_unused(graph)
    values = {value.name: value for node in graph for value in node.inputs if value is not None and _is_weight(value)}
    return [
        folded.get(str(name))
        or Weight(str(name), "table" if _is_table(value) else "vector", (str(name),), _shape(value))
        for name, value in values.items()
    ]


def _parts(transpose: ir.Node) -> list[ir.Value]:
    """Return the weights that are transposed, alone or as a concatenation; none where it is no weight."""
    source = transpose.inputs[0]
    assert source is not None
    concat = source.producer()
    parts = [source] if concat is None else [part for part in concat.inputs if part is not None]
    return parts if all(map(_is_weight, parts)) else []


def _fused(parts: list[ir.Value]) -> Weight:
    names = tuple(str(part.name) for part in parts)
    shapes = [_shape(part) for part in parts]
    # A projection tied to the embedding needs a name of its own beside the table's.
    name = "lm_head.weight" if _is_table(parts[0]) else fused_name(names)
    return Weight(name, "linear", names, (shapes[0][1], sum(shape[0] for shape in shapes)))


def _fused_bias(parts: list[ir.Value]) -> Weight:
    names = tuple(str(part.name) for part in parts)
    return Weight(fused_name(names), "vector", names, (sum(_shape(part)[0] for part in parts),))


def fused_name(names: tuple[str, ...]) -> str:
    """Name a fused weight after its parts: q_proj, k_proj and v_proj give qkv_proj; gate_proj and up_proj gate_up_proj."""
    if len(names) == 1:
        return names[0]
    prefix, _, field = names[0].rpartition(".")
    prefix, _, _ = prefix.rpartition(".")
    modules = [name.rpartition(".")[0].rpartition(".")[2].removesuffix("_proj") for name in names]
    return f"{prefix}.{('' if all(len(module) == 1 for module in modules) else '_').join(modules)}_proj.{field}"


def _is_bias(value: ir.Value | None) -> bool:
    return value is not None and _is_weight(value) and len(_shape(value)) == 1


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is None


def _is_table(value: ir.Value) -> bool:
    return any(node.op_type in _TABLE_READERS for node, _ in value.uses())


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return value.shape.numpy()


def _drop_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
