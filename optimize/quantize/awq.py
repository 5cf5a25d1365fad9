"""AWQ: makes the channels that matter larger before rounding, and their inputs smaller by as much."""

from collections.abc import Sequence

import numpy as np

from galerne.errors import InputError
from galerne.optimize.quantize.rounding import Float32, dequantize, round_to
from galerne.optimize.quantize.search import searched_scales

# Exponents that are tried; 0 leaves every channel as it is, so that the result is never worse than that.
_ALPHAS = tuple(step / 20 for step in range(20))
# Outputs of a weight that a try is judged by: one exponent is looked for, so that not every one has to be computed.
_OUTPUTS = 1024


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
    parts = [weight[:: -(-len(weight) // _OUTPUTS)] for weight in weights]
    mean_square: Float32 = np.square(inputs).mean(axis=0)
    mean_square += mean_square.mean() * 1e-6 or 1  # a channel without input has an importance, too
    sizes: Float32 = np.abs(inputs).mean(axis=0)
    sizes[sizes == 0] = sizes.mean() or 1
    best, least = np.ones_like(sizes), np.inf
    for alpha in _ALPHAS:
        factors = sizes ** np.float32(alpha)
        factors /= np.sqrt(factors.max() * factors.min())
        error = sum(_error(weight, factors, inputs, mean_square, bits, block) for weight in parts)
        if error < least:
            best, least = factors, error
    return best


def _error(weight: Float32, factors: Float32, inputs: Float32, mean_square: Float32, bits: int, block: int) -> float:
    """Return the squared error of a product's outputs with its weight rounded after the factors."""
    scaled = weight * factors
    scale = searched_scales(scaled, bits, block, mean_square / factors**2)
    difference = dequantize(round_to(scaled, scale, bits), scale)
    difference /= factors
    difference -= weight
    return float(np.square(inputs @ difference.T).sum(dtype=np.float64))
