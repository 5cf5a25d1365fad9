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
    _drop_unused_outputs(graph)
    for simplify in (
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
        passes.TopologicalSortPass(),
    ):
        simplify(model)

    for weight in weights:
        assert weight.name is not None
        graph.inputs.remove(weight)
        graph.initializers[weight.name] = weight


def _drop_unused_outputs(graph: ir.Graph) -> None:
    """Attention is built with its optional outputs; TensorRT refuses a node that has them."""
    for node in graph:
        if node.op_type == "Attention":
            node.resize_outputs(1)
