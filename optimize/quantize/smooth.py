"""SmoothQuant: moves the range of an input whose channels differ much over to the weights, so that both round well."""

from collections.abc import Sequence

import numpy as np

from galerne.optimize.quantize.rounding import Float32


def smooth_factors(weights: Sequence[Float32], input_absmax: Float32, alpha: float) -> Float32:
    """Return the factor by input channel that balances an input's range with its weights'.

    The caller divides what the input comes from, such as a norm's weight, by the factors, and multiplies the weights by them.

    Args:
        weights: of the products that share the input, each [out, in].
        input_absmax: [in], the largest absolute value of each channel of the input.
        alpha: 0 to 1, how much of the input's range goes over.
    Returns: [in] float32, positive; 1 where the input or the weights of a channel are all zero.
    Source: Xiao et al. 2022, arXiv 2211.10438, equation 4.
    """
    weight_absmax: Float32 = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    used = (input_absmax > 0) & (weight_absmax > 0)
    factors = np.ones_like(weight_absmax)
    np.divide(input_absmax ** np.float32(alpha), weight_absmax ** np.float32(1 - alpha), out=factors, where=used)
    return factors
