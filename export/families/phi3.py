"""Phi-3, Phi-3.5 and Phi-4-mini: fused projections. Source: transformers 5.24, models/phi3/modeling_phi3.py.

With `longrope` a text may be as long as `original_max_position_embeddings`: see `galerne.export.rotary`.
"""

from dataclasses import replace

from galerne.export.reader import ConfigReader
from galerne.export.spec import DecoderSpec, base_spec

ARCHITECTURE = "Phi3ForCausalLM"


def spec(config: ConfigReader) -> DecoderSpec:
    """Map a Phi-3 config to the decoder's spec."""
    base = base_spec(
        config,
        ARCHITECTURE,
        sliding_window=config.nullable_integer("sliding_window"),
        num_key_value_heads=config.integer("num_key_value_heads", default=config.integer("num_attention_heads")),
    )
    return replace(base, fused_projections=True)
