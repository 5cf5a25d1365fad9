"""The operators that the traced module uses as wholes, so that each becomes the ONNX operators it should become.

`torch.export` would take an RMS norm or a change of head layout apart into arithmetic on shapes. As custom operators they
stay whole until a dialect (`galerne.export.dialects`) spells each in standard ONNX. Their bodies run the module in PyTorch
itself.
"""

import torch
from torch import Tensor


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
def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """Attention of query [B, Hq, S, D] over the slots of keys and values [B, Hkv, C, D] where mask [B, 1, S, C] is true.

    scale: of the scores; None for 1 / sqrt(D). softcap: the bound c in c * tanh(score / c); None for no bound.
    """
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    scores = (query @ keys.transpose(2, 3)).float() * (query.shape[3] ** -0.5 if scale is None else scale)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, -torch.inf)
    attended: Tensor = scores.softmax(dim=-1).to(values.dtype) @ values
    return attended


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
def _(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    return torch.empty_like(query)


@select_positions.register_fake
def _(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], indices.shape[1], x.shape[2])
