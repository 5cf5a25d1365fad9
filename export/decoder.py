"""The decoder as a PyTorch module that speaks the graph's contract. Parameter names are the checkpoint's.

Only its structure is used: it is built on the meta device, traced, and its weights are streamed in afterwards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galerne.export import ops
from galerne.export.mlp import MLP, Mixture, project
from galerne.export.rotary import Rotary
from galerne.export.spec import DecoderSpec
from galerne.runtime.manifest import layer_kinds


def ring_mask(position_ids: Tensor, ring: Tensor, window: int | None) -> Tensor:
    """Return which slots of the ring [B, H, C, D] each query sees, [B, 1, S, C] bool.

    Padding at a row's end goes on counting, so the newest position is the last one fed.
    """
    held: Tensor = ops.held_positions(position_ids, ring).unsqueeze(1)  # [B, 1, C]
    query = position_ids.unsqueeze(2)  # [B, S, 1]
    seen: Tensor = (held >= 0) & (held <= query)
    if window is not None:
        seen = seen & (held > query - window)
    return seen.unsqueeze(1)


class RMSNorm(nn.Module):
    """A norm whose weight stays float32 whatever the graph computes in."""

    def __init__(self, size: int, spec: DecoderSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.eps, self.offset = spec.rms_norm_eps, spec.norm_offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] to [..., E]."""
        # The sum of two constants, which an engine folds when it loads the graph.
        weight = self.weight + self.offset if self.offset else self.weight
        normed: Tensor = ops.rms_norm(x, weight, self.eps)
        return normed


class RotaryAngles(nn.Module):
    """Cosine and sine of the angles that layers turn their heads by."""

    frequencies: Tensor

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        # Not persistent: no checkpoint holds it. On the meta device it is a name that the exporter fills in.
        self.register_buffer("frequencies", torch.tensor(rotary.frequencies), persistent=False)
        self.scale = rotary.scale

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] to cosine and sine [B, S, R/2] float32, for R rotated channels of a head."""
        # [B, S, 1] times [R/2]: angles in float32 at any position, so no table bounds the length
        angles = position_ids.unsqueeze(-1).float() * self.frequencies
        cos, sin = torch.cos(angles), torch.sin(angles)
        return (cos, sin) if self.scale == 1 else (cos * self.scale, sin * self.scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R channels of each head [B, H, S, D] by the angles of cos and sin [B, S, R/2]."""
    rotated, head_dim = 2 * cos.shape[-1], x.shape[-1]
    if rotated == head_dim:
        whole: Tensor = ops.rotate(x, cos, sin)
        return whole
    first, rest = torch.split(x, [rotated, head_dim - rotated], dim=-1)
    return torch.cat((ops.rotate(first, cos, sin), rest), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention over the ring."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.scale, self.softcap = spec.attention_scale, spec.attention_softcap
        self.widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        apart = dict(zip(("q_proj", "k_proj", "v_proj"), self.widths, strict=True))
        self.inputs = {"qkv_proj": sum(self.widths)} if spec.fused_projections else apart
        for name, width in self.inputs.items():
            self.add_module(name, nn.Linear(spec.hidden_size, width, bias=spec.qkv_bias))
        self.o_proj = nn.Linear(self.heads * self.head_dim, spec.hidden_size, bias=spec.output_bias)
        self.q_norm = RMSNorm(self.head_dim, spec) if spec.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, spec) if spec.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, write_indices: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, E] to ([B, S, E], keys [B, Hkv, C, D], values [B, Hkv, C, D])."""
        projected = project(x, (getattr(self, name) for name in self.inputs))
        query, key, value = torch.split(projected, self.widths, dim=-1)
        query = rotate(self.q_norm(ops.split_heads(query, self.heads, self.head_dim)), *rotary)
        key = rotate(self.k_norm(ops.split_heads(key, self.kv_heads, self.head_dim)), *rotary)
        keys = ops.update_ring(past[0], key, write_indices)
        values = ops.update_ring(past[1], ops.split_heads(value, self.kv_heads, self.head_dim), write_indices)
        attended = ops.attend(query, keys, values, mask, self.scale, self.softcap)
        return project(ops.merge_heads(attended), [self.o_proj]), keys, values


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec)
        self.post_norms = spec.post_norms
        if spec.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(spec.hidden_size, spec)
            self.post_feedforward_layernorm = RMSNorm(spec.hidden_size, spec)
        self.mlp_name = "block_sparse_moe" if spec.num_experts else "mlp"
        self.add_module(self.mlp_name, Mixture(spec) if spec.num_experts else MLP(spec))

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, write_indices: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Attention.forward`, with the residual stream as x."""
        mlp = getattr(self, self.mlp_name)
        attended, keys, values = self.self_attn(self.input_layernorm(x), rotary, mask, write_indices, past)
        if self.post_norms:
            x = x + self.post_attention_layernorm(attended.to(x.dtype))
            fed = mlp(self.pre_feedforward_layernorm(x))
            return x + self.post_feedforward_layernorm(fed.to(x.dtype)), keys, values
        x = x + attended.to(x.dtype)
        return x + mlp(self.post_attention_layernorm(x)).to(x.dtype), keys, values


class Stack(nn.Module):
    """The embedding, the layers and the last norm: what checkpoints call `model`."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.embedding_scale, self.wide_residual = spec.embedding_scale, spec.wide_residual
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_hidden_layers))
        self.norm = RMSNorm(spec.hidden_size, spec)
        self.windows, self.layer_kinds = layer_kinds(spec.layer_windows)
        rotaries = list(dict.fromkeys(spec.layer_rotary))
        self.rotary = nn.ModuleList(map(RotaryAngles, rotaries))
        self.layer_rotary = [rotaries.index(rotary) for rotary in spec.layer_rotary]

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, write_indices: Sequence[Tensor], past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the residual stream [B, S, E] and the rings after this run, keys and values by turns."""
        x = self.embed_tokens(input_ids)
        if self.wide_residual:
            x = x.float()
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        rotations = [rotary(position_ids) for rotary in self.rotary]
        masks = [
            ring_mask(position_ids, past[2 * self.layer_kinds.index(kind)], window)
            for kind, window in enumerate(self.windows)
        ]
        present: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            kind, rotation = self.layer_kinds[i], rotations[self.layer_rotary[i]]
            x, keys, values = layer(x, rotation, masks[kind], write_indices[kind], (past[2 * i], past[2 * i + 1]))
            present += [keys, values]
        return x, present


class Decoder(nn.Module):
    """The whole model, input and output as the graph's contract says (docs/graph.md)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.model = Stack(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.softcap = spec.logit_softcap
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_indices: Sequence[Tensor],
        logit_indices: Tensor,
        past: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Return logits [B, K, V] float32 and the rings after this run."""
        x, present = self.model(input_ids, position_ids, write_indices, past)
        x = self.model.norm(ops.select_positions(x, logit_indices))
        logits = project(x, [self.lm_head]).float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits, present
