"""Mistral 7B v0.1 to v0.3 and Mistral-Nemo. Source: transformers 5.24, models/mistral/modeling_mistral.py.

v0.1 has a window of 4096; v0.2 and later say `"sliding_window": null`, and then every key is seen.
"""

from galerne.export.reader import ConfigReader
from galerne.export.spec import DecoderSpec, base_spec

ARCHITECTURE = "MistralForCausalLM"


def spec(config: ConfigReader) -> DecoderSpec:
    """Map a Mistral config to the decoder's spec."""
    return mistral_spec(config, ARCHITECTURE)


def mistral_spec(config: ConfigReader, architecture: str) -> DecoderSpec:
    """Read what all Mistrals have: the window must be said, null included."""
    return base_spec(
        config,
        architecture,
        sliding_window=config.nullable_integer("sliding_window"),
        num_key_value_heads=config.integer("num_key_value_heads"),
    )
