"""A weight after rounding, and how each recipe's method rounds one."""

from dataclasses import dataclass

import numpy as np

from galerne.errors import InputError
from galerne.export.calibrate.statistics import Statistics
from galerne.optimize.quantize.gptq import gptq
from galerne.optimize.quantize.recipe import Method, WeightFormat
from galerne.optimize.quantize.rounding import Float16, Float32, Int8, dequantize, round_to, scales_of
from galerne.optimize.quantize.search import searched_scales


@dataclass(frozen=True)
class RoundedWeight:
    """A product's weight [out, in] as it is written.

    values: [out, in] int8. scales: [out, blocks] float16, positive.
    block: how many weights along `in` share a scale; None for one scale for an output channel.
    input_scale: of the product's input where that is rounded too.
    """

    values: Int8
    scales: Float16
    bits: int
    block: int | None
    input_scale: float | None = None

    def dequantized(self) -> Float32:
        """Return the weight that products compute with, [out, in]."""
        return dequantize(self.values, self.scales)


def round_weight(
    name: str, weight: Float32, form: WeightFormat, method: Method, statistics: Statistics | None, where: str
) -> RoundedWeight:
    """Round a weight [out, in] by a method.

    Args:
        form: a quantized one.
        statistics: of the product's inputs; GPTQ needs their Hessian, which it uses up.
        where: the checkpoint, for messages.
    Raises: InputError if the block does not divide, or a value is too large for a scale in float16.
    """
    assert form.bits is not None
    block = form.block_for(weight.shape[1], name)
    if uses_hessian(form, method):
        assert statistics is not None
        values, scales = gptq(weight, statistics.hessian, form.bits, block, name=name)
    else:
        scales = (
            scales_of(weight, form.bits, block) if method == "nearest" else searched_scales(weight, form.bits, block)
        )
        if not np.isfinite(scales).all():
            raise InputError(f"{where}: {name}: a value is too large for a scale in float16")
        values = round_to(weight, scales, form.bits)
    return RoundedWeight(values, scales, form.bits, None if form.block_size is None else block)


def uses_hessian(form: WeightFormat, method: Method) -> bool:
    """Whether a weight is rounded by GPTQ. At 8 bits rounding to nearest costs next to nothing, whatever the method."""
    return method == "gptq" and form.bits == 4
