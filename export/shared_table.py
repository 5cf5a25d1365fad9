"""Whether the embedding table and the vocabulary projection of a bundle are one tensor."""

import numpy as np

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.packed import PackedTensor
from galerne.export.spec import DecoderSpec
from galerne.export.tiles import widen
from galerne.optimize.quantize.recipe import AnyRecipe
from galerne.optimize.quantize.rounding import round_to
from galerne.runtime.footprint import HEAD, TABLE

# Rows that are rounded at once.
_ROWS = 1024


def is_shared(spec: DecoderSpec, checkpoint: Checkpoint, recipe: AnyRecipe) -> bool:
    """Return whether table and projection are stored as one: they are one tensor of the source, in one format.

    A checkpoint that was quantized from one with a single tensor has two, as its format knows no quantized table; there the
    table, rounded, has to give the projection's values and scales.
    """
    packed = checkpoint.packed(HEAD) if HEAD in checkpoint.shapes() else None
    if packed is None:
        return spec.tie_word_embeddings and recipe.format_for(HEAD) == recipe.table
    return recipe.table.dtype == "int8" and _is_rounded_table(checkpoint, packed)


def _is_rounded_table(checkpoint: Checkpoint, head: PackedTensor) -> bool:
    plain = (head.kind, head.block, head.zero_points, head.order, head.input_kind) == ("int8", None, None, None, None)
    table = checkpoint.read(TABLE)
    if not plain or table.shape != head.shape:
        return False
    codes = np.empty((head.shape[1], head.shape[0]), np.uint8)
    head.write_codes(codes)
    scales = head.scales.reshape(-1, 1)
    with np.errstate(invalid="ignore"):  # what is not finite is told when it is written
        return all(
            np.array_equal(
                round_to(widen(table[first : first + _ROWS]), scales[first : first + _ROWS], 8).T,
                (codes[:, first : first + _ROWS] ^ head.middle).view(np.int8),
            )
            for first in range(0, len(table), _ROWS)
        )
