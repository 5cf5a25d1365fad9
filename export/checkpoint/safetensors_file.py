"""A safetensors file of a checkpoint: which of its types are read, and as what."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import DType, numpy_dtype
from galerne.runtime.safetensors import SafetensorsHeader

_READABLE: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What quantized weights are made of, beside floats.
_STORED: dict[str, np.dtype[Any]] = {
    **{name: numpy_dtype(dtype) for name, dtype in _READABLE.items()},
    **{f"{kind}{bits}": np.dtype(f"<{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


class SafetensorsFile(SafetensorsHeader):
    """A mapped safetensors file, its tensors in the types that checkpoints are stored in."""

    def dtype(self, name: str) -> DType:
        """Return a tensor's type. Raises: InputError if it is not one of float32, float16 and bfloat16."""
        stored = self.entries[name].dtype
        if stored not in _READABLE:
            raise InputError(
                f"{self.path}: {name!r}: type {stored} is not supported; expected {', '.join(_READABLE)}; "
                "convert the checkpoint to one of them"
            )
        return _READABLE[stored]

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor as a read-only view. Raises: InputError as `dtype` does."""
        return self.view(name, numpy_dtype(self.dtype(name)))

    def stored(self, name: str) -> NDArray[Any]:
        """Return a tensor of integers, float8 or floats as a read-only view, for those who know what it stands for.

        Raises: InputError if it is of another type.
        """
        entry = self.entries[name]
        if entry.dtype not in _STORED:
            raise InputError(
                f"{self.path}: {name!r}: type {entry.dtype} is not supported; expected {', '.join(_STORED)}"
            )
        return self.view(name, _STORED[entry.dtype])
