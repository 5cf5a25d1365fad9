"""What families read from real models' configs, and what they refuse."""

from typing import Any

import pytest

from galerne.errors import InputError
from galerne.export.families.registry import families, read_spec
from galerne.export.spec import DecoderSpec

Config = dict[str, Any]

# Sizes are cut to two layers or so; the rest is as on the hub, where fields that a class takes for granted may be missing.
QWEN2: Config = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA2: Config = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA3: Config = {
    **GEMMA2,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "num_hidden_layers": 7,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
PHI3: Config = {
    **QWEN2,
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [8.0] * 32},
}
MIXTRAL: Config = {
    **QWEN2,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


def spec(config: Config, **changes: Any) -> DecoderSpec:
    merged = {key: value for key, value in {**config, **changes}.items() if value is not ...}
    return read_spec(merged, "config.json")


def test_qwen2_has_biases_and_uses_its_window_only_if_told() -> None:
    plain = spec(QWEN2)
    assert (plain.qkv_bias, plain.output_bias, plain.mlp_bias) == (True, False, False)
    assert plain.layer_windows == (None,) * 24
    assert plain.head_dim == 64
    windowed = spec(QWEN2, use_sliding_window=True)
    assert windowed.layer_windows == (None,) * 21 + (32768,) * 3


def test_gemma2_alternates() -> None:
    found = spec(GEMMA2)
    assert found.layer_windows == (4096, None, 4096, None)
    assert (found.attention_softcap, found.logit_softcap, found.attention_scale) == (50.0, 30.0, 1 / 16)
    assert (found.norm_offset, found.embedding_scale, found.hidden_act) == (1.0, 48.0, "gelu_tanh")
    assert found.tie_word_embeddings
    assert not found.qk_norm


def test_gemma3_rotates_windowed_layers_otherwise() -> None:
    found = spec(GEMMA3)
    assert found.layer_windows == (512,) * 5 + (None, 512)
    assert found.layer_rotary[0].theta == 1e4
    assert found.layer_rotary[0].frequencies[0] == 1.0
    assert found.layer_rotary[5].theta == 1e6
    assert found.layer_rotary[5].frequencies[0] == 1 / 8
    assert found.qk_norm
    assert found.attention_softcap is None


def test_phi3_is_limited_to_the_length_of_its_short_factors() -> None:
    found = spec(PHI3)
    assert found.context_limit == 4096
    assert found.fused_projections
    assert spec(PHI3, rope_scaling=None).context_limit is None


def test_mixtral_names_its_experts() -> None:
    found = spec(MIXTRAL)
    assert (found.num_experts, found.experts_per_token) == (8, 2)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (QWEN2, {"use_sliding_window": True, "max_window_layers": ...}, "max_window_layers: missing"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": ...}, "sliding_window: missing"),
        ({**QWEN2, "architectures": ["Qwen3ForCausalLM"]}, {}, "head_dim: missing"),
        (GEMMA2, {"attn_logit_softcapping": ...}, "attn_logit_softcapping: missing; expected a number or null"),
        (GEMMA2, {"query_pre_attn_scalar": ...}, "query_pre_attn_scalar: missing"),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation: 'gelu' is not supported; expected silu or gelu_py"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not supported"),
        (GEMMA3, {"rope_local_base_freq": ...}, "rope_local_base_freq: missing"),
        (GEMMA3, {"layer_types": ["full_attention"]}, "layer_types: expected a list of 7"),
        (PHI3, {"original_max_position_embeddings": ...}, "original_max_position_embeddings: missing"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok: 9 of 8 experts"),
        (MIXTRAL, {"quantization_config": {"bits": 4}}, "quantization_config: .* is not supported"),
        (
            QWEN2,
            {"architectures": ["Gemma3ForConditionalGeneration"]},
            "is not supported; supported: Gemma2ForCausalLM",
        ),
    ],
)
def test_refused_by_name(config: Config, changes: Config, message: str) -> None:
    with pytest.raises(InputError, match=rf"^config.json: .*{message}"):
        spec(config, **changes)


def test_every_family_has_a_short_file_of_its_own() -> None:
    for name, family in families().items():
        path = getattr(family, "__file__", "")
        with open(path, encoding="utf-8") as file:
            assert len(file.readlines()) <= 60, name
