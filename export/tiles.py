"""The small steps of an export, on tiles that a core's cache holds: widening, narrowing, turning rows into columns."""

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from galerne.runtime.safetensors import from_bfloat16

Array = NDArray[Any]
Float32 = NDArray[np.float32]

_BFLOAT16, _FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
_WORD_BYTES = 8
# Exponent bits all set: infinity, and above it NaN.
_INFINITY = {_FLOAT16: 0x7C00, _BFLOAT16: 0x7F80, np.dtype(np.float32): 0x7F80_0000}


def widen(array: Array) -> Float32:
    """Return floats of any width as float32; bfloat16 by shifting, which is many times faster than a cast in numpy."""
    if array.dtype == _BFLOAT16:
        return from_bfloat16(array.view(np.uint16))
    return array.astype(np.float32)


def narrow(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return floats as `dtype`, rounded to nearest and even; what is too large becomes infinite."""
    if array.dtype == dtype:
        return array
    if array.dtype == _BFLOAT16 and dtype == _FLOAT16:
        return _halves().take(array.view(np.uint16)).view(_FLOAT16)
    with np.errstate(over="ignore"):
        return widen(array).astype(dtype, copy=False)


def is_finite(array: Array) -> bool:
    """Say whether floats of any width hold neither NaN nor infinity."""
    bits = array.view(f"u{array.itemsize}")
    # An and, not an absolute value: the sign is the highest bit.
    highest = (bits & bits.dtype.type(2 ** (8 * array.itemsize - 1) - 1)).max(initial=0)
    return bool(highest < _INFINITY[array.dtype])


def transpose_into(out: Array, tile: Array) -> None:
    """Write a tile's rows as columns: out [C, R] becomes tile [R, C], transposed.

    numpy moves one element at a time. So rows are first woven into words of eight bytes, which whole rows of vector
    instructions do, and words are moved: measured three times as fast for two bytes and six times for one.
    """
    words = tile.view(f"u{tile.itemsize}")
    while words.itemsize < _WORD_BYTES and len(words) % 2 == 0:
        words = _weave(words)
    out.view(words.dtype)[...] = words.T


def pack_rows(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack each two int4 rows into one row of bytes, the first in the low bits: [R, C] int8 to [R // 2, C]."""
    nibbles = values.view(np.uint8)
    packed = nibbles[1::2] << np.uint8(4)
    packed |= nibbles[0::2] & np.uint8(0x0F)
    return packed


def _weave(rows: Array) -> Array:
    """Put each two rows side by side: [R, C] to [R // 2, C] of twice the width, the first row in the low half."""
    wide = np.dtype(f"u{2 * rows.itemsize}")
    woven = rows[1::2].astype(wide)
    woven <<= wide.type(8 * rows.itemsize)
    woven |= rows[0::2]
    return woven


@cache
def _halves() -> NDArray[np.uint16]:
    """Return the float16 of every bfloat16, as bits: looking one up takes a quarter of the time that numpy's cast does."""
    with np.errstate(over="ignore", invalid="ignore"):
        return widen(np.arange(1 << 16, dtype=np.uint16).view(_BFLOAT16)).astype(np.float16).view(np.uint16)
