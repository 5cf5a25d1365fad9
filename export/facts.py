"""What is known of a model from its config alone, without its weights."""

from pathlib import Path
from typing import Any

from galerne.errors import InputError
from galerne.export.families.registry import read_spec
from galerne.export.preset import preset_config, presets
from galerne.export.spec import DecoderSpec
from galerne.files import read_table
from galerne.runtime.manifest import ModelFacts

_CONFIG = "config.json"


def read_facts(source: str) -> tuple[ModelFacts, int | None]:
    """Return the facts of a model and the longest context that it takes, None where there is no limit.

    Args:
        source: a config.json, a checkpoint, or the name of a preset.
    Raises: InputError if it is none of them, or its model is not supported.
    """
    spec = read_spec(*_read_config(source))
    limit = spec.context_limit
    if limit is None and None in spec.layer_windows:
        limit = spec.max_position_embeddings
    return model_facts(spec), limit


def model_facts(spec: DecoderSpec) -> ModelFacts:
    """Return what a bundle's manifest says of a model."""
    return ModelFacts(
        architecture=spec.architecture,
        num_hidden_layers=spec.num_hidden_layers,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        layer_windows=spec.layer_windows,
        rope_theta=spec.layer_rotary[0].theta,
        max_position_embeddings=spec.max_position_embeddings,
        tie_word_embeddings=spec.tie_word_embeddings,
        bos_token_id=spec.bos_token_id,
        eos_token_ids=spec.eos_token_ids,
        num_experts=spec.num_experts,
        fused_projections=spec.fused_projections,
    )


def _read_config(source: str) -> tuple[dict[str, Any], str]:
    path = Path(source)
    if not path.exists():
        if source in presets():
            return preset_config(source), f"preset {source}"
        raise InputError(
            f"{source}: no such file or folder; expected a bundle, a config.json, a checkpoint, or one of the presets "
            f"{', '.join(presets())}"
        )
    file = path / _CONFIG if path.is_dir() else path
    if file.is_file() and file.suffix == ".json":
        # How a checkpoint's own weights are quantized does not matter: the recipe says how they would be stored.
        return {key: value for key, value in read_table(file).items() if key != "quantization_config"}, str(file)
    from galerne.export.checkpoint.open import open_checkpoint

    return open_checkpoint(path).config, source
