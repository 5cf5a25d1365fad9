"""Qwen2 and Qwen2.5: q, k and v have a bias. Source: transformers 5.24, models/qwen2/modeling_qwen2.py."""

from dataclasses import replace

from galerne.export.reader import ConfigReader
from galerne.export.spec import DecoderSpec, base_spec

ARCHITECTURE = "Qwen2ForCausalLM"


def spec(config: ConfigReader) -> DecoderSpec:
    """Map a Qwen2 config to the decoder's spec."""
    return replace(qwen_spec(config, ARCHITECTURE), qkv_bias=True)


def qwen_spec(config: ConfigReader, architecture: str) -> DecoderSpec:
    """Read what all Qwen have: with `use_sliding_window` the first `max_window_layers` layers see every key all the same."""
    layers = config.integer("num_hidden_layers")
    window, full = None, layers
    if config.flag("use_sliding_window", default=False):
        window, full = config.integer("sliding_window"), config.integer("max_window_layers")
    return base_spec(
        config,
        architecture,
        sliding_window=window,
        num_key_value_heads=config.integer("num_key_value_heads"),
        layer_types=["full_attention" if i < full else "sliding_attention" for i in range(layers)],
    )
