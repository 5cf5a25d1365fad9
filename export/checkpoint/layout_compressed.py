"""compressed-tensors, which llm-compressor writes: integers packed into int32, plain int8, or float8.

Inputs, and an int8 cache, that are rounded by a scale that is stored stay so. Other rounding of activations is left out.

Source: compressed-tensors 0.20, compressors/pack_quantized and compressors/naive_quantized.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from galerne.errors import InputError
from galerne.export.checkpoint.compressed_config import read_config
from galerne.export.checkpoint.layout import (
    Bits,
    Layout,
    Tensors,
    expect_parts,
    expect_shape,
    expect_zero_points,
    finite_scales,
    gather,
    group_order,
    integers,
    one_scale,
    split_columns,
)
from galerne.export.checkpoint.packed import Bytes, PackedTensor, asymmetric

_OTHERS = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


class CompressedLayout(Layout):
    """int4, int8 or float8 by tensor, channel, group or block."""

    title = "compressed-tensors"

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        """Read the config. Raises: InputError if it is of a form that is not read."""
        self._config = read_config(config, f"{where}: quantization_config")
        self.cache = self._config.cache

    def note(self) -> str:
        """Say what is left as it is."""
        left_out = sorted(self._config.left_out)
        return f"not rounded here as the source rounds them: {'; '.join(left_out)}" if left_out else ""

    def find(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the quantized weights: packed ones, and plain ones that have a scale."""
        names = set(names)
        packed = gather(names, "weight_packed", (*_OTHERS, *_ACTIVATIONS))
        plain = gather(names, "weight", (*_OTHERS, *_ACTIVATIONS))
        return packed | {name: parts for name, parts in plain.items() if "weight_scale" in parts and name not in packed}

    def shape(self, parts: Mapping[str, str], tensors: Tensors) -> tuple[int, int]:
        """Return [out, in], from weight_shape where packed; weight_scale is [out, groups], [out, 1] or [1]."""
        expect_parts(parts, ("weight_scale", *(("weight_shape",) if "weight_packed" in parts else ())), tensors)
        if "weight" in parts:
            shape = tuple(tensors.stored_shape(parts["weight"]))
        else:
            expect_shape(parts["weight_shape"], (2,), tensors, "the format")
            shape = tuple(int(size) for size in integers(parts["weight_shape"], tensors, "int32", "int64"))
        name = parts.get("weight", parts.get("weight_packed", ""))
        if len(shape) != 2 or min(shape) < 1:
            raise InputError(f"{tensors.where(name)}: {name}: shape {list(shape)}; expected two axes")
        if "weight_packed" in parts:
            self._packed_bits(parts, shape, tensors)
        return shape[0], shape[1]

    def packed(self, parts: Mapping[str, str], tensors: Tensors) -> PackedTensor:
        """Return a weight."""
        shape = self.shape(parts, tensors)
        scales, block = self._scales(parts, shape, tensors)
        if "weight_packed" in parts:
            bits = self._packed_bits(parts, shape, tensors)
            kind: Any = f"int{bits}"
        else:
            stored = tensors.stored(parts["weight"])
            if stored.dtype.name not in ("int8", "float8_e4m3fn"):
                raise InputError(
                    f"{tensors.where(parts['weight'])}: {parts['weight']}: type {stored.dtype.name} beside a weight_scale; "
                    "expected int8 or float8_e4m3fn"
                )
            bits = 8
            kind = "int8" if stored.dtype == np.int8 else "float8e4m3fn"
        order = None
        if "weight_g_idx" in parts:
            groups = integers(parts["weight_g_idx"], tensors, "int32", "int64")
            order = group_order(parts["weight_g_idx"], groups, scales.shape[1], block or shape[1], tensors)

        def write(out: Bytes) -> None:
            codes = _codes(parts, bits, shape, tensors)  # [out, in]
            if kind == "float8e4m3fn" and bool(((codes & 0x7F) == 0x7F).any()):
                name = parts["weight"]
                raise InputError(f"{tensors.where(name)}: {name}: holds NaN; the checkpoint is damaged")
            out[...] = codes.T if order is None else codes[:, order].T
            if kind == "int8" and "weight" in parts:
                np.bitwise_xor(out, 0x80, out=out)  # from signed to codes from 0

        points = self._zero_points(parts, bits, scales.shape, tensors)
        input_kind = self._config.input_kind(parts["weight_scale"].removesuffix(".weight_scale"))
        input_scale = None if input_kind is None else _input_scale(parts, tensors)
        return PackedTensor(kind, shape, block, scales.T, points, order, write, input_kind, input_scale)

    def _packed_bits(self, parts: Mapping[str, str], shape: tuple[int, ...], tensors: Tensors) -> Bits:
        name = parts["weight_packed"]
        found = tensors.stored_shape(name)
        known = sorted({group.bits for group in self._config.groups})
        for bits in known:
            if tuple(found) == (shape[0], -(-shape[1] * bits // 32)):
                return cast(Bits, bits)
        raise InputError(
            f"{tensors.where(name)}: {name}: shape {list(found)} does not hold {list(shape)} at num_bits "
            f"{' or '.join(map(str, known))} of config.json"
        )

    def _scales(
        self, parts: Mapping[str, str], shape: tuple[int, int], tensors: Tensors
    ) -> tuple[NDArray[Any], int | None]:
        """Return scales [out, groups] and the group's length; one scale of a tensor or a square block is said again for each."""
        name = parts["weight_scale"]
        scales = finite_scales(name, tensors)
        rows, columns = shape
        if scales.size == 1:
            return np.broadcast_to(scales.reshape(1, 1), (rows, 1)), None
        if scales.shape in ((rows,), (rows, 1)):
            return scales.reshape(rows, 1), None
        if scales.ndim == 2 and scales.shape[0] == rows and columns % scales.shape[1] == 0:
            return scales, columns // scales.shape[1]
        for block in {group.block for group in self._config.groups}:
            if (
                block is not None
                and len(block) == 2
                and scales.shape == (-(-rows // block[0]), columns // block[1])
                and columns % block[1] == 0
            ):
                return np.repeat(scales, block[0], axis=0)[:rows], block[1]
        raise InputError(
            f"{tensors.where(name)}: {name}: shape {list(scales.shape)} fits no tensor, channel, group or block of {list(shape)}"
        )

    def _zero_points(
        self, parts: Mapping[str, str], bits: int, shape: tuple[int, ...], tensors: Tensors
    ) -> Bytes | None:
        if "weight_zero_point" not in parts:
            return None
        name, middle = parts["weight_zero_point"], 1 << (bits - 1)
        stored = tensors.stored(name)
        if stored.dtype == np.int32:  # packed along the output channels
            expect_shape(name, (-(-shape[0] * bits // 32), shape[1]), tensors, parts["weight_scale"])
            return asymmetric(split_columns(stored.T, cast(Bits, bits))[:, : shape[0]], middle)
        if stored.dtype != np.int8:
            if bool((stored.astype(np.float32) == 0).all()):
                return None
            raise InputError(f"{tensors.where(name)}: {name}: type {stored.dtype.name}; expected int32 or int8")
        if stored.size == 1:
            stored = np.broadcast_to(stored.reshape(1, 1), shape)
        elif stored.size != shape[0] * shape[1]:
            raise InputError(f"{tensors.where(name)}: {name}: shape {list(stored.shape)}; expected {list(shape)}")
        points = stored.reshape(shape)
        return asymmetric((points.T.astype(np.int16) + middle).astype(np.uint8), middle)


def _input_scale(parts: Mapping[str, str], tensors: Tensors) -> float:
    expect_parts(parts, ("input_scale",), tensors)
    scale = one_scale(parts["input_scale"], tensors)
    if "input_zero_point" in parts:
        expect_zero_points(parts["input_zero_point"], tensors)
    return scale


def _codes(parts: Mapping[str, str], bits: int, shape: tuple[int, int], tensors: Tensors) -> Bytes:
    """Return a weight's bytes [out, in] uint8: offset by the middle where packed, as they are where not."""
    if "weight" in parts:
        return tensors.stored(parts["weight"]).view(np.uint8)
    packed = integers(parts["weight_packed"], tensors, "int32")
    return split_columns(packed, cast(Bits, bits))[:, : shape[1]]
