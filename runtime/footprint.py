"""How many bytes a model's weights and its cache take, and how many of them a step reads."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from galerne.runtime.manifest import ModelFacts

_FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}
_QUANTIZED = {"int8": 1.0, "uint8": 1.0, "int4": 0.5, "uint4": 0.5, "float8e4m3fn": 1.0}
_SCALE_BYTES = 2
# A block that does not divide the input axis gives way to the next smaller one.
_BLOCK_SIZES = (128, 64, 32)
_NORM_BYTES = 4


class Form(NamedTuple):
    """How a product's weight is stored.

    block_size: how many weights along the input axis share a scale; None for floats and for one scale for an output channel.
    """

    dtype: str
    block_size: int | None = None

    @property
    def is_float(self) -> bool:
        """Whether it is a float of 16 or 32 bits."""
        return self.dtype in _FLOATS

    def bytes_per_weight(self) -> float:
        """Return the bytes of one weight, without its share of a scale."""
        return _FLOATS[self.dtype] if self.is_float else _QUANTIZED[self.dtype]

    def block_for(self, rows: int) -> int:
        """Return how many weights along an input axis of `rows` share a scale."""
        if self.block_size is None:
            return rows
        return next((size for size in _BLOCK_SIZES if size <= self.block_size and rows % size == 0), self.block_size)

    def stored_bytes(self, rows: int, columns: int) -> float:
        """Return the bytes of a weight [rows, columns] in the bundle, its scales and zero points included."""
        size = rows * columns * self.bytes_per_weight()
        if self.is_float:
            return size
        zero_point = self.bytes_per_weight() if self.dtype.startswith("u") else 0
        return size + rows // self.block_for(rows) * columns * (_SCALE_BYTES + zero_point)


class Forms(NamedTuple):
    """How a bundle stores its weights: those of the layers' products, the vocabulary projection, and all others."""

    weights: Form
    lm_head: Form
    compute: str

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation, of a cached value and of a value of the embedding table."""
        return _FLOATS[self.compute]


def forms_of(recipe: Mapping[str, Any]) -> Forms:
    """Return the forms of a recipe as a manifest holds it."""
    weights, head = (Form(recipe[key]["dtype"], recipe[key].get("block_size")) for key in ("weights", "lm_head"))
    return Forms(weights, head, recipe["compute"])


def linear_shapes(model: ModelFacts) -> list[tuple[int, int]]:
    """Return [in, out] of each product of one decoder layer: q, k and v; o; and of each expert gate and up, down."""
    attention = model.num_attention_heads * model.head_dim
    kv = model.num_key_value_heads * model.head_dim
    mlp = [(model.hidden_size, 2 * model.intermediate_size), (model.intermediate_size, model.hidden_size)]
    return [(model.hidden_size, attention + 2 * kv), (attention, model.hidden_size), *mlp * max(1, model.num_experts)]


def head_shape(model: ModelFacts) -> tuple[int, int]:
    """Return [in, out] of the vocabulary projection."""
    return model.hidden_size, model.vocab_size


def stored_weight_bytes(model: ModelFacts, forms: Forms) -> int:
    """Return the bytes of all weights in the bundle, but for biases: some hundred thousandths."""
    shared = model.tie_word_embeddings and forms.lm_head.is_float
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size * _NORM_BYTES
    table = 0 if shared else model.vocab_size * model.hidden_size * forms.compute_bytes
    return decode_weight_bytes(model, forms) + table + norms


def decode_weight_bytes(model: ModelFacts, forms: Forms) -> int:
    """Return the bytes of weights that one decode step reads: every product's, with its scales; of the table one row."""
    layer = sum(forms.weights.stored_bytes(*shape) for shape in linear_shapes(model))
    return int(model.num_hidden_layers * layer + forms.lm_head.stored_bytes(*head_shape(model)))


def seen_cache_bytes(model: ModelFacts, length: int, bytes_per_value: int) -> int:
    """Return the bytes of the keys and values of all layers that the last of `length` tokens sees."""
    slots = sum(length if window is None else min(length, window) for window in model.layer_windows)
    return slot_bytes(model, bytes_per_value) * slots


def slot_bytes(model: ModelFacts, bytes_per_value: int) -> int:
    """Return the bytes of one slot of one layer's ring: a key and a value."""
    return 2 * model.num_key_value_heads * model.head_dim * bytes_per_value
