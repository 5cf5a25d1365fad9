"""Lowering for CUDA: a ring's number of slots is read where the slots are counted, on the GPU.

As the size of an axis it lies in the CPU's memory. A node on the GPU that takes it needs a copy, and ONNX Runtime records no
CUDA graph of a run with one.
"""

import onnx_ir as ir

from galerne.optimize.lower.constant import constant


def device_slots(model: ir.Model) -> None:
    """Let each Mod by a ring's number of slots take it from the Range over them, in place: the last one and one more."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == "Mod"]:
        size = node.inputs[1]
        slots = None if size is None else _range_to(size)
        if slots is None:
            continue
        last = ir.node(
            "Gather", [slots, constant(graph, "/device_slots/last", -1)], {"axis": 0}, name=f"{node.name}/slots/Gather"
        )
        count = ir.node(
            "Add", [last.outputs[0], constant(graph, "/device_slots/one", 1)], name=f"{node.name}/slots/Add"
        )
        for new in (last, count):
            new.outputs[0].name = f"{new.name}_output_0"
        graph.insert_before(node, [last, count])
        node.replace_input_with(1, count.outputs[0])


def _range_to(size: ir.Value) -> ir.Value | None:
    """Return the numbers below a size, where the graph counts them."""
    return next((user.outputs[0] for user, place in size.uses() if user.op_type == "Range" and place == 1), None)
