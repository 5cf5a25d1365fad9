"""The operators that the traced module uses as wholes, so that each becomes the ONNX operators it should become.

`torch.export` would take an RMS norm or a change of head layout apart into arithmetic on shapes. As custom operators they
stay whole until `translations` spells each in standard ONNX. Their bodies run the module in PyTorch itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript.values import Opset
from torch import Tensor

_onnx = Opset("", 24)


@torch.library.custom_op("galerne::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize the last axis by its root mean square, in float32; the result has the type of `x`."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed: Tensor = wide * scale * weight.float()
    return normed.to(x.dtype)


@torch.library.custom_op("galerne::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head, in float32: x [B, H, S, D], cos and sin [B, S, D/2] float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated: Tensor = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


@torch.library.custom_op("galerne::split_heads", mutates_args=())
def split_heads(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """[B, S, H*D] to [B, H, S, D]."""
    split: Tensor = x.unflatten(-1, (heads, head_dim))
    return split.transpose(1, 2).contiguous()


@torch.library.custom_op("galerne::merge_heads", mutates_args=())
def merge_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] to [B, S, H*D]."""
    return x.transpose(1, 2).flatten(2)


@torch.library.custom_op("galerne::update_ring", mutates_args=())
def update_ring(past: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    """Write `new` [B, H, S, D] into the ring `past` [B, H, C, D] from slot write_indices[b] on; S slots must be left."""
    ring = past.clone()
    for row, start in enumerate(write_indices.tolist()):
        ring[row, :, start : start + new.shape[2]] = new[row]
    return ring


@torch.library.custom_op("galerne::held_positions", mutates_args=())
def held_positions(position_ids: Tensor, ring: Tensor) -> Tensor:
    """The position that each slot of the ring [B, H, C, D] holds once position_ids [B, S] are written: [B, C] int64.

    With p the newest position, the last of its row, slot j holds p - ((p - j) mod C); a slot that nothing was written to
    yet comes out negative.
    """
    newest, capacity = position_ids[:, -1:], ring.shape[2]
    return newest - torch.remainder(newest - torch.arange(capacity, device=newest.device), capacity)


@torch.library.custom_op("galerne::attend", mutates_args=())
def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of query [B, Hq, S, D] over the slots of keys and values [B, Hkv, C, D] where mask [B, 1, S, C] is true."""
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


@torch.library.custom_op("galerne::select_positions", mutates_args=())
def select_positions(x: Tensor, indices: Tensor) -> Tensor:
    """x [B, S, E] and indices [B, K] to [B, K, E]."""
    return torch.gather(x, 1, indices[..., None].expand(-1, -1, x.shape[2]))


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


@split_heads.register_fake
def _(x: Tensor, heads: int, head_dim: int) -> Tensor:
    return x.new_empty(x.shape[0], heads, x.shape[1], head_dim)


@merge_heads.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


@update_ring.register_fake
def _(past: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    return torch.empty_like(past)


@held_positions.register_fake
def _(position_ids: Tensor, ring: Tensor) -> Tensor:
    return position_ids.new_empty(position_ids.shape[0], ring.shape[2])


@attend.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(query)


@select_positions.register_fake
def _(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], indices.shape[1], x.shape[2])


def translations(compute_type: torch.dtype) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how `torch.onnx.export` spells each operator in opset 24.

    Norms and rotation run in float32 between casts where the graph computes in another type.
    """
    narrow = {torch.float16: 10, torch.bfloat16: 16}.get(compute_type)  # onnx.TensorProto's numbers of the types

    def wide(x: Any) -> Any:
        return x if narrow is None else _onnx.Cast(x, to=1)

    def back(x: Any) -> Any:
        return x if narrow is None else _onnx.Cast(x, to=narrow)

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

    def onnx_attend(query: Any, keys: Any, values: Any, mask: Any) -> Any:
        # The explicit mask and nothing else: TensorRT drops nonpad_kv_seqlen and reads is_causal from the upper left.
        return _onnx.Attention(query, keys, values, mask)[0]

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
