"""AWQ as autoawq's `gemm` kernels read it: eight output channels in an int32, in the kernels' own order.

Source: autoawq 0.2.9, awq/utils/packing_utils.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from galerne.errors import InputError
from galerne.export.checkpoint.layout import (
    Layout,
    Tensors,
    expect_parts,
    expect_shape,
    finite_scales,
    gather,
    integers,
)
from galerne.export.checkpoint.packed import Bytes, PackedTensor, asymmetric, nibbles

# The output channel, of eight, that each nibble of an int32 holds, from the low bits up.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales")


class AwqLayout(Layout):
    """4 bits, grouped along the input axis, with zero points."""

    title = "AWQ"

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        """Read the config. Raises: InputError if it is of a form that is not read."""
        bits = config.get("bits", config.get("w_bit"))
        if bits != 4:
            raise InputError(f"{where}: quantization_config: bits: {bits!r} is not supported with awq; expected 4")
        version = str(config.get("version", config.get("format", "gemm"))).lower()
        if version != "gemm":
            raise InputError(
                f"{where}: quantization_config: version: {version!r} is not supported with awq; expected 'gemm'"
            )

    def find(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the quantized weights."""
        return gather(names, "qweight", _PARTS[1:])

    def shape(self, parts: Mapping[str, str], tensors: Tensors) -> tuple[int, int]:
        """Return [out, in] from qweight [in, out // 8], qzeros [groups, out // 8] and scales [groups, out]."""
        expect_parts(parts, _PARTS, tensors)
        rows, packed = _two(parts["qweight"], tensors)
        groups, _ = _two(parts["scales"], tensors)
        why = f"{parts['qweight']} {[rows, packed]}"
        expect_shape(parts["scales"], (groups, 8 * packed), tensors, why)
        expect_shape(parts["qzeros"], (groups, packed), tensors, why)
        if not groups or rows % groups:
            raise InputError(
                f"{tensors.where(parts['scales'])}: {parts['scales']}: {groups} groups do not divide {rows} input features"
            )
        return 8 * packed, rows

    def packed(self, parts: Mapping[str, str], tensors: Tensors) -> PackedTensor:
        """Return a weight."""
        out_features, in_features = self.shape(parts, tensors)
        scales = finite_scales(parts["scales"], tensors)
        zeros = np.empty(scales.shape, np.uint8)
        _spread(integers(parts["qzeros"], tensors, "int32"), zeros)
        return PackedTensor(
            kind="int4",
            shape=(out_features, in_features),
            block=in_features // len(scales) if len(scales) > 1 else None,
            scales=scales,
            zero_points=asymmetric(zeros, 8),
            order=None,
            write_codes=lambda out: _spread(integers(parts["qweight"], tensors, "int32"), out),
        )


def _two(name: str, tensors: Tensors) -> tuple[int, int]:
    shape = tensors.stored_shape(name)
    if len(shape) != 2:
        raise InputError(f"{tensors.where(name)}: {name}: shape {list(shape)}; expected two axes")
    return shape[0], shape[1]


def _spread(packed: np.ndarray[Any, Any], out: Bytes) -> None:
    """Unpack [n, m] int32 into [n, 8 * m]."""
    low, high = nibbles(packed)  # [n, m, 4]
    for i in range(4):
        out[:, _ORDER[2 * i] :: 8] = low[..., i]
        out[:, _ORDER[2 * i + 1] :: 8] = high[..., i]
