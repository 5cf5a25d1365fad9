"""The compressed-tensors format, as transformers reads it: a weight's tensors, and the table in config.json.

Source: compressed-tensors 0.20, compressors/pack_quantized and compressors/naive_quantized; quantization/quant_config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galerne.export.calibrate.rounded import RoundedWeight
from galerne.optimize.quantize.cache import CacheScales
from galerne.optimize.quantize.recipe import WeightFormat
from galerne.runtime.manifest import CacheType

# int4 codes in a word of int32, the first in the low bits.
_CODES = 8


@dataclass(frozen=True)
class Scheme:
    """What products have in common that share a config group.

    dtype: of the weights.
    block: how many weights along the input axis share a scale; None for one scale for an output channel.
    inputs: what their inputs are rounded to, with one scale a tensor; None if they are not.
    """

    dtype: str
    block: int | None
    inputs: str | None

    @staticmethod
    def of(name: str, form: WeightFormat, in_features: int, inputs: str | None) -> "Scheme":
        """Return the scheme of a weight. Raises: InputError if its block does not divide the input axis."""
        block = form.block_for(in_features, name)
        return Scheme(form.dtype, None if form.block_size is None else block, inputs)

    @property
    def format(self) -> str:
        """The compressor's name."""
        return {"int4": "pack-quantized", "int8": "int-quantized"}.get(self.dtype, "float-quantized")

    def group(self, targets: list[str]) -> dict[str, Any]:
        """Return the scheme as a config group for some modules."""
        along: dict[str, Any] = {"strategy": "channel"}
        if self.block is not None:
            along = {"strategy": "group", "group_size": self.block}
        inputs = None if self.inputs is None else {**_arguments(self.inputs), "strategy": "tensor"}
        return {
            "targets": targets,
            "weights": {**_arguments(self.dtype), **along},
            "input_activations": inputs,
            "output_activations": None,
            "format": self.format,
        }


def tensors_of(module: str, weight: RoundedWeight) -> dict[str, Tensor]:
    """Return a rounded weight's tensors by their names in the file."""
    tensors = {f"{module}.weight_scale": torch.from_numpy(weight.scales)}
    if weight.kind == "int4":
        tensors[f"{module}.weight_packed"] = torch.from_numpy(_packed(weight))
        tensors[f"{module}.weight_shape"] = torch.tensor(weight.values.shape, dtype=torch.int64)
    elif weight.kind == "int8":
        tensors[f"{module}.weight"] = torch.from_numpy(weight.values)
    else:
        tensors[f"{module}.weight"] = torch.from_numpy(weight.values.view(np.uint8)).view(torch.float8_e4m3fn)
    if weight.input_scale is not None:
        tensors[f"{module}.input_scale"] = torch.tensor([weight.input_scale], dtype=torch.float32)
    return tensors


def quantization_config(schemes: Mapping[str, Scheme], ignored: list[str], cache: CacheType | None) -> dict[str, Any]:
    """Return `quantization_config` of config.json.

    Args:
        schemes: of each quantized module by its name.
        ignored: the linear modules that stay floats.
        cache: what keys and values are rounded to, with one scale a tensor; None if they are not.
    """
    modules: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        modules.setdefault(scheme, []).append(module)
    # The most common scheme is that of all linear modules; a module's own name goes before that.
    ranked = sorted(modules.items(), key=lambda item: -len(item[1]))
    groups = {
        f"group_{number}": scheme.group(["Linear"] if number == 0 else sorted(names))
        for number, (scheme, names) in enumerate(ranked)
    }
    formats = sorted({scheme.format for scheme in modules}) or ["dense"]
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None if cache is None else {**_arguments(cache), "strategy": "tensor"},
        "global_compression_ratio": None,
    }


def cache_tensors(layer: int, scales: CacheScales) -> dict[str, Tensor]:
    """Return the scales of a layer's keys and values by their names in the file, [1] float32."""
    module = f"model.layers.{layer}.self_attn"
    return {
        f"{module}.{part}_scale": torch.tensor([scale], dtype=torch.float32)
        for part, scale in (("k", scales.key), ("v", scales.value))
    }


def _arguments(dtype: str) -> dict[str, Any]:
    bits, kind = {"int4": (4, "int"), "int8": (8, "int")}.get(dtype, (8, "float"))
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False}


def _packed(weight: RoundedWeight) -> Any:
    """Return int4 values as [out, in / 8] int32, offset by 8; zero codes fill up the last word."""
    rows, columns = weight.values.shape
    codes = np.zeros((rows, -(-columns // _CODES) * _CODES), np.uint32)
    codes[:, :columns] = weight.values.astype(np.int16) + 8
    words = np.zeros((rows, codes.shape[1] // _CODES), np.uint32)
    for place in range(_CODES):
        words |= codes[:, place::_CODES] << np.uint32(4 * place)
    return words.view(np.int32)
