"""How many bytes a model's weights and its cache take, and how many of them a step reads."""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from galerne.runtime.manifest import ModelFacts

_FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}
_QUANTIZED = {"int8": 1.0, "uint8": 1.0, "int4": 0.5, "uint4": 0.5, "float8e4m3fn": 1.0}
_SCALE_BYTES = 2
_ROUNDED_CACHE = {"int8": 1}
# A block that does not divide the input axis gives way to the next smaller one.
BLOCK_SIZES = (256, 128, 64, 32)
_NORM_BYTES = 4
# Of a part of an int8 projection in the `cpu` engine: large enough that what a product costs beside its weights does not show.
_PART_BYTES = 16 << 20
_ROUTER = ".gate.weight"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
_WILDCARD = re.compile(r"[*?[]")

T = TypeVar("T")


def is_router(weight: str) -> bool:
    """Whether a weight of the checkpoint chooses experts."""
    return weight.endswith(_ROUTER)


def choose_form(weight: str, overrides: Iterable[tuple[str, T]], lm_head: T, weights: T, compute: T) -> T:
    """Return how a linear weight is stored, by its name in the checkpoint: as the first override says whose pattern matches it.

    A router of experts is not quantized: it is small, and another choice of experts is another answer.

    Args:
        overrides: patterns, with * and ? as in a shell, and what they stand for.
        lm_head, weights: of the vocabulary projection, and of the rest. compute: of what is not quantized.
    """
    if is_router(weight):
        return compute
    for pattern, form in overrides:
        if fnmatch.fnmatchcase(weight, pattern):
            return form
    return lm_head if weight == HEAD else weights


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
        return next((size for size in BLOCK_SIZES if size <= self.block_size and rows % size == 0), self.block_size)

    def stored_bytes(self, rows: int, columns: int) -> float:
        """Return the bytes of a weight [rows, columns] in the bundle, its scales and zero points included."""
        size = rows * columns * self.bytes_per_weight()
        if self.is_float:
            return size
        zero_point = self.bytes_per_weight() if self.dtype.startswith("u") else 0
        return size + rows // self.block_for(rows) * columns * (_SCALE_BYTES + zero_point)


class Forms(NamedTuple):
    """How a bundle stores its weights: those of the layers' products, the vocabulary projection, and all others.

    overrides: patterns over the weights' names in the checkpoint, and the forms of what they match; the first holds.
    embed_tokens: the form of the embedding table; None for the compute type.
    cache: what keys and values are rounded to; None where they are kept as they are computed.
    """

    weights: Form
    lm_head: Form
    compute: str
    overrides: tuple[tuple[str, Form], ...] = ()
    embed_tokens: Form | None = None
    cache: str | None = None

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return _FLOATS[self.compute]

    @property
    def cache_bytes(self) -> int:
        """Bytes of a cached key's or value's number in the portable graph's rings."""
        return self.compute_bytes if self.cache is None else _ROUNDED_CACHE[self.cache]

    @property
    def table(self) -> Form:
        """The embedding table's form; int8 has a scale for each row."""
        return self.embed_tokens or Form(self.compute)

    def form_for(self, weight: str) -> Form:
        """Return the form of a linear weight by its name in the checkpoint."""
        return choose_form(weight, self.overrides, self.lm_head, self.weights, Form(self.compute))


class Product(NamedTuple):
    """Weights of the checkpoint that read one input, and so are one product where they are stored alike.

    rows: the width of the input. parts: each weight's name in the checkpoint and its outputs.
    """

    rows: int
    parts: tuple[tuple[str, int], ...]

    @property
    def columns(self) -> int:
        """Outputs of all of them."""
        return sum(columns for _, columns in self.parts)


class StoredProduct(NamedTuple):
    """A weight [rows, columns] of a bundle's product, and how it is stored."""

    form: Form
    rows: int
    columns: int

    @property
    def stored_bytes(self) -> float:
        """Its bytes in the bundle."""
        return self.form.stored_bytes(self.rows, self.columns)


def forms_of(recipe: Mapping[str, Any]) -> Forms:
    """Return the forms of a recipe as a manifest holds it."""
    overrides = tuple((override["match"], _form(override["format"])) for override in recipe.get("overrides", ()))
    table = recipe.get("embed_tokens")
    return Forms(
        _form(recipe["weights"]),
        _form(recipe["lm_head"]),
        recipe["compute"],
        overrides,
        table and _form(table),
        recipe.get("cache"),
    )


def _form(tree: Mapping[str, Any]) -> Form:
    return Form(tree["dtype"], tree.get("block_size"))


def projection_parts(inputs: int, vocab_size: int) -> int:
    """Return in how many products the `cpu` engine computes an int8 projection [inputs, vocab_size]."""
    return -(-inputs * vocab_size // _PART_BYTES)


def layer_products(model: ModelFacts, layer: int) -> list[Product]:
    """Return the products of a decoder layer: q, k and v; o; and gate and up; down; of each expert, after their router."""
    attention, kv = (count * model.head_dim for count in (model.num_attention_heads, model.num_key_value_heads))
    hidden, width, prefix = model.hidden_size, model.intermediate_size, f"model.layers.{layer}"
    qkv = (
        {"qkv_proj": attention + 2 * kv}
        if model.fused_projections
        else {"q_proj": attention, "k_proj": kv, "v_proj": kv}
    )
    products = [
        _product(f"{prefix}.self_attn", hidden, qkv),
        _product(f"{prefix}.self_attn", attention, {"o_proj": hidden}),
    ]
    if not model.num_experts:
        gate_up = {"gate_up_proj": 2 * width} if model.fused_projections else {"gate_proj": width, "up_proj": width}
        return [
            *products,
            _product(f"{prefix}.mlp", hidden, gate_up),
            _product(f"{prefix}.mlp", width, {"down_proj": hidden}),
        ]
    products.append(_product(f"{prefix}.block_sparse_moe", hidden, {"gate": model.num_experts}))
    for expert in range(model.num_experts):
        folder = f"{prefix}.block_sparse_moe.experts.{expert}"
        products += [_product(folder, hidden, {"w1": width, "w3": width}), _product(folder, width, {"w2": hidden})]
    return products


def _product(folder: str, rows: int, parts: Mapping[str, int]) -> Product:
    return Product(rows, tuple((f"{folder}.{name}.weight", columns) for name, columns in parts.items()))


def head_product(model: ModelFacts) -> Product:
    """Return the vocabulary projection, which has its own name where it is the embedding's table too."""
    return Product(model.hidden_size, ((HEAD, model.vocab_size),))


def all_products(model: ModelFacts) -> tuple[Product, ...]:
    """Return every product of a model."""
    layers = [product for layer in range(model.num_hidden_layers) for product in layer_products(model, layer)]
    return (*layers, head_product(model))


def weight_names(model: ModelFacts) -> tuple[str, ...]:
    """Return the names in the checkpoint of the weights that a recipe gives a form, so without routers."""
    names = (name for product in all_products(model) for name, _ in product.parts)
    return tuple(name for name in names if not is_router(name))


def stored_products(model: ModelFacts, forms: Forms) -> tuple[StoredProduct, ...]:
    """Return every product's weight as a bundle stores it: parts of one form that follow each other are one."""
    found = []
    # What a pattern begins with, up to its first wildcard, rules out most names of a large model at once.
    begins = [(_WILDCARD.split(pattern, maxsplit=1)[0], (pattern, form)) for pattern, form in forms.overrides]

    def form_of(part: tuple[str, int]) -> Form:
        near = tuple(override for start, override in begins if part[0].startswith(start))
        return forms._replace(overrides=near).form_for(part[0])

    for product in all_products(model):
        for form, run in groupby(product.parts, key=form_of):
            found.append(StoredProduct(form, product.rows, sum(columns for _, columns in run)))
    return tuple(found)


def linear_shapes(model: ModelFacts) -> list[tuple[int, int]]:
    """Return [in, out] of each product of one decoder layer."""
    return [(product.rows, product.columns) for product in layer_products(model, 0)]


def head_shape(model: ModelFacts) -> tuple[int, int]:
    """Return [in, out] of the vocabulary projection."""
    return model.hidden_size, model.vocab_size


def stored_weight_bytes(model: ModelFacts, forms: Forms) -> int:
    """Return the bytes of all weights in the bundle, but for biases: some hundred thousandths."""
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size * _NORM_BYTES
    table = 0 if shares_table(model, forms) else table_bytes(model, forms)
    return decode_weight_bytes(model, forms) + table + norms


def shares_table(model: ModelFacts, forms: Forms) -> bool:
    """Whether a bundle stores the embedding table and the vocabulary projection as one."""
    return model.tie_word_embeddings and forms.form_for(HEAD) == forms.table


def table_bytes(model: ModelFacts, forms: Forms) -> int:
    """Return the bytes of the embedding table by itself."""
    return int(forms.table.stored_bytes(model.hidden_size, model.vocab_size))


def decode_weight_bytes(model: ModelFacts, forms: Forms) -> int:
    """Return the bytes of weights that one decode step reads: every product's, with its scales; of the table one row."""
    return int(sum(product.stored_bytes for product in stored_products(model, forms)))


def seen_cache_bytes(model: ModelFacts, length: int, bytes_per_value: int) -> int:
    """Return the bytes of the keys and values of all layers that the last of `length` tokens sees."""
    slots = sum(length if window is None else min(length, window) for window in model.layer_windows)
    return slot_bytes(model, bytes_per_value) * slots


def slot_bytes(model: ModelFacts, bytes_per_value: int) -> int:
    """Return the bytes of one slot of one layer's ring: a key and a value."""
    return 2 * model.num_key_value_heads * model.head_dim * bytes_per_value
