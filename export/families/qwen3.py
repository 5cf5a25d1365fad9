"""Qwen3: each head's query and key pass a norm. Source: transformers 5.24, models/qwen3/modeling_qwen3.py."""

from dataclasses import replace

from galerne.export.families.qwen2 import qwen_spec
from galerne.export.reader import ConfigReader
from galerne.export.spec import DecoderSpec

ARCHITECTURE = "Qwen3ForCausalLM"


def spec(config: ConfigReader) -> DecoderSpec:
    """Map a Qwen3 config to the decoder's spec."""
    config.integer("head_dim")  # it is not the usual hidden_size / num_attention_heads
    return replace(qwen_spec(config, ARCHITECTURE), qk_norm=True)
