"""The decoder as a PyTorch module that speaks the graph's contract. Parameter names are the checkpoint's.

Only its structure is used: it is built on the meta device, traced, and its weights are streamed in afterwards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galerne.export import ops
from galerne.export.spec import DecoderSpec
from galerne.runtime.manifest import layer_kinds


def rotary_frequencies(spec: DecoderSpec) -> Tensor:
    """Return the angle per position of each pair of channels, [D/2] float32. Source: RoFormer (arXiv 2104.09864)."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    return torch.reciprocal(torch.pow(spec.rope_theta, exponents))


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


def project(x: Tensor, *linears: nn.Linear) -> Tensor:
    """Apply linear layers that read the same input as one product: [..., in] to [..., sum of out]."""
    weight = linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])
    return torch.matmul(x, weight.t())


class RMSNorm(nn.Module):
    """A norm whose weight stays float32 whatever the graph computes in."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] to [..., E]."""
        normed: Tensor = ops.rms_norm(x, self.weight, self.eps)
        return normed


class Attention(nn.Module):
    """Grouped-query attention over the ring."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, spec.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, write_indices: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, E] to ([B, S, E], keys [B, Hkv, C, D], values [B, Hkv, C, D])."""
        widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        query, key, value = torch.split(project(x, self.q_proj, self.k_proj, self.v_proj), widths, dim=-1)
        query = ops.rotate(ops.split_heads(query, self.heads, self.head_dim), *rotary)
        key = ops.rotate(ops.split_heads(key, self.kv_heads, self.head_dim), *rotary)
        keys = ops.update_ring(past[0], key, write_indices)
        values = ops.update_ring(past[1], ops.split_heads(value, self.kv_heads, self.head_dim), write_indices)
        return project(ops.merge_heads(ops.attend(query, keys, values, mask)), self.o_proj), keys, values


class MLP(nn.Module):
    """SwiGLU. Source: arXiv 2002.05202."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)
        self.width = spec.intermediate_size

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] to [B, S, E]."""
        gate, up = torch.split(project(x, self.gate_proj, self.up_proj), [self.width, self.width], dim=-1)
        return project(gate * torch.sigmoid(gate) * up, self.down_proj)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, write_indices: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Attention.forward`, with the residual stream as x."""
        attended, keys, values = self.self_attn(self.input_layernorm(x), rotary, mask, write_indices, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


class Stack(nn.Module):
    """The embedding, the layers and the last norm: what checkpoints call `model`."""

    rotary_frequencies: Tensor

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_hidden_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.windows, self.layer_kinds = layer_kinds(spec.layer_windows)
        # Not persistent: no checkpoint holds it. On the meta device it is a name that the exporter fills in.
        self.register_buffer("rotary_frequencies", rotary_frequencies(spec), persistent=False)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, write_indices: Sequence[Tensor], past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the residual stream [B, S, E] and the rings after this run, keys and values by turns."""
        x = self.embed_tokens(input_ids)
        # [B, S, 1] times [D/2]: angles in float32 at any position, so no table bounds the length
        angles = position_ids.unsqueeze(-1).float() * self.rotary_frequencies
        rotary = (torch.cos(angles), torch.sin(angles))
        masks = [
            ring_mask(position_ids, past[2 * self.layer_kinds.index(kind)], window)
            for kind, window in enumerate(self.windows)
        ]
        present: list[Tensor] = []
        for i, (layer, kind) in enumerate(zip(self.layers, self.layer_kinds, strict=True)):
            x, keys, values = layer(x, rotary, masks[kind], write_indices[kind], (past[2 * i], past[2 * i + 1]))
            present += [keys, values]
        return x, present


class Decoder(nn.Module):
    """The whole model, input and output as the graph's contract says (docs/graph.md)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.model = Stack(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
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
        return project(x, self.lm_head).float(), present
