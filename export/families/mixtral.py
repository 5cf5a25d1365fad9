"""Mixtral: Mistral with several MLPs. Source: transformers 5.24, models/mixtral/modeling_mixtral.py.

All experts run in the graph: see `galerne.export.mlp.Mixture` for what that costs.
"""

from dataclasses import replace

from galerne.errors import InputError
from galerne.export.families.mistral import mistral_spec
from galerne.export.reader import ConfigReader
from galerne.export.spec import DecoderSpec

ARCHITECTURE = "MixtralForCausalLM"


def spec(config: ConfigReader) -> DecoderSpec:
    """Map a Mixtral config to the decoder's spec."""
    experts, chosen = config.integer("num_local_experts"), config.integer("num_experts_per_tok")
    if chosen > experts:
        raise InputError(
            f"{config.where}: num_experts_per_tok: {chosen} of {experts} experts; expected no more than those"
        )
    return replace(mistral_spec(config, ARCHITECTURE), num_experts=experts, experts_per_token=chosen)
