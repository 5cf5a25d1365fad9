"""A weight after rounding, and how each recipe's method rounds one."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from galerne.errors import InputError
from galerne.export.calibrate.statistics import Statistics
from galerne.optimize.quantize.gptq import gptq
from galerne.optimize.quantize.recipe import Method, WeightFormat
from galerne.optimize.quantize.rounding import Float16, Float32, round_to, scales_of
from galerne.optimize.quantize.search import searched_scales

Kind = Literal["int4", "int8", "float8e4m3fn"]

_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
# The largest value of each type that inputs are rounded to.
LARGEST = {"int8": 127.0, "float8e4m3fn": 448.0}


@dataclass(frozen=True)
class RoundedWeight:
    """A product's weight [out, in] as it is written.

    values: [out, in], int8 or float8. scales: [out, blocks] float16, positive.
    block: how many weights along `in` share a scale; None for one scale for an output channel.
    input_scale: of the product's input where that is rounded too.
    """

    kind: Kind
    values: NDArray[Any]
    scales: Float16
    block: int | None
    input_scale: float | None = None

    def dequantized(self) -> Float32:
        """Return the weight that products compute with, [out, in]."""
        blocks = self.values.reshape(*self.scales.shape, -1).astype(np.float32)
        blocks *= self.scales.astype(np.float32)[..., None]
        whole: Float32 = blocks.reshape(self.values.shape)
        return whole

    def divided(self, first: int, factors: Float32) -> "RoundedWeight":
        """Return the weight with its rows from `first` on divided by factors: their scales are, and no value changes."""
        scales = self.scales.copy()
        rows = slice(first, first + len(factors))
        scales[rows] = scales[rows].astype(np.float32) / factors[:, None]
        return replace(self, scales=scales)


def round_weight(
    name: str, weight: Float32, form: WeightFormat, method: Method, statistics: Statistics | None, where: str
) -> RoundedWeight:
    """Round a weight [out, in] by a method.

    Args:
        form: a quantized one.
        statistics: of the product's inputs: GPTQ needs their Hessian, AWQ their squares.
        where: the checkpoint, for messages.
    Raises: InputError if the block does not divide, or a value is too large for a scale in float16.
    """
    assert form.bits is not None
    block = form.block_for(weight.shape[1], name)
    stored = None if form.block_size is None else block
    if form.dtype == "float8e4m3fn":
        return _round_float8(name, weight, where)
    kind: Kind = "int4" if form.bits == 4 else "int8"
    if uses_hessian(form, method):
        assert statistics is not None
        values, scales = gptq(weight, statistics.hessian, form.bits, block, name=f"{where}: {name}")
        return RoundedWeight(kind, values, scales, stored)
    if method == "nearest" or form.bits == 8:
        scales = scales_of(weight, form.bits, block)
    else:
        importance = statistics.mean_square if statistics is not None and method == "awq" else None
        scales = searched_scales(weight, form.bits, block, importance)
    _check(scales, name, where)
    return RoundedWeight(kind, round_to(weight, scales, form.bits), scales, stored)


def uses_hessian(form: WeightFormat, method: Method) -> bool:
    """Whether a weight is rounded by GPTQ."""
    return method == "gptq" and form.dtype in ("int4", "int8")


def _round_float8(name: str, weight: Float32, where: str) -> RoundedWeight:
    """Round to E4M3 with one scale for an output channel, so that its largest value is the type's largest."""
    scales = (np.abs(weight).max(axis=1, keepdims=True) / LARGEST["float8e4m3fn"]).astype(np.float16)
    scales[scales == 0] = 1
    _check(scales, name, where)
    # A scale that float16 rounded down would bring the largest value above the type's, where it has no infinity but NaN.
    exact = np.clip(weight / scales.astype(np.float32), -LARGEST["float8e4m3fn"], LARGEST["float8e4m3fn"])
    return RoundedWeight("float8e4m3fn", exact.astype(_FLOAT8), scales, None)


def _check(scales: Float16, name: str, where: str) -> None:
    if not np.isfinite(scales).all():
        raise InputError(f"{where}: {name}: a value is too large for a scale in float16")
