"""The groups of weights that a mix gives one format each, so that products stay fused and every expert is stored alike."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.weights import ALIGNMENT_BYTES
from galerne.optimize.quantize.recipe import WeightFormat
from galerne.runtime.footprint import HEAD, TABLE, Form, Product, head_product, layer_products, weight_names
from galerne.runtime.manifest import ModelFacts

_NORM_BYTES = 4


@dataclass(frozen=True)
class Group:
    """Weights that read one input, in every expert of a layer.

    match: the pattern of their names. layer: their number's; None for the vocabulary projection.
    products: what they are in the graph.
    """

    match: str
    layer: int | None
    products: tuple[Product, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The weights' names in the checkpoint."""
        return tuple(name for product in self.products for name, _ in product.parts)

    @property
    def in_attention(self) -> bool:
        """Whether they give queries, keys and values."""
        return ".self_attn." in self.match and not self.match.endswith(".o_proj.weight")

    @property
    def count(self) -> int:
        """How many weights it has."""
        return sum(product.rows * product.columns for product in self.products)

    def formats(self, offered: Iterable[WeightFormat]) -> list[WeightFormat]:
        """Return the formats that can hold them, as blocks have to divide the input axis; of those that are alike, the last."""
        found: dict[tuple[object, ...], WeightFormat] = {}
        for form in offered:
            stored = Form(form.dtype, form.block_size)
            blocks = [stored.block_for(product.rows) for product in self.products]
            if all(product.rows % block == 0 for product, block in zip(self.products, blocks, strict=True)):
                found[(form.dtype, *blocks)] = form
        return list(found.values())

    def stored_bytes(self, form: WeightFormat) -> int:
        """Return what they take of `weights.bin` in a format, values and scales on pages of their own."""
        whole = Form(form.dtype, form.block_size)
        total = 0
        for product in self.products:
            size = math.ceil(whole.stored_bytes(product.rows, product.columns))
            values = math.ceil(product.rows * product.columns * whole.bytes_per_weight())
            total += paged(values) + paged(size - values)
        return total


def groups_of(model: ModelFacts) -> list[Group]:
    """Return a model's groups in the order of its layers, the vocabulary projection last."""
    groups = []
    for layer in range(model.num_hidden_layers):
        found: dict[str, list[Product]] = {}
        for product in layer_products(model, layer):
            if all(name in weight_names(model) for name, _ in product.parts):  # no router
                found.setdefault(_pattern(product), []).append(product)
        groups += [Group(match, layer, tuple(products)) for match, products in found.items()]
    return [*groups, Group(HEAD, None, (head_product(model),))]


def _pattern(product: Product) -> str:
    """Return a pattern that matches the product's parts, those of all experts, and nothing else of the model."""
    names = [name for name, _ in product.parts]
    folder, _, _ = names[0].removesuffix(".weight").rpartition(".")
    fields = [name.removeprefix(f"{folder}.").removesuffix(".weight") for name in names]
    base, dot, expert = folder.rpartition(".")
    if expert.isdigit():
        folder = f"{base}{dot}*"
    if len(fields) == 1:
        return f"{folder}.{fields[0]}.weight"
    alike = {"q_proj": "[qkv]_proj", "gate_proj": "[gu]*_proj", "w1": "w[13]"}[fields[0]]
    return f"{folder}.{alike}.weight"


def other_bytes(model: ModelFacts, checkpoint: Checkpoint, table: WeightFormat) -> int:
    """Return the most that `weights.bin` holds beside the groups: norms, biases, routers, and the embedding's table.

    Args:
        table: its format. One that is the vocabulary projection too is counted with that group (`head_bytes`).
    """
    skipped = {*weight_names(model), HEAD, TABLE}
    apart = 0 if model.tie_word_embeddings else _table_bytes(model, table)
    return apart + sum(
        paged(math.prod(shape) * (_NORM_BYTES if "norm" in name else 2))
        for name, shape in _shapes(checkpoint).items()
        if name not in skipped
    )


def table_beside(head: WeightFormat, base: WeightFormat) -> WeightFormat:
    """Return the format of a table that is the vocabulary projection too: the projection's, where it can have that.

    Args:
        head: the projection's. base: the table's where that is none for a table.
    """
    return base if head.dtype == "int4" else head


def head_bytes(model: ModelFacts, group: Group, head: WeightFormat, base: WeightFormat) -> int:
    """Return what the vocabulary projection takes, with the embedding's table where that is the same tensor of the source."""
    table = table_beside(head, base)
    apart = _table_bytes(model, table) if model.tie_word_embeddings and table != head else 0
    return group.stored_bytes(head) + apart


def _table_bytes(model: ModelFacts, table: WeightFormat) -> int:
    values = model.vocab_size * model.hidden_size
    return paged(values) + paged(2 * model.vocab_size) if table.bits == 8 else paged(2 * values)


def _shapes(checkpoint: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    return {name: shape for name, shape in checkpoint.shapes().items() if not name.endswith(".rotary_emb.inv_freq")}


def paged(size: int) -> int:
    """Round a number of bytes up to whole pages, which external data begins on."""
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
