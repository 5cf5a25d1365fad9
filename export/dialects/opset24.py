"""Opset 24: attention, the ring's update, rotation and norms are one operator each."""

from typing import Any

import torch
from onnxscript.values import Opset

from galerne.export import ops as _defined  # noqa: F401  defines torch.ops.galerne
from galerne.export.dialects.dialect import Translations, casts

OPSET = 24
_onnx = Opset("", OPSET)
# The score of a slot that is not seen: in float32, exp of it is exactly 0 beside any score that is.
_HIDDEN = -1e30


def translations(compute_type: torch.dtype) -> Translations:
    """Return how `torch.onnx.export` spells each operator of `galerne.export.ops`.

    Norms and rotation run in float32 between casts where the graph computes in another type.
    """
    wide, back = casts(_onnx, compute_type)

    def onnx_rms_norm(x: Any, weight: Any, eps: float) -> Any:
        return back(_onnx.RMSNormalization(wide(x), weight, axis=-1, epsilon=eps))

    def onnx_rotate(x: Any, cos: Any, sin: Any) -> Any:
        return back(_onnx.RotaryEmbedding(wide(x), cos, sin))

    def onnx_split_heads(x: Any, heads: int, head_dim: int) -> Any:
        return _onnx.Transpose(_onnx.Reshape(x, _onnx.Constant(value_ints=[0, 0, heads, head_dim])), perm=[0, 2, 1, 3])

    def onnx_merge_heads(x: Any) -> Any:
        return _onnx.Reshape(_onnx.Transpose(x, perm=[0, 2, 1, 3]), _onnx.Constant(value_ints=[0, 0, -1]))

    def onnx_update_ring(past: Any, new: Any, write_indices: Any) -> Any:
        # "linear" and not "circular": TensorRT has the linear one only, so the caller splits at the ring's end.
        return _onnx.TensorScatter(past, new, write_indices, axis=2, mode="linear")

    def onnx_held_positions(position_ids: Any, ring: Any) -> Any:
        newest = _onnx.Gather(position_ids, _onnx.Constant(value_ints=[-1]), axis=1)
        capacity = _onnx.Squeeze(_onnx.Shape(ring, start=2, end=3))
        slots = _onnx.Range(_onnx.Constant(value_int=0), capacity, _onnx.Constant(value_int=1))
        return _onnx.Sub(newest, _onnx.Mod(_onnx.Sub(newest, slots), capacity))

    def onnx_attend(
        query: Any, keys: Any, values: Any, mask: Any, scale: float | None = None, softcap: float | None = None
    ) -> Any:
        # The explicit mask and nothing else: TensorRT drops nonpad_kv_seqlen and reads is_causal from the upper left.
        if softcap is None:
            return _onnx.Attention(query, keys, values, mask, **({} if scale is None else {"scale": scale}))[0]
        # TensorRT does not parse an Attention that has a softcap.
        kv_heads, head_dim = keys.shape[1], keys.shape[3]
        groups = query.shape[1] // kv_heads
        scaled = _onnx.Mul(wide(query), _onnx.Constant(value_float=scale or head_dim**-0.5))
        # Query heads that share a key head stand below each other, so that no key is repeated: [B, Hkv, G*S, D].
        stacked = _onnx.Reshape(back(scaled), _onnx.Constant(value_ints=[0, kv_heads, -1, head_dim]))
        scores = wide(_onnx.MatMul(stacked, _onnx.Transpose(keys, perm=[0, 1, 3, 2])))
        bound = _onnx.Constant(value_float=softcap)
        scores = _onnx.Mul(_onnx.Tanh(_onnx.Div(scores, bound)), bound)
        seen = _onnx.Concat(*[mask] * groups, axis=2) if groups > 1 else mask  # [B, 1, G*S, C]
        weights = _onnx.Softmax(_onnx.Where(seen, scores, _onnx.Constant(value_float=_HIDDEN)), axis=-1)
        attended = _onnx.MatMul(back(weights), values)
        heads = _onnx.Constant(value_ints=[0, kv_heads * groups, -1, head_dim])
        return _onnx.Reshape(attended, heads)

    def onnx_select_positions(x: Any, indices: Any) -> Any:
        return _onnx.GatherND(x, _onnx.Unsqueeze(indices, _onnx.Constant(value_ints=[-1])), batch_dims=1)

    ops = torch.ops.galerne
    return {
        ops.rms_norm.default: onnx_rms_norm,
        ops.rotate.default: onnx_rotate,
        ops.split_heads.default: onnx_split_heads,
        ops.merge_heads.default: onnx_merge_heads,
        ops.update_ring.default: onnx_update_ring,
        ops.held_positions.default: onnx_held_positions,
        ops.attend.default: onnx_attend,
        ops.select_positions.default: onnx_select_positions,
    }
