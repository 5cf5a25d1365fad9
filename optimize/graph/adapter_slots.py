"""Gives the graph's products inputs for a LoRA adapter: x W becomes x W + (x A) B."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from galerne.optimize.graph.weights import Weight
from galerne.runtime.manifest import AdapterSlot, adapter_input_names


def add_adapter_slots(
    model: ir.Model, weights: Sequence[Weight], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, AdapterSlot]:
    """Add inputs A [in, rank] and B [rank, out] for each product, in place; they are of the product's type.

    Fused weights share one slot: the ranks of the parts stand side by side in A, and B is block-diagonal. Each slot has a rank
    of its own. A vocabulary projection that is the embedding's table has no slot: checkpoints know no such layer.

    Args:
        model: a graph whose weights are named.
        weights: the graph's.
        shapes: of the checkpoint's tensors, [out, in] for a linear layer.
    Returns: the slots by name, in the graph's order.
    """
    tables = {source for weight in weights if weight.role == "table" for source in weight.sources}
    slots = {}
    for weight in weights:
        if weight.role != "linear" or not tables.isdisjoint(weight.sources):
            continue
        name = weight.name.removesuffix(".weight")
        slots[name] = AdapterSlot(
            in_features=weight.shape[0],
            modules=tuple(source.removesuffix(".weight") for source in weight.sources),
            out_features=tuple(shapes[source][0] for source in weight.sources),
        )
        _add(model.graph, model.graph.initializers[weight.name], name, weight.shape)
    return slots


def _add(graph: ir.Graph, weight: ir.Value, slot: str, shape: Sequence[int]) -> None:
    assert weight.dtype is not None
    rank, (rows, columns) = f"adapter_rank.{slot}", shape
    shapes = ir.Shape([rows, rank]), ir.Shape([rank, columns])
    a, b = (
        ir.Value(name=name, shape=sizes, type=ir.TensorType(weight.dtype))
        for name, sizes in zip(adapter_input_names(slot), shapes, strict=True)
    )
    graph.inputs.extend([a, b])
    for product, _ in tuple(weight.uses()):
        assert product.name is not None
        plain, base = product.outputs[0], product.name.removesuffix("MatMul")
        users = tuple(plain.uses())
        inner = ir.node("MatMul", [product.inputs[0], a], name=f"{base}adapter/A/MatMul")  # [..., rank]
        outer = ir.node("MatMul", [inner.outputs[0], b], name=f"{base}adapter/B/MatMul")
        added = ir.node("Add", [plain, outer.outputs[0]], name=f"{base}adapter/Add")
        for node in (inner, outer, added):
            node.outputs[0].name = f"{node.name}_output_0"
            node.outputs[0].type = ir.TensorType(weight.dtype)
        graph.insert_after(product, [inner, outer, added])
        for user, index in users:
            user.replace_input_with(index, added.outputs[0])
        if plain.is_graph_output():  # the logits of a float32 graph
            result = added.outputs[0]
            result.name, result.shape, result.type = plain.name, plain.shape, plain.type
            plain.name = f"{product.name}_output_0"
            graph.outputs[graph.outputs.index(plain)] = result
