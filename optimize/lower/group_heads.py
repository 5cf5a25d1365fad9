"""Lowering for CPUs: let the query heads that share a key head stand in one product, so that no key is read twice.

ONNX Runtime's Attention reads the keys once for each query head. Query heads of one group, stacked along the token axis,
are one head with more queries; the mask is repeated to match.
Measured on two AVX-512 cores, one token, 32/4 heads of 64, 1280 slots: 0.32 ms in place of 0.39.
"""

import onnx_ir as ir

from galerne.optimize.lower.constant import constant


def group_heads(model: ir.Model, heads: int, kv_heads: int, head_dim: int) -> None:
    """Rewrite every Attention node over [B, Hq, S, D] into one over [B, Hkv, G*S, D], in place. Nothing where G is 1."""
    graph, group = model.graph, heads // kv_heads
    if group == 1:
        return
    grouped = constant(graph, "/group_heads/grouped", [0, kv_heads, -1, head_dim])
    ungrouped = constant(graph, "/group_heads/ungrouped", [0, heads, -1, head_dim])
    masks: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node.op_type == "Attention"]:
        query, mask, attended = node.inputs[0], node.inputs[3], node.outputs[0]
        assert query is not None and mask is not None
        if mask not in masks:
            name = f"/group_heads/Concat_{len(masks)}"
            repeat = ir.node("Concat", [mask] * group, {"axis": 2}, name=name)  # [B, 1, G*S, C]
            repeat.outputs[0].name = f"{name}_output_0"
            graph.insert_before(node, repeat)
            masks[mask] = repeat.outputs[0]
        before = ir.node("Reshape", [query, grouped], name=f"{node.name}/group/Reshape")
        before.outputs[0].name = f"{before.name}_output_0"
        graph.insert_before(node, before)
        users = tuple(attended.uses())
        after = ir.node("Reshape", [attended, ungrouped], name=f"{node.name}/ungroup/Reshape")
        after.outputs[0].name = f"{after.name}_output_0"
        graph.insert_after(node, after)
        for user, index in users:
            user.replace_input_with(index, after.outputs[0])
        node.replace_input_with(0, before.outputs[0])
        node.replace_input_with(3, masks[mask])
