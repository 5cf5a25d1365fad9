"""Lowering for CUDA: int4 weights in blocks that its kernel for one token takes."""

import onnx_ir as ir

from galerne.optimize.lower.constant import constant
from galerne.runtime.engines.ort_cuda import LONGEST_BLOCK


def short_blocks(model: ir.Model) -> None:
    """Repeat the scales of longer blocks without zero points, in place: the same weights, in blocks of 128."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == "DequantizeLinear" and "block_size" in node.attributes]:
        block, scale = node.attributes["block_size"].as_int(), node.inputs[1]
        if block <= LONGEST_BLOCK or len(node.inputs) > 2 or scale is None or scale.shape is None:
            continue
        groups, outputs = scale.shape.numpy()
        times, name = block // LONGEST_BLOCK, f"{node.name}/short_blocks/"
        nodes = []
        for kind, what, sizes in (
            ("Unsqueeze", "axis", [1]),
            ("Expand", "repeated", [groups, times, outputs]),
            ("Reshape", "flat", [groups * times, outputs]),
        ):
            shape = constant(graph, f"/short_blocks/{what}_{'_'.join(map(str, sizes))}", sizes)
            new = ir.node(kind, [scale, shape], name=f"{name}{kind}")
            scale = new.outputs[0]
            scale.name = f"{name}{kind}_output_0"
            nodes.append(new)
        graph.insert_before(node, nodes)
        node.replace_input_with(1, scale)
        node.attributes["block_size"] = ir.AttrInt64("block_size", LONGEST_BLOCK)
