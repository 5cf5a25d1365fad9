"""GPTQ: rounds a weight channel by channel, each making up for the errors of those before it on calibration text.

For inputs X, the product's error is tr(E H E^T) with E = W - W' and H = X^T X / n. With H = L L^T that is the squared length
of the rows of E L. Its column k is L[k, k] (E[:, k] + sum over j > k of E[:, j] L[j, k] / L[k, k]): so channels are rounded from
the last to the first, each as near as it comes to its weight plus what the channels after it left over. That is GPTQ without
the inverse of H: see QuIP, theorem 6.

Source: Frantar et al. 2022, arXiv 2210.17323; Chee et al. 2023 (QuIP), arXiv 2307.13304.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from galerne.errors import InputError
from galerne.optimize.quantize.cholesky import factorize
from galerne.optimize.quantize.rounding import LEVELS, Float16, Float32, Int8, scales_of
from galerne.optimize.quantize.search import searched_scales

# Channels that are rounded one by one before what they leave over goes to the others, in one product of matrices.
_LEAF = 16
# Outputs that are rounded together: a vocabulary has more than memory should hold several times over in float32.
_OUTPUTS = 1 << 14
# Damping is raised by this factor until the Hessian has a Cholesky factor in float32, and no further than to the limit.
_RAISE, _LIMIT = 10, 1e4


def gptq(
    weight: Float32, hessian: Float32, bits: int, block: int, *, damping: float = 0.01, name: str = "weight"
) -> tuple[Int8, Float16]:
    """Round a weight so that its product with the calibration inputs changes least.

    Channels are rounded in the order of their inputs' size, but keep their place and their block: 4-bit scales are searched for
    before, with the sizes as weights, so that no index of groups is needed; at 8 bits they clip nothing. A channel whose input
    was always zero is rounded to nearest.

    Args:
        weight: [out, in].
        hessian: [in, in], X^T X / n of n inputs X [n, in].
        bits: 4 (-8..7) or 8 (-127..127).
        block: how many weights along `in` share a scale; it divides `in`.
        damping: what is added to the diagonal, as a part of its mean; raised where the Hessian needs it.
        name: of the weight, for errors.
    Returns: values [out, in] int8 and positive scales [out, in // block] float16.
    Raises: InputError if the block does not divide, or the weight or the Hessian is not finite.
    """
    _check(weight, hessian, block, name)
    order, factor, importance = _factor(hessian, damping, name)
    scales = searched_scales(weight, bits, block, importance) if bits == 4 else scales_of(weight, bits, block)
    if not np.isfinite(scales).all():
        raise InputError(f"{name}: a value is too large for a scale in float16")
    values = np.empty(weight.shape, np.int8)
    for first in range(0, len(weight), _OUTPUTS):
        rows = slice(first, first + _OUTPUTS)
        values[rows] = _round(weight[rows], scales[rows], order, factor, bits, block)
    return values, scales


def _check(weight: Float32, hessian: Float32, block: int, name: str) -> None:
    columns = weight.shape[1]
    if columns % block:
        raise InputError(f"{name}: blocks of {block} do not divide its input axis of {columns}")
    if hessian.shape != (columns, columns):
        raise InputError(f"{name}: Hessian: expected shape {[columns, columns]}, found {list(hessian.shape)}")
    for what, array in ((name, weight), (f"{name}: Hessian", hessian)):
        if not np.isfinite(array).all():
            raise InputError(f"{what}: holds NaN or infinity")


def _factor(hessian: Float32, damping: float, name: str) -> tuple[npt.NDArray[np.intp], Float32, Float32]:
    """Return the order of channels, the factor [in, in] of the damped Hessian in it, and the damped diagonal [in].

    Channels with small inputs come first, so that they are rounded last. The factor is L[j, k] / L[k, k]; above its diagonal it
    holds no meaning.
    """
    diagonal = np.diagonal(hessian)
    mean = float(diagonal.mean()) or 1.0
    order = np.argsort(diagonal, kind="stable")
    while damping <= _LIMIT:
        factor = hessian[np.ix_(order, order)]
        np.fill_diagonal(factor, diagonal[order] + damping * mean)
        try:
            factorize(factor)
        except np.linalg.LinAlgError:
            damping *= _RAISE
            continue
        factor /= np.diagonal(factor).copy()
        return order, factor, diagonal + np.float32(damping * mean)
    raise InputError(f"{name}: Hessian: not positive semi-definite; expected X^T X of some inputs")


def _round(
    weight: Float32, scales: Float16, order: npt.NDArray[np.intp], factor: Float32, bits: int, block: int
) -> Int8:
    low, high = LEVELS[bits]
    scale = np.ascontiguousarray(scales.T.astype(np.float32))  # [blocks, out]
    inverse = np.reciprocal(scale)
    exact = weight.T[order]  # [in, out]: a channel lies in one piece
    aim, left = exact.copy(), np.empty_like(exact)
    values = np.empty(exact.shape, np.int8)

    def leaf(first: int, last: int) -> None:
        for k in range(last - 1, first - 1, -1):
            group = order[k] // block
            if k + 1 < last:
                aim[k] += factor[k + 1 : last, k] @ left[k + 1 : last]
            value = np.clip(np.rint(aim[k] * inverse[group]), low, high)
            values[k] = value
            left[k] = exact[k] - value * scale[group]

    def hand_over(first: int, middle: int, last: int) -> None:
        aim[first:middle] += factor[middle:last, first:middle].T @ left[middle:last]

    _sweep(0, len(exact), leaf, hand_over)
    result = np.empty(weight.shape, np.int8)
    result[:, order] = values.T
    return result


def _sweep(first: int, last: int, leaf: Callable[[int, int], None], hand_over: Callable[[int, int, int], None]) -> None:
    """Go through channels from the last to the first, a few at a time, and hand over what each half leaves to the one before.

    No closure that calls itself: that is a cycle, which keeps all arrays until the garbage collector comes by.
    """
    if last - first > _LEAF:
        middle = (first + last) // 2
        _sweep(middle, last, leaf, hand_over)
        hand_over(first, middle, last)
        _sweep(first, middle, leaf, hand_over)
        return
    leaf(first, last)
