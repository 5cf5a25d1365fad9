"""What a GGUF file's metadata says of its model, in the words of Hugging Face's `config.json`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galerne.errors import InputError
from galerne.export.checkpoint.gguf_architectures import ARCHITECTURES, Architecture
from galerne.export.checkpoint.gguf_header import Header, Value

_EMBEDDING = "token_embd.weight"
_ROPE_FACTORS = "rope_freqs.weight"
_LAYERS_OF_27B = 62
_GLOBAL = {
    _EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hugging_face_names(header: Header, path: Path) -> dict[str, str]:
    """Return llama.cpp's name of each tensor by its Hugging Face name.

    Raises: InputError on a tensor that a dense model of its architecture does not have, since the model would compute
        something else.
    """
    names = {}
    known, kind = architecture(header, path).layer_names, header.metadata["general.architecture"]
    for name in header.tensors:
        match = _LAYER_NAME.fullmatch(name)
        if name in _GLOBAL:
            names[_GLOBAL[name]] = name
        elif match and match[2] in known:
            names[f"model.layers.{match[1]}.{known[match[2]]}.{match[3]}"] = name
        elif name != _ROPE_FACTORS:
            raise InputError(f"{path}: {name}: no tensor of a dense {kind} model, so Galerne cannot run this one")
    return names


def architecture(header: Header, path: Path) -> Architecture:
    """Return how the file's model is stored. Raises: InputError if its architecture is not supported."""
    found = header.metadata.get("general.architecture")
    if not isinstance(found, str) or found not in ARCHITECTURES:
        raise InputError(
            f"{path}: general.architecture: {found!r} is not supported in a GGUF file; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[found]


def compose_config(header: Header, path: Path) -> dict[str, Any]:
    """Return the model's config.

    llama.cpp stores Mistral as its `llama` architecture and drops the window, so a Mistral v0.1 that was converted is
    indistinguishable here from a Llama: both read as LlamaForCausalLM without a window.

    Raises: InputError if the architecture is not supported, or a number that changes the answer is missing or wrong.
    """
    stored = architecture(header, path)
    meta = _Metadata(header.metadata, path)
    meta.check_whole()
    heads, hidden = meta.integer("attention.head_count"), meta.integer("embedding_length")
    if _EMBEDDING not in header.tensors:
        raise InputError(f"{path}: {_EMBEDDING}: no such tensor; expected the embedding")
    head_dim = meta.integer("attention.key_length", default=hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.integer(key, default=head_dim) != head_dim:
            raise InputError(
                f"{path}: {meta.prefix}.{key}: found {meta.integer(key)}, expected the head's size {head_dim}"
            )
    config = {
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        # llama.cpp takes 10000 where it is missing; a number that changes the answer has no silent default here.
        "rope_theta": meta.number("rope.freq_base"),
        "rope_scaling": meta.rope_scaling(factors=_ROPE_FACTORS in header.tensors),
        "max_position_embeddings": meta.integer("context_length"),
        "vocab_size": header.tensors[_EMBEDDING].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": any(re.search(r"\.attn_\w+\.bias$", name) for name in header.tensors),
        "mlp_bias": any(re.search(r"\.ffn_\w+\.bias$", name) for name in header.tensors),
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
        "sliding_window": meta.integer("attention.sliding_window", default=0) or None,
        **stored.config,
    }
    if stored.local_rotation:
        if config["num_hidden_layers"] == _LAYERS_OF_27B:
            raise InputError(
                f"{path}: a GGUF file of Gemma 3 27B does not say how scores are scaled; give its safetensors"
            )
        # llama.cpp's own: what its files leave out for this architecture.
        config["rope_local_base_freq"] = meta.number("rope.freq_base_swa", default=10000.0)
        config["query_pre_attn_scalar"] = head_dim
        config["attn_logit_softcapping"] = config["final_logit_softcapping"] = None
    return config


class _Metadata:
    """Reads the keys of the file's architecture, such as `llama.block_count`, with errors that name the key."""

    def __init__(self, metadata: Mapping[str, Value], path: Path) -> None:
        self._metadata, self._path = metadata, path
        self.prefix = metadata["general.architecture"]

    def check_whole(self) -> None:
        """Refuse a model that was split over several files."""
        parts = self._metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise InputError(
                f"{self._path}: split.count: one of {parts} files; "
                "join them with `llama-gguf-split --merge` and give the result"
            )

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer from 0."""
        value = self._get(key, default)
        if type(value) is not int or value < 0 or (value == 0 and default != 0):
            raise InputError(f"{self._path}: {self.prefix}.{key}: expected a positive integer, found {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self._path}: {self.prefix}.{key}: expected a number, found {value!r}")
        return float(value)

    def rope_scaling(self, factors: bool) -> dict[str, Value] | None:
        """Return what the file says of scaled positions, for the family to judge; None where it says nothing.

        factors: whether the file has a tensor of factors for each frequency, as Llama 3.1 has: llama.cpp applies them
            whatever the metadata say.
        """
        prefix = f"{self.prefix}.rope.scaling."
        found = {key.removeprefix(prefix): value for key, value in self._metadata.items() if key.startswith(prefix)}
        if (linear := f"{self.prefix}.rope.scale_linear") in self._metadata:  # what older converters wrote
            found.setdefault("factor", self._metadata[linear])
        kind = found.pop("type", "linear" if found.get("factor", 1) not in (0, 1) else "none")
        if factors:
            kind = "rope_freqs"
        return None if kind == "none" else {"rope_type": kind, **found}

    def _get(self, key: str, default: float | None) -> Value:
        value = self._metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise InputError(
                f"{self._path}: {self.prefix}.{key}: missing; convert the model again with a current llama.cpp"
            )
        return value
