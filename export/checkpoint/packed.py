"""A quantized weight as a checkpoint stores it, whatever the layout of its files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["int4", "int8", "float8e4m3fn"]
InputKind = Literal["int8", "float8e4m3fn"]
Bytes = NDArray[np.uint8]
Array = NDArray[Any]


@dataclass(frozen=True)
class PackedTensor:
    """A weight [out, in] that was quantized before. Nothing of it is rounded again.

    Integers are given as codes from 0; dequantized, row i along the input axis is
    (codes[i] - zero_points[i // block]) * scales[i // block]. float8 has no zero points: its codes are its bytes.

    kind: what the codes are.
    shape: [out, in].
    block: how many weights along the input axis share a scale; None where all of an output channel do.
    scales: [in // block, out] as the checkpoint types them; [1, out] where block is None.
    zero_points: [in // block, out] uint8; None where all are the middle of the range, 8 or 128: a symmetric weight.
    order: [in] int64, the input feature that each row of the codes multiplies; None where that is the row's own number.
    write_codes: writes the codes into an array [in, out] uint8, one a byte, rows in `order`.
    input_kind: what the product's input is rounded to; None where it is not.
    input_scale: the one scale of that input, above 0, as float32 holds it; None where it is not rounded.
    """

    kind: Kind
    shape: tuple[int, int]
    block: int | None
    scales: Array
    zero_points: Bytes | None
    order: NDArray[np.int64] | None
    write_codes: Callable[[Bytes], None]
    input_kind: InputKind | None = None
    input_scale: float | None = None

    @property
    def middle(self) -> int:
        """The code of zero in a symmetric weight."""
        return {"int4": 8, "int8": 128, "float8e4m3fn": 0}[self.kind]

    def same_form(self, other: "PackedTensor") -> bool:
        """Whether two weights that read the same input, rounded alike, can stand side by side in one."""
        if (self.kind, self.shape[1], self.block) != (other.kind, other.shape[1], other.block):
            return False
        if (self.input_kind, self.input_scale) != (other.input_kind, other.input_scale):
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return np.array_equal(self.order, other.order)


def asymmetric(zero_points: Bytes, middle: int) -> Bytes | None:
    """Return zero points, or None where every one is the middle of the range."""
    return None if bool((zero_points == middle).all()) else zero_points


def nibbles(packed: Array) -> tuple[Bytes, Bytes]:
    """Split the bytes of an array of integers into their low and high halves, each of the array's bytes' shape.

    Args:
        packed: [..., n] of a little-endian integer of w bytes.
    Returns: two arrays [..., n, w] uint8; bits 8k to 8k + 3 of an integer stand in the first at k, the next four in the second.
    """
    split: Bytes = np.ascontiguousarray(packed).view(np.uint8).reshape(*packed.shape, packed.dtype.itemsize)
    return split & np.uint8(0x0F), split >> np.uint8(4)
