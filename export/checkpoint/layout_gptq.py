"""GPTQ as auto-gptq and gptqmodel store it: eight (or four) input features in an int32.

Zero points are stored one less in the first version of the format, as they are in the second. With `desc_act` a feature's
group is looked up in `g_idx`: the rows are then put in the groups' order, and the graph reads its input in that order.

Source: gptqmodel 7.7.0, gptqmodel/utils/model_dequant.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np

from galerne.errors import InputError
from galerne.export.checkpoint.layout import (
    Bits,
    Layout,
    Tensors,
    expect_parts,
    expect_shape,
    finite_scales,
    gather,
    group_order,
    integers,
    split_columns,
)
from galerne.export.checkpoint.packed import Bytes, PackedTensor, asymmetric, nibbles

_FORMATS = {"gptq": 1, "gptq_v2": 0}
_PARTS = ("qweight", "qzeros", "scales")


class GptqLayout(Layout):
    """4 or 8 bits, grouped along the input axis or not, symmetric or with zero points."""

    title = "GPTQ"

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        """Read the config. Raises: InputError if it is of a form that is not read."""
        bits = config.get("bits")
        if bits not in (4, 8):
            raise InputError(
                f"{where}: quantization_config: bits: {bits!r} is not supported with gptq; expected 4 or 8"
            )
        form = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if form not in _FORMATS:
            raise InputError(
                f"{where}: quantization_config: checkpoint_format: {form!r} is not supported with gptq; "
                f"expected {' or '.join(_FORMATS)}"
            )
        if config.get("pack_dtype") not in (None, "int32"):
            raise InputError(
                f"{where}: quantization_config: pack_dtype: {config['pack_dtype']!r} is not supported; expected 'int32'"
            )
        if config.get("dynamic"):
            raise InputError(
                f"{where}: quantization_config: dynamic: settings for single modules are not supported; "
                "quantize with one setting for all"
            )
        self._bits = cast(Bits, bits)
        self._less = _FORMATS[form]

    def find(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the quantized weights."""
        return gather(names, "qweight", (*_PARTS[1:], "g_idx"))

    def shape(self, parts: Mapping[str, str], tensors: Tensors) -> tuple[int, int]:
        """Return [out, in] from qweight [in / n, out], qzeros [groups, out / n], scales [groups, out], g_idx [in]."""
        expect_parts(parts, _PARTS, tensors)
        each = 32 // self._bits
        shapes = [tensors.stored_shape(parts[part]) for part in _PARTS]
        if any(len(shape) != 2 for shape in shapes):
            raise InputError(
                f"{tensors.where(parts['qweight'])}: {parts['qweight']}: shape {list(shapes[0])}; expected two axes"
            )
        (packed, out_features), _, (groups, _) = shapes
        in_features = each * packed
        why = f"{parts['qweight']} {[packed, out_features]} at {self._bits} bits"
        expect_shape(parts["scales"], (groups, out_features), tensors, why)
        expect_shape(parts["qzeros"], (groups, -(-out_features // each)), tensors, why)
        if "g_idx" in parts:
            expect_shape(parts["g_idx"], (in_features,), tensors, why)
        if not groups or in_features % groups:
            raise InputError(
                f"{tensors.where(parts['scales'])}: {parts['scales']}: {groups} groups do not divide {in_features} input features"
            )
        return out_features, in_features

    def packed(self, parts: Mapping[str, str], tensors: Tensors) -> PackedTensor:
        """Return a weight, its rows in the order of their groups."""
        out_features, in_features = self.shape(parts, tensors)
        scales = finite_scales(parts["scales"], tensors)
        block = in_features // len(scales)
        order = None
        if "g_idx" in parts:
            groups = integers(parts["g_idx"], tensors, "int32", "int64")
            order = group_order(parts["g_idx"], groups, len(scales), block, tensors)

        def write(out: Bytes) -> None:
            packed = integers(parts["qweight"], tensors, "int32")
            if order is None:
                _unpack_rows(packed, self._bits, out)
            else:
                codes = np.empty(out.shape, np.uint8)
                _unpack_rows(packed, self._bits, codes)
                np.take(codes, order, axis=0, out=out)

        return PackedTensor(
            kind="int4" if self._bits == 4 else "int8",
            shape=(out_features, in_features),
            block=block if len(scales) > 1 else None,
            scales=scales,
            zero_points=asymmetric(self._zero_points(parts["qzeros"], out_features, tensors), 1 << (self._bits - 1)),
            order=order,
            write_codes=write,
        )

    def _zero_points(self, name: str, out_features: int, tensors: Tensors) -> Bytes:
        stored = split_columns(integers(name, tensors, "int32"), self._bits)[:, :out_features]
        if not self._less:
            return stored
        if bool((stored == (1 << self._bits) - 1).any()):
            raise InputError(
                f"{tensors.where(name)}: {name}: a zero point of 0, which libraries read differently in the first version of "
                "the format; save the checkpoint as gptq_v2"
            )
        return stored + np.uint8(1)


def _unpack_rows(packed: np.ndarray[Any, Any], bits: Bits, out: Bytes) -> None:
    """Unpack [m, n] int32 into [m * 32 // bits, n], the first row in the low bits."""
    rows = out.reshape(len(packed), 32 // bits, packed.shape[1])  # splits an axis, so it is a view of any `out`
    if bits == 8:
        split = np.ascontiguousarray(packed).view(np.uint8).reshape(*packed.shape, 4)
        for i in range(4):
            rows[:, i] = split[..., i]
    else:
        low, high = nibbles(packed)  # [m, n, 4]
        for i in range(4):
            rows[:, 2 * i], rows[:, 2 * i + 1] = low[..., i], high[..., i]
