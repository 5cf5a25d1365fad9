"""Scales that are searched for: those that leave the least error of the rounded weights, and may clip the outermost."""

from collections.abc import Callable

import numpy as np

from galerne.optimize.quantize.rounding import LEVELS, Float16, Float32, scales_of

# What is tried, as parts of the smallest scale that clips nothing, which wins a tie. The third power never wants a small one.
_FACTORS = np.linspace(1.0, 0.7, 13, dtype=np.float32)
_FACTORS_BY_IMPORTANCE = np.linspace(1.0, 0.5, 21, dtype=np.float32)
# Weights that are worked on at once, so that a core's second-level cache holds what is made of them.
_TILE = 32 << 10


def searched_scales(weight: Float32, bits: int, block: int, importance: Float32 | None = None) -> Float16:
    """Return the scales with which the weights' errors do least harm.

    Without importance that is the sum of their third powers: a model loses less with it than with the square, as the largest
    errors do the most harm. With it, as with the mean squares of the inputs, it is the sum of their squares: what the product
    of inputs that do not depend on each other is off by.

    Args:
        weight: [out, in].
        bits: 4 (-8..7) or 8 (-127..127).
        block: how many weights along `in` share a scale; it divides `in`.
        importance: [in], not negative: by how much a channel's errors count; None for all alike.
    Returns: [out, in // block], positive. As with `scales_of` a block of zeros has the scale 1, and one that is not finite a
        scale that is not. A block's scale depends on that block alone.
    """
    scales = np.empty((len(weight), weight.shape[1] // block), np.float16)
    rows = max(1, _TILE // weight.shape[1])
    counts = None
    if importance is not None:
        relative = importance / (importance.mean() or 1)  # no sum of them underflows
        counts = np.tile(relative.reshape(-1, block), (rows, 1))
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
        for factor in _FACTORS if counts is None else _FACTORS_BY_IMPORTANCE:
            tried = (largest * factor).astype(np.float16)
            scale = tried.astype(np.float32)
            np.multiply(tile, np.reciprocal(scale)[:, None], out=exact)
            np.rint(exact, out=error)
            np.clip(error, low, high, out=error)
            error -= exact
            if counts is None:
                np.abs(error, out=error)
                np.multiply(error, error, out=exact)
                total = np.einsum("ij,ij->i", exact, error) * (scale * scale * scale)
            else:
                np.multiply(error, counts[: len(tile)], out=exact)
                total = np.einsum("ij,ij->i", exact, error) * (scale * scale)
            better = total < least  # never of what is not finite
            np.copyto(least, total, where=better)
            np.copyto(best, tried, where=better)
    return best


def scales_by(method: str, bits: int) -> Callable[[Float32, int, int], Float16]:
    """Return what finds the scales of a weight (weight [out, in], bits, block) by a method that needs no text.

    At 8 bits every method takes the smallest that clip nothing: clipping costs more there than finer steps gain.
    """
    assert method in ("nearest", "search"), method
    return searched_scales if method == "search" and bits == 4 else scales_of
