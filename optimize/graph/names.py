"""Gives nodes, values and axes names that say where in the model they stand, and drops the exporter's notes."""

from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as passes

from galerne.runtime.manifest import cache_names, write_index_names

_AXES = {
    "input_ids": ("batch_size", "sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
    "logit_indices": ("batch_size", "num_logits"),
    "logits": ("batch_size", "num_logits", None),
}
_SCOPES = "pkg.torch.onnx.name_scopes"


def name(model: ir.Model, layer_kinds: Sequence[int]) -> None:
    """Rename a cleaned graph whose weights are folded, in place.

    Args:
        layer_kinds: for each layer its kind, which decides the ring's capacity.
    """
    _name_nodes(model.graph)
    _name_axes(model.graph, layer_kinds)
    _drop_notes(model)
    model.graph.name = "decoder"
    model.producer_name, model.producer_version = "galerne", None


def _name_nodes(graph: ir.Graph) -> None:
    """Name each node after its module and operator, as in /model/layers.0/self_attn/o_proj/MatMul."""
    seen: Counter[str] = Counter()
    modules: dict[ir.Node, str] = {}
    for node in graph:
        modules[node] = module = _module(node, modules)
        base = "/" + "/".join([*_folders(module), node.op_type])
        node.name = f"{base}_{seen[base]}" if seen[base] else base
        seen[base] += 1
        for i, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = f"{node.name}_output_{i}"
    constants = [value for value in graph.initializers.values() if value.const_value is not None]
    for i, value in enumerate(constants):
        value.name = f"/constants/{i}"


def _module(node: ir.Node, modules: dict[ir.Node, str]) -> str:
    """Return the module a node belongs to: its weight's, or the one it was traced in, or that of what it reads."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    if weight is not None and weight.producer() is None and weight.name is not None:
        return weight.name.removesuffix(".weight")
    scopes = [part.strip(" '\"") for part in node.metadata_props.get(_SCOPES, "").strip("[]").split(",")]
    if len(scopes) > 1:  # the last scope is the operator itself
        return scopes[-2]
    producers = [value.producer() for value in node.inputs if value is not None]
    return next((modules[producer] for producer in producers if producer is not None), "")


def _folders(module: str) -> list[str]:
    """Split model.layers.0.mlp into model, layers.0, mlp."""
    folders: list[str] = []
    for part in filter(None, module.split(".")):
        if part.isdecimal() and folders:
            folders[-1] += f".{part}"
        else:
            folders.append(part)
    return folders


def _name_axes(graph: ir.Graph, layer_kinds: Sequence[int]) -> None:
    axes_of: dict[str, tuple[str | None, ...]] = dict(_AXES)
    axes_of |= dict.fromkeys(write_index_names(max(layer_kinds) + 1), ("batch_size",))
    for cache in ("past_key_values", "present"):
        for i, ring in enumerate(cache_names(cache, len(layer_kinds))):
            kind = layer_kinds[i // 2]
            axes_of[ring] = ("batch_size", None, f"cache_slots_{kind}" if kind else "cache_slots", None)
    for value in (*graph.inputs, *graph.outputs):
        assert value.name is not None and value.shape is not None
        value.shape = ir.Shape([axis or size for axis, size in zip(axes_of[value.name], value.shape, strict=True)])
    for node in graph:  # inner shapes carry the tracer's own axis names; every reader infers them anew
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None


def _drop_notes(model: ir.Model) -> None:
    """Stack traces hold paths of the machine that exported, and the same model shall give the same bytes."""
    passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
