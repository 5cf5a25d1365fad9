"""Gemma 3, text only: five of six layers have a window and angles of their own. Source: transformers 5.24, models/gemma3."""

from dataclasses import replace

from galerne.export.families.gemma2 import gemma_spec
from galerne.export.reader import ConfigReader
from galerne.export.rotary import read_rotary
from galerne.export.spec import DecoderSpec

ARCHITECTURE = "Gemma3ForCausalLM"
_PATTERN = 6


def spec(config: ConfigReader) -> DecoderSpec:
    """Map a Gemma 3 config to the decoder's spec.

    Configs made before transformers 5 keep the base of the windowed layers' frequencies in a field of its own, and the
    scaling is not meant for these layers.
    """
    config.integer("head_dim")  # it is not the usual hidden_size / num_attention_heads
    base = replace(gemma_spec(config, ARCHITECTURE, config.integer("sliding_window_pattern", _PATTERN)), qk_norm=True)
    if config.has("rope_parameters"):
        return base
    theta = ConfigReader({"rope_theta": config.number("rope_local_base_freq")}, config.where)
    local = read_rotary(theta, base.head_dim)
    return replace(
        base,
        layer_rotary=tuple(
            rotary if window is None else local
            for rotary, window in zip(base.layer_rotary, base.layer_windows, strict=True)
        ),
    )
