"""Ministral 8B: layers with a window and layers that see every key. Source: transformers 5.24, models/ministral."""

from galerne.export.reader import ConfigReader
from galerne.export.spec import DecoderSpec, base_spec

ARCHITECTURE = "MinistralForCausalLM"


def spec(config: ConfigReader) -> DecoderSpec:
    """Map a Ministral config to the decoder's spec; `layer_types` says which layers have the window."""
    return base_spec(
        config,
        ARCHITECTURE,
        sliding_window=config.nullable_integer("sliding_window"),
        num_key_value_heads=config.integer("num_key_value_heads"),
    )
