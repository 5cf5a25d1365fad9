"""Ministral 8B: layers with a window and layers that see every key. Source: transformers 5.24, models/ministral."""

from galerne.export.families.mistral import mistral_spec
from galerne.export.reader import ConfigReader
from galerne.export.spec import DecoderSpec

ARCHITECTURE = "MinistralForCausalLM"


def spec(config: ConfigReader) -> DecoderSpec:
    """Map a Ministral config to the decoder's spec; `layer_types` says which layers have the window."""
    return mistral_spec(config, ARCHITECTURE)
