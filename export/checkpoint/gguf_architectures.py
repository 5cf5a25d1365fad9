"""The architectures of llama.cpp that are read: what each calls a layer's tensors, and what its files leave unsaid."""

from dataclasses import dataclass, field
from typing import Any

_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True)
class Architecture:
    """How a model of an architecture is stored.

    config: the fields of Hugging Face's `config.json` that are the same for all its models.
    layer_names: Hugging Face's name of each of a layer's tensors by llama.cpp's.
    neighbours_rotate: whether rows of query and key are ordered for a rotation of neighbouring channels, and not of halves.
    norm_offset: what the stored weights of norms are too large by.
    local_rotation: whether the layers that have a window rotate by angles of their own.
    """

    config: dict[str, Any]
    layer_names: dict[str, str] = field(default_factory=lambda: _COMMON)
    neighbours_rotate: bool = False
    norm_offset: float = 0.0
    local_rotation: bool = False


ARCHITECTURES = {
    "llama": Architecture(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}, neighbours_rotate=True
    ),
    "qwen2": Architecture(
        # q, k and v always have a bias and the output never has: `attention_bias` would be about all four.
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "attention_bias": False,
        }
    ),
    "qwen3": Architecture(
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"}, _COMMON | _HEAD_NORMS
    ),
    "gemma3": Architecture(
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window_pattern": 6,
        },
        _COMMON
        | _HEAD_NORMS
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
        local_rotation=True,
    ),
}
