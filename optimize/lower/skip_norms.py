"""Lowering for CUDA: the residual stream's sum and the norm that follows are one kernel.

ONNX Runtime makes this change by itself for its own norms, and not for ONNX's RMSNormalization.
"""

import onnx_ir as ir

_FUSED = "com.microsoft"  # ONNX Runtime's own domain
_NORMED, _SUM, _OUTPUTS = 0, 3, 4


def skip_norms(model: ir.Model) -> None:
    """Make Add and RMSNormalization one SkipSimplifiedLayerNormalization, in place, where both are float16."""
    graph = model.graph
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        total = norm.inputs[0]
        add = None if total is None else total.producer()
        if add is None or add.op_type != "Add" or norm.outputs[0].dtype != ir.DataType.FLOAT16:
            continue
        if any(value is None or value.is_initializer() for value in add.inputs):  # a bias
            continue
        both = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, norm.inputs[1]],
            {"epsilon": norm.attributes["epsilon"].as_float()},
            domain=_FUSED,
            num_outputs=_OUTPUTS,
            name=f"{norm.name}/skip",
        )
        for i, output in enumerate(both.outputs):
            output.name = f"{both.name}_output_{i}"
        model.opset_imports[_FUSED] = 1
        graph.insert_before(norm, both)
        for old, new in ((norm, _NORMED), (add, _SUM)):
            both.outputs[new].dtype = ir.DataType.FLOAT16
            ir.convenience.replace_all_uses_with(old.outputs[0], both.outputs[new])
            graph.remove(old, safe=True)
