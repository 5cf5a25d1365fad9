"""Takes products apart whose weights read one input and are stored in different forms."""

import onnx_ir as ir

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.packed import PackedTensor
from galerne.optimize.graph.weights import Weight, fused_name
from galerne.optimize.quantize.recipe import AnyRecipe, StoredFormat


def split_products(model: ir.Model, weights: list[Weight], checkpoint: Checkpoint, recipe: AnyRecipe) -> list[Weight]:
    """Take fused products apart whose weights are stored in different forms, in place.

    A weight's form is the checkpoint's where that has quantized it, and else the recipe's. Each run of weights of one form
    becomes a product of its own; the results are put side by side again.

    Returns: the weights as the graph has them now.
    """
    result = []
    for weight in weights:
        runs = _runs(weight, checkpoint, recipe) if weight.role == "linear" else []
        result += _split(model.graph, weight, runs, checkpoint) if len(runs) > 1 else [weight]
    return result


def _runs(weight: Weight, checkpoint: Checkpoint, recipe: AnyRecipe) -> list[list[str]]:
    runs: list[list[str]] = []
    last: PackedTensor | StoredFormat | None = None
    for name in weight.sources:
        form = checkpoint.packed(name) or recipe.format_for(name)
        if last is not None and _same(last, form):
            runs[-1].append(name)
        else:
            runs.append([name])
        last = form
    return runs


def _same(one: PackedTensor | StoredFormat, other: PackedTensor | StoredFormat) -> bool:
    if isinstance(one, PackedTensor):
        return isinstance(other, PackedTensor) and one.same_form(other)
    return one == other


def _split(graph: ir.Graph, weight: Weight, runs: list[list[str]], checkpoint: Checkpoint) -> list[Weight]:
    whole = graph.initializers.pop(weight.name)
    result = []
    for run in runs:
        shape = (weight.shape[0], sum(checkpoint.shapes()[name][0] for name in run))
        result.append(Weight(fused_name(tuple(run)), "linear", tuple(run), shape))
        assert whole.type is not None
        graph.initializers[result[-1].name] = ir.Value(name=result[-1].name, shape=ir.Shape(shape), type=whole.type)
    for product, _ in tuple(whole.uses()):
        assert product.name is not None
        base, output = product.name, product.outputs[0]
        parts = []
        for part in result:
            folder, _, module = part.name.removesuffix(".weight").rpartition(".")
            assert folder
            name = f"{base.rsplit('/', 2)[0]}/{module}/MatMul"
            node = ir.node("MatMul", [product.inputs[0], graph.initializers[part.name]], name=name)
            node.outputs[0].name = f"{name}_output_0"
            parts.append(node)
        joined = ir.node("Concat", [node.outputs[0] for node in parts], {"axis": -1}, name=f"{base}/Concat")
        joined.outputs[0].name = f"{joined.name}_output_0"
        graph.insert_before(product, [*parts, joined])
        ir.convenience.replace_all_uses_with(output, joined.outputs[0])
        graph.remove(product, safe=True)
    return result
