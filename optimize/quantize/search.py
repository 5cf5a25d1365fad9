"""Scales that are searched for: those that leave the least error of the rounded weights, and may clip the outermost."""

from collections.abc import Callable, Mapping

import numpy as np

from galerne.optimize.quantize.rounding import LEVELS, Float16, Float32, scales_of

# What is tried, as parts of the smallest scale that clips nothing, which wins a tie.
_FACTORS = np.linspace(1.0, 0.7, 13, dtype=np.float32)
# Weights that are worked on at once, so that a core's second-level cache holds what is made of them.
_TILE = 32 << 10


def searched_scales(weight: Float32, bits: int, block: int, importance: Float32 | None = None) -> Float16:
    """Return the scales with which the sum of the weights' errors, each to the third power, is least.

    The third power, as the largest errors do the most harm: a model loses less with it than with the square.

    Args:
        weight: [out, in].
        bits: 4 (-8..7) or 8 (-127..127).
        block: how many weights along `in` share a scale; it divides `in`.
        importance: [in], positive: by how much a channel's errors count; None for all alike.
    Returns: [out, in // block], positive. As with `scales_of` a block of zeros has the scale 1, and one that is not finite a
        scale that is not. A block's scale depends on that block alone.
    """
    scales = np.empty((len(weight), weight.shape[1] // block), np.float16)
    rows = max(1, _TILE // weight.shape[1])
    counts = None
    if importance is not None:
        counts = np.tile((importance / importance.mean()).reshape(-1, block), (rows, 1))  # no sum of them underflows
    for first in range(0, len(weight), rows):
        tile = weight[first : first + rows].reshape(-1, block)
        found = _search(np.ascontiguousarray(tile), bits, counts)
        scales[first : first + rows] = found.reshape(-1, scales.shape[1])
    return scales


def _search(tile: Float32, bits: int, counts: Float32 | None) -> Float16:
    """Return the best scale for each row of a tile [rows, block] that lies in one piece."""
    low, high = LEVELS[bits]
    best = scales_of(tile, bits, tile.shape[1])[:, 0]
    largest = best.astype(np.float32)
    least = np.full(len(tile), np.inf, np.float32)
    exact, error = np.empty_like(tile), np.empty_like(tile)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for factor in _FACTORS:
            tried = (largest * factor).astype(np.float16)
            scale = tried.astype(np.float32)
            np.multiply(tile, np.reciprocal(scale)[:, None], out=exact)
            np.rint(exact, out=error)
            np.clip(error, low, high, out=error)
            error -= exact
            np.abs(error, out=error)
            np.multiply(error, error, out=exact)
            if counts is not None:
                exact *= counts[: len(tile)]
            total = np.einsum("ij,ij->i", exact, error) * (scale * scale * scale)
            better = total < least  # never of what is not finite
            np.copyto(least, total, where=better)
            np.copyto(best, tried, where=better)
    return best


# The scales of a recipe's method that needs no text: (weight [out, in], bits, block) -> [out, in // block].
SCALES: Mapping[str, Callable[[Float32, int, int], Float16]] = {"nearest": scales_of, "search": searched_scales}
