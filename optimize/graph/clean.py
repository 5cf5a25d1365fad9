"""Folds the exporter's raw graph into the plain one that is shipped."""

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants


def clean(model: ir.Model) -> None:
    """Fold constants, drop what is unused or said twice, in place. The weights have no data and are left as they are.

    Weights stand as graph inputs while the folding runs, so that no pass looks for data that is not there.
    """
    graph = model.graph
    weights = list(graph.initializers.values())
    for weight in weights:
        weight.const_value = None
        graph.inputs.append(weight)
    graph.initializers.clear()

    fold_constants(model, onnx_shape_inference=False)
    _drop_optional(graph)
    _ask_inputs_for_sizes(graph)
    for simplify in (
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),  # once equal constants are one, as it compares what nodes read
        passes.RemoveUnusedNodesPass(),
        passes.TopologicalSortPass(),
    ):
        simplify(model)

    for weight in weights:
        assert weight.name is not None
        graph.inputs.remove(weight)
        graph.initializers[weight.name] = weight


def _drop_optional(graph: ir.Graph) -> None:
    """Nodes are built with all outputs and all attributes, and TensorRT refuses some that it could do without."""
    for node in graph:
        if node.op_type == "Attention":
            node.resize_outputs(1)
        elif node.op_type == "ScatterND" and node.attributes["reduction"].as_string() == "none":
            del node.attributes["reduction"]


def _ask_inputs_for_sizes(graph: ir.Graph) -> None:
    """Let each question for a size that is an input's too go to the input, so that all layers ask once."""
    known: dict[ir.SymbolicDim, tuple[ir.Value, int]] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                known.setdefault(size, (value, axis))
    for node in graph:
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source is None or source.shape is None or "start" not in node.attributes or "end" not in node.attributes:
            continue
        start, end = node.attributes["start"].as_int(), node.attributes["end"].as_int()
        size = source.shape[start]
        if end == start + 1 and isinstance(size, ir.SymbolicDim) and size in known:
            value, axis = known[size]
            node.replace_input_with(0, value)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)
