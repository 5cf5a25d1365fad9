"""Gemma 2: windows in every other layer, scores and logits bounded. Source: transformers 5.24, models/gemma2."""

from dataclasses import replace

from galerne.export.reader import ConfigReader
from galerne.export.spec import DecoderSpec, base_spec

ARCHITECTURE = "Gemma2ForCausalLM"
_PATTERN = 2


def spec(config: ConfigReader) -> DecoderSpec:
    """Map a Gemma 2 config to the decoder's spec."""
    return gemma_spec(config, ARCHITECTURE, _PATTERN)


def gemma_spec(config: ConfigReader, architecture: str, pattern: int) -> DecoderSpec:
    """Read what Gemma 2 and 3 share; without `layer_types` each `pattern`-th layer sees every key."""
    config.expect("use_bidirectional_attention", False)
    layers = config.integer("num_hidden_layers")
    base = base_spec(
        config,
        architecture,
        sliding_window=config.integer("sliding_window"),
        num_key_value_heads=config.integer("num_key_value_heads"),
        layer_types=["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)],
        activation="hidden_activation",
    )
    return replace(
        base,
        embedding_scale=base.hidden_size**0.5,
        norm_offset=1.0,
        post_norms=True,
        wide_residual=True,
        attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=config.nullable_number("attn_logit_softcapping"),
        logit_softcap=config.nullable_number("final_logit_softcapping"),
        # Gemma's configs leave out what its class takes for granted.
        tie_word_embeddings=config.flag("tie_word_embeddings", default=True),
    )
