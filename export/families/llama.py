"""Llama 2 and 3, SmolLM2. Source: transformers 5.24, models/llama/modeling_llama.py."""

from galerne.export.reader import ConfigReader
from galerne.export.spec import DecoderSpec, base_spec

ARCHITECTURE = "LlamaForCausalLM"


def spec(config: ConfigReader) -> DecoderSpec:
    """Map a Llama config to the decoder's spec. Configs older than grouped heads leave `num_key_value_heads` out."""
    config.expect("sliding_window", None)
    return base_spec(
        config,
        ARCHITECTURE,
        sliding_window=None,
        num_key_value_heads=config.integer("num_key_value_heads", default=config.integer("num_attention_heads")),
    )
