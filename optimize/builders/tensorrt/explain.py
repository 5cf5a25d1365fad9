"""Says what TensorRT's parser refused in the model's own terms: which operator, in which layer and part, and what to do."""

import re
from typing import Any

# The parts of a decoder, by the folder in a node's name: /model/layers.3/self_attn/o_proj/MatMul.
_PARTS = {
    "self_attn": "attention",
    "mlp": "MLP",
    "input_layernorm": "norm before the attention",
    "post_attention_layernorm": "norm before the MLP",
    "embed_tokens": "token embedding",
    "norm": "last norm",
    "lm_head": "vocabulary projection",
}
# Operators that only the newer dialect has, which an older parser lacks whole.
_NEWER = {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"}


def place(name: str) -> str:
    """Return where in the model a node stands, by its name; empty where the name does not say.

    "/model/layers.3/self_attn/o_proj/MatMul" gives "layer 3, attention, o_proj"; layers count from 0, as in the checkpoint.
    """
    folders = name.strip("/").split("/")[:-1]
    found: list[str] = []
    for folder in folders:
        layer = re.fullmatch(r"layers\.([0-9]+)", folder)
        if layer:
            found.append(f"layer {layer[1]}")
        elif folder.startswith("rotary"):
            found.append("rotation")
        elif folder != "model":
            found.append(_PARTS.get(folder, folder))
    if not found and folders == ["model"]:
        return "attention mask"
    return ", ".join(found)


def parse_error(parser: Any, library: str) -> str:
    """Return the parser's first error on one line.

    Args:
        parser: TensorRT's, after `parse` returned false.
        library: what to call the builder.
    """
    if not parser.num_errors:
        return f"{library} cannot read the graph and gives no reason; export the bundle again"
    error = parser.get_error(0)
    name, operator = error.node_name(), error.node_operator() or "?"
    where = place(name) if name else ""
    node = name or f"node {error.node()}"
    reason = " ".join(str(error.desc()).split())
    return f"{library} cannot parse {node} ({operator}{' in ' + where if where else ''}): {reason}; {_remedy(operator)}"


def _remedy(operator: str) -> str:
    if operator in _NEWER:
        return "export with --dialect primitive, which spells this operator out in basic ones"
    if operator in ("DequantizeLinear", "QuantizeLinear"):
        return "export with another --precision, such as fp16"
    return "export with another --dialect, and see what `galerne check` says of the target"


def build_failure(errors: list[str]) -> str:
    """Return the cause among the errors that TensorRT logged while it built."""
    # Without a GPU, TensorRT ends each failure with an error about the driver, so the last that says otherwise counts.
    causes = [error for error in errors if "CUDA driver version is insufficient" not in error] or errors
    return causes[-1] if causes else "it gave no reason"
