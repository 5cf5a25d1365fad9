"""What the decoder module needs to know of a model, read from its config by a family."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from galerne.errors import InputError


@dataclass(frozen=True)
class DecoderSpec:
    """One decoder-only transformer: RMS norms, rotary positions over half the head, grouped heads, a SwiGLU MLP.

    layer_windows: for each layer the number of newest positions that a query sees, itself included; None where it sees all.
    tie_word_embeddings: whether the vocabulary projection is the embedding table.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    layer_windows: tuple[int | None, ...]
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


class ConfigReader:
    """Reads fields of a `config.json` with errors that name the field. Unknown fields are ignored."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; `default` stands in where the field is absent or null."""
        value = self._config.get(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self._where}: {key}: missing; expected an integer")
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise InputError(f"{self._where}: {key}: expected a positive integer, found {value!r}")
        return value

    def number(self, key: str) -> float:
        """Return a positive, finite number."""
        return self._number(key, self._config.get(key))

    def nullable_integer(self, key: str) -> int | None:
        """Return a positive integer or None; the field must be there, since leaving it out changes the answer."""
        if key not in self._config:
            raise InputError(f"{self._where}: {key}: missing; expected an integer or null")
        return None if self._config[key] is None else self.integer(key)

    def layer_windows(self, layers: int, window: int | None) -> tuple[int | None, ...]:
        """Return the window of each of `layers` layers: that of `layer_types`, or `window` for all without that field."""
        kinds = self._config.get("layer_types") or ["sliding_attention"] * layers
        known = {"sliding_attention": window, "full_attention": None}
        if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
            raise InputError(
                f"{self._where}: layer_types: expected a list of {layers}, each {' or '.join(known)}, found {kinds!r}"
            )
        return tuple(known[kind] for kind in kinds)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._config.get(key, default)
        if not isinstance(value, bool):
            raise InputError(f"{self._where}: {key}: expected true or false, found {value!r}")
        return value

    def rope_theta(self) -> float:
        """Return the base of the rotary frequencies, which must be unscaled.

        transformers 5 writes it under `rope_parameters`, checkpoints made before that at the top level.
        """
        parameters = self._config.get("rope_parameters") or {}
        scaling = self._config.get("rope_scaling") or {}
        for key, table in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if not isinstance(table, Mapping):
                raise InputError(f"{self._where}: {key}: expected a table, found {table!r}")
            kind = table.get("rope_type", table.get("type", "default"))
            if kind != "default":
                raise InputError(f"{self._where}: {key}: rope_type {kind!r} is not supported; expected 'default'")
        return self._number("rope_theta", parameters.get("rope_theta", self._config.get("rope_theta")))

    def expect(self, key: str, wanted: object) -> None:
        """Refuse a config whose field has another value than the decoder implements; absent or null passes."""
        value = self._config.get(key)
        if value is not None and value != wanted:
            raise InputError(f"{self._where}: {key}: {value!r} is not supported; expected {wanted!r}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return a token id or a list of them; absent or null gives none."""
        value = self._config.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
            raise InputError(f"{self._where}: {key}: expected a token id or a list of them, found {value!r}")
        return tuple(values)

    def _number(self, key: str, value: object) -> float:
        if value is None:
            raise InputError(f"{self._where}: {key}: missing; expected a number")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise InputError(f"{self._where}: {key}: expected a positive number, found {value!r}")
        return float(value)


def base_spec(
    config: ConfigReader, architecture: str, *, sliding_window: int | None, num_key_value_heads: int
) -> DecoderSpec:
    """Read the fields that every family of this decoder spells the same way.

    Args:
        sliding_window: of the layers that have one: all, unless `layer_types` in the config names others.
    """
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    layers = config.integer("num_hidden_layers")
    bos = config.token_ids("bos_token_id")
    config.expect("hidden_act", "silu")
    config.expect("attention_bias", False)
    config.expect("mlp_bias", False)
    config.expect("quantization_config", None)
    spec = DecoderSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=config.integer("head_dim", default=hidden // heads),
        rms_norm_eps=config.number("rms_norm_eps"),
        rope_theta=config.rope_theta(),
        layer_windows=config.layer_windows(layers, sliding_window),
        max_position_embeddings=config.integer("max_position_embeddings"),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=config.token_ids("eos_token_id"),
    )
    if heads % num_key_value_heads:
        raise InputError(
            f"config: num_attention_heads: {heads} is no multiple of num_key_value_heads {num_key_value_heads}"
        )
    if spec.head_dim % 2:
        raise InputError(f"config: head_dim: {spec.head_dim} is odd; rotary positions need an even one")
    return spec
