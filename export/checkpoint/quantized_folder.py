"""A Hugging Face folder whose weights were quantized before: AWQ, GPTQ or compressed-tensors."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import DType
from galerne.export.checkpoint.layout import Layout, expect_zero_points, one_scale
from galerne.export.checkpoint.layout_awq import AwqLayout
from galerne.export.checkpoint.layout_compressed import CompressedLayout
from galerne.export.checkpoint.layout_gptq import GptqLayout
from galerne.export.checkpoint.packed import PackedTensor
from galerne.export.checkpoint.safetensors_folder import CONFIG, SafetensorsCheckpoint
from galerne.optimize.quantize.cache import CacheScales
from galerne.runtime.manifest import CacheType

_LAYOUTS: dict[str, Callable[[Mapping[str, Any], str], Layout]] = {
    "awq": AwqLayout,
    "gptq": GptqLayout,
    "compressed-tensors": CompressedLayout,
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Of attention's cache and queries, in compressed-tensors: beside the weights.
_NOT_WEIGHTS = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")


class QuantizedCheckpoint(SafetensorsCheckpoint):
    """A folder of safetensors with a `quantization_config`.

    A quantized weight appears under its plain name, as [out, in], and `packed` gives it as it is stored.

    note: what of the checkpoint is left out; empty where it is whole.
    """

    def __init__(self, path: Path) -> None:
        """Open a folder and check the shapes of every quantized weight's tensors.

        Raises: InputError naming the file and the field or tensor that is missing or not supported.
        """
        super().__init__(path)
        self.quantization_config = self.config.pop("quantization_config")
        where = str(path / CONFIG)
        if not isinstance(self.quantization_config, Mapping):
            raise InputError(f"{where}: quantization_config: expected a table, found {self.quantization_config!r}")
        method = self.quantization_config.get("quant_method")
        if method not in _LAYOUTS:
            raise InputError(
                f"{where}: quantization_config: quant_method: {method!r} is not supported; expected {', '.join(_LAYOUTS)}"
            )
        layout = _LAYOUTS[method](self.quantization_config, where)
        self._layout = layout
        self.quantization, self.note = layout.title, layout.note()
        stored = super().shapes()
        self.parts = layout.find(stored)
        if not self.parts and layout.cache is None:
            raise InputError(
                f"{path}: no tensor of a quantized weight in it, but {CONFIG} says quant_method {method!r}"
            )
        taken = {tensor for parts in self.parts.values() for tensor in parts.values()}
        self._dense = {
            name: shape
            for name, shape in stored.items()
            if name not in taken and name.rpartition(".")[2] not in _NOT_WEIGHTS
        }
        self._dense |= {name: layout.shape(parts, self) for name, parts in self.parts.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the weights' shapes by their plain names."""
        return self._dense

    def dtype(self, name: str) -> DType:
        """Return the type that `read` gives: the stored one, or float32 of a quantized weight."""
        return "float32" if name in self.parts else super().dtype(name)

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor; a quantized weight as float32 [out, in]."""
        packed = self.packed(name)
        return super().read(name) if packed is None else dequantize(packed)

    def packed(self, name: str) -> PackedTensor | None:
        """Return a quantized weight as it is stored."""
        return self._layout.packed(self.parts[name], self) if name in self.parts else None

    def cache_scales(self) -> Mapping[int, CacheScales]:
        """Return what keys and values are rounded to, by the layer's number.

        Raises: InputError if a scale is missing, or is not one above 0, or a zero point is not 0.
        """
        kind = self._layout.cache
        if kind is None:
            return {}
        layers = {int(match[1]) for name in super().shapes() if (match := _LAYER.match(name))}
        return {layer: self._scales_of(kind, f"model.layers.{layer}.self_attn") for layer in sorted(layers)}

    def _scales_of(self, kind: CacheType, module: str) -> CacheScales:
        names = super().shapes()
        for part in ("k", "v"):
            if f"{module}.{part}_scale" not in names:
                raise InputError(
                    f"{self.path}: {module}.{part}_scale: missing, but {CONFIG} has a kv_cache_scheme; quantize again"
                )
            if f"{module}.{part}_zero_point" in names:
                expect_zero_points(f"{module}.{part}_zero_point", self)
        return CacheScales(kind, *(one_scale(f"{module}.{part}_scale", self) for part in ("k", "v")))

    def release(self, name: str) -> None:
        """Drop a weight's pages from the resident set."""
        for tensor in self.parts[name].values() if name in self.parts else (name,):
            super().release(tensor)


def dequantize(packed: PackedTensor) -> NDArray[np.float32]:
    """Return a weight [out, in] in float32: the exact products, but for float32 scales."""
    out_features, in_features = packed.shape
    codes = np.empty((in_features, out_features), np.uint8)
    packed.write_codes(codes)
    if packed.kind == "float8e4m3fn":
        import ml_dtypes

        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    else:
        values = codes.astype(np.float32)
        zeros = packed.middle if packed.zero_points is None else _rows(packed.zero_points, in_features)
        values -= zeros
    values *= _rows(packed.scales.astype(np.float32), in_features)
    if packed.order is not None:
        values[packed.order] = values.copy()
    return np.ascontiguousarray(values.T)


def _rows(groups: NDArray[Any], in_features: int) -> NDArray[Any]:
    return np.repeat(groups, in_features // len(groups), axis=0)
