"""Symmetric rounding of weights to int4 and int8, as ONNX DequantizeLinear reads them."""

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float16 = npt.NDArray[np.float16]
Int8 = npt.NDArray[np.int8]

LEVELS = {4: (-8, 7), 8: (-127, 127)}


def quantize(weight: Float32, bits: int, block: int) -> tuple[Int8, Float16]:
    """Round to nearest with the smallest scale that clips nothing.

    Args:
        weight: [out, in] float32.
        bits: 4 (-8..7) or 8 (-127..127).
        block: how many weights along `in` share a scale; it divides `in`.
    Returns: values [out, in] int8 and scales as `scales_of` returns them.
    Source: ONNX DequantizeLinear, blocked form: value times scale.
    """
    scale = scales_of(weight, bits, block)
    return round_to(weight, scale, bits), scale


def scales_of(weight: Float32, bits: int, block: int) -> Float16:
    """Return the smallest scales that clip nothing, [out, in // block] float16; see `quantize`.

    A block of zeros has the scale 1; one that holds NaN, infinity or a value too large for float16 has a scale that is not
    finite.
    """
    low, high = LEVELS[bits]
    blocks = weight.reshape(weight.shape[0], -1, block)
    with np.errstate(over="ignore", invalid="ignore"):
        scale: Float16 = np.maximum(blocks.max(axis=-1) / high, blocks.min(axis=-1) / low).astype(np.float16)
    scale[scale == 0] = 1
    return scale


def round_to(weight: Float32, scale: Float16, bits: int) -> Int8:
    """Return the values that come nearest to a weight [out, in] with given scales [out, blocks], all finite."""
    low, high = LEVELS[bits]
    # The values are found with the scale as it is stored, in float16, so that its rounding does not add to theirs.
    values = weight.reshape(*scale.shape, -1) * np.reciprocal(scale.astype(np.float32))[..., None]
    np.rint(values, out=values)
    np.clip(values, low, high, out=values)
    return values.astype(np.int8).reshape(weight.shape)


def dequantize(values: Int8, scale: Float16) -> Float32:
    """Turn rounded weights back into float32.

    Args:
        values: [out, in] int8.
        scale: [out, blocks] float16.
    """
    blocks = values.reshape(values.shape[0], scale.shape[1], -1).astype(np.float32)
    return (blocks * scale.astype(np.float32)[..., None]).reshape(values.shape)


def pack_int4(values: Int8) -> npt.NDArray[np.uint8]:
    """Pack int4 values two to a byte, the first in the low bits, over the flattened array. Source: ONNX's TensorProto."""
    flat = values.reshape(-1).view(np.uint8)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return ((flat[0::2] & 0x0F) | (flat[1::2] << 4)).astype(np.uint8)
