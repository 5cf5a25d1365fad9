"""Mistral's own `params.json`, in the words of Hugging Face's `config.json`, and the names of its tensors.

Source: mistral-inference, args.py and transformer_layers.py; vLLM, transformers_utils/configs/mistral.py.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from galerne.errors import InputError

_FIELDS = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
# What changes the answer and is not built.
_REFUSED = (
    *("moe", "vision_encoder", "multimodal", "quantization", "yarn", "llama_4_scaling", "use_biases", "lora"),
    *("q_lora_rank", "kv_lora_rank", "ada_rms_norm_t_cond"),
)
# What Hugging Face's conversion takes where params.json does not say; it sizes the ring, and the weights do not depend on it.
_MAX_POSITIONS = 32768
_GLOBAL = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_LAYER_NAME = re.compile(r"layers\.(\d+)\.([\w.]+)\.weight")


def hugging_face_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """Return Mistral's name of each tensor by its Hugging Face name.

    Raises: InputError on a tensor that a dense Mistral does not have, since the model would compute something else.
    """
    found = {}
    for name in names:
        match = _LAYER_NAME.fullmatch(name)
        if name in _GLOBAL:
            found[_GLOBAL[name]] = name
        elif match and match[2] in _IN_LAYER:
            found[f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.weight"] = name
        else:
            raise InputError(f"{path}: {name}: no tensor of a dense Mistral, so Galerne cannot run this one")
    return found


def compose_config(params: Mapping[str, Any], where: str, *, tied: bool) -> dict[str, Any]:
    """Return the model's config.

    Args:
        params: as params.json reads.
        where: the file, for messages.
        tied: whether the vocabulary projection is the embedding table.
    Raises: InputError if a number that changes the answer is missing, or the model needs what is not built.
    """
    for key in _REFUSED:
        if params.get(key):
            raise InputError(
                f"{where}: {key}: {_short(params[key])} is not supported; expected a dense text model without it"
            )
    if params.get("causal", True) is not True:
        raise InputError(f"{where}: causal: {params['causal']!r} is not supported; expected true")
    config: dict[str, Any] = {}
    for key, name in _FIELDS.items():
        value = params.get(key)
        if isinstance(value, bool) or not isinstance(value, float if key == "norm_eps" else int):
            raise InputError(f"{where}: {key}: expected a number, found {value!r}")
        config[name] = value
    theta = params.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise InputError(
            f"{where}: rope_theta: expected a number, found {theta!r}; Mistral 7B v0.1, which leaves it out, has 10000.0"
        )
    window, layer_types = _windows(params, config["num_hidden_layers"], where)
    if layer_types is not None:
        config["layer_types"] = layer_types
    return config | {
        "architectures": ["MistralForCausalLM" if layer_types is None else "MinistralForCausalLM"],
        "model_type": "mistral" if layer_types is None else "ministral",
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": float(theta)},
        "sliding_window": window,
        "max_position_embeddings": params.get("max_position_embeddings") or params.get("max_seq_len") or _MAX_POSITIONS,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _windows(params: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, list[str] | None]:
    """Return the window, and each layer's kind where it is a list that repeats over the layers: null for a full one."""
    key = "_sliding_window" if params.get("_sliding_window") is not None else "sliding_window"
    value = params.get(key)
    if value is None or (type(value) is int and value > 0):
        return value, None
    if isinstance(value, list) and value and layers % len(value) == 0:
        sizes = {size for size in value if size is not None}
        if not sizes:
            return None, None
        if len(sizes) == 1 and all(type(size) is int and size > 0 for size in sizes):
            kinds = ["full_attention" if size is None else "sliding_attention" for size in value]
            return sizes.pop(), None if len(set(kinds)) == 1 else kinds * (layers // len(value))
    raise InputError(
        f"{where}: {key}: expected null, a number or a list of one number and nulls that divides {layers} layers, found {value!r}"
    )


def _short(value: object) -> str:
    return "a table" if isinstance(value, Mapping) else repr(value)
