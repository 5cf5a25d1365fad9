"""AWQ: makes the channels that matter larger before rounding, and their inputs smaller by as much."""

from collections.abc import Sequence

import numpy as np

from galerne.errors import InputError
from galerne.optimize.quantize.rounding import Float32, dequantize, quantize

# Exponents that are tried; 0 leaves every channel as it is, so that the result is never worse than that.
ALPHAS = tuple(step / 20 for step in range(20))


def awq_factors(weights: Sequence[Float32], inputs: Float32, bits: int, block: int, *, name: str = "weight") -> Float32:
    """Return the factor by input channel with which the rounded products' outputs change least.

    Each is the mean size of the channel's input to the power of alpha, over the geometric mean of the largest and the smallest;
    alpha is searched for. A channel whose input is always zero counts as one of mean size. The caller multiplies the weights
    by the factors, divides what the inputs come from, such as a norm's weight, by them, and rounds with
    `searched_scales(weight * factors, bits, block, mean_square / factors**2)`.

    Args:
        weights: of the products that share the input, each [out, in].
        inputs: a sample of the input, [n, in].
        bits: 4 or 8.
        block: how many weights along `in` share a scale; it divides `in`.
        name: of the weights, for errors.
    Returns: [in] float32, positive.
    Raises: InputError if the block does not divide, or the weights or the inputs are not finite.
    Source: Lin et al. 2023, arXiv 2306.00978.
    """
    for what, array in ((f"{name}: inputs", inputs), *((name, weight) for weight in weights)):
        if not np.isfinite(array).all():
            raise InputError(f"{what}: holds NaN or infinity")
        if array.shape[1] % block:
            raise InputError(f"{name}: blocks of {block} do not divide its input axis of {array.shape[1]}")
    sizes: Float32 = np.abs(inputs).mean(axis=0)
    sizes[sizes == 0] = sizes.mean() or 1
    best, least = np.ones_like(sizes), np.inf
    for alpha in ALPHAS:
        factors = sizes ** np.float32(alpha)
        factors /= np.sqrt(factors.max() * factors.min())
        error = sum(_error(weight, factors, inputs, bits, block) for weight in weights)
        if error < least:
            best, least = factors, error
    return best


def _error(weight: Float32, factors: Float32, inputs: Float32, bits: int, block: int) -> float:
    """Return the squared error of a product's outputs with its weight rounded after the factors."""
    difference = dequantize(*quantize(weight * factors, bits, block))
    difference /= factors
    difference -= weight
    return float(np.square(inputs @ difference.T).sum(dtype=np.float64))
