"""Opset 24: attention, the ring's update, rotation and norms are one operator each."""

from typing import Any

import torch
from onnx_ir import DataType
from onnxscript.values import Opset

from galerne.export.dialects.dialect import Translations, basic_attend, casts, layout

OPSET = 24
_onnx = Opset("", OPSET)


def translations(compute_type: torch.dtype) -> Translations:
    """Return how `torch.onnx.export` spells each operator of `galerne.export.ops`.

    Norms and rotation run in float32 between casts where the graph computes in another type.
    """
    wide, back = casts(_onnx, compute_type)
    in_basics = basic_attend(_onnx, compute_type)

    def onnx_rms_norm(x: Any, weight: Any, eps: float) -> Any:
        normed = _onnx.RMSNormalization(wide(x), weight, axis=-1, epsilon=eps)
        return normed if x.dtype == DataType.FLOAT else back(normed)

    def onnx_rotate(x: Any, cos: Any, sin: Any) -> Any:
        return back(_onnx.RotaryEmbedding(wide(x), cos, sin))

    def onnx_update_ring(past: Any, new: Any, write_indices: Any) -> Any:
        # "linear" and not "circular": TensorRT has the linear one only, so the caller splits at the ring's end.
        return _onnx.TensorScatter(past, new, write_indices, axis=2, mode="linear")

    def onnx_attend(
        query: Any, keys: Any, values: Any, mask: Any, scale: float | None = None, softcap: float | None = None
    ) -> Any:
        if softcap is not None:  # TensorRT does not parse an Attention that has one
            return in_basics(query, keys, values, mask, scale, softcap)
        # The explicit mask and nothing else: TensorRT drops nonpad_kv_seqlen and reads is_causal from the upper left.
        return _onnx.Attention(query, keys, values, mask, **({} if scale is None else {"scale": scale}))[0]

    ops = torch.ops.galerne
    return {
        **layout(_onnx),
        ops.rms_norm.default: onnx_rms_norm,
        ops.rotate.default: onnx_rotate,
        ops.update_ring.default: onnx_update_ring,
        ops.attend.default: onnx_attend,
    }
