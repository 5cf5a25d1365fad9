"""A checkpoint with a LoRA adapter merged into it: W + scale * B A, in float32, tensor by tensor as they are read.

Source: peft 0.21, tuners/lora/layer.py (get_delta_weight).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint, DType
from galerne.export.tiles import widen
from galerne.runtime.lora import LoraFolder

_COPY = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.weight")
_ROWS_AT_ONCE = 1024


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are read with an adapter's changes.

    base: the checkpoint without them.
    folder: the adapter's.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        """Open an adapter as peft saves it. Raises: InputError naming what is missing, or what cannot be merged."""
        if base.quantization is not None:
            raise InputError(
                f"{base.path}: quantized already with {base.quantization}; an adapter can be merged into floats only"
            )
        self.base, self.folder = base, folder
        self.path, self.config = base.path, base.config
        self.format = base.format
        self._adapter = LoraFolder(folder)
        layers = {
            name.removesuffix(".weight"): shape
            for name, shape in base.shapes().items()
            if name.endswith(".weight") and len(shape) == 2
        }
        unknown = f"no weight of this name in {base.path}; is it the adapter's base?"
        products = self._adapter.products(layers, base.path, unknown, self._copies_base)
        self._products = {f"{module}.weight": product for module, product in products.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the base's shapes."""
        return self.base.shapes()

    def dtype(self, name: str) -> DType:
        """Return float32 for a tensor that the adapter changes, and the base's type for the rest."""
        return "float32" if name in self._products else self.base.dtype(name)

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor, with the adapter's change added in float32."""
        values = self.base.read(name)
        product = self._products.get(name)
        if product is None:
            return values
        a, b = (self._adapter.file.float32(part) for part in (product.a, product.b))
        merged = np.empty(values.shape, np.float32)
        for first in range(0, len(values), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            merged[rows] = (b[rows] @ a) * np.float32(product.scale)
            merged[rows] += widen(values[rows])
        return merged

    def release(self, name: str) -> None:
        """Drop a tensor's pages from the resident set."""
        self.base.release(name)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the base's tokenizer."""
        return self.base.tokenizer_files()

    def files(self) -> list[Path]:
        """Return the base's files and the adapter's."""
        return [*self.base.files(), *self._adapter.files()]

    def _copies_base(self, stored: str) -> bool:
        """Whether a tensor is the base's own, which peft saves beside adapters of embeddings and lm_head."""
        match = _COPY.fullmatch(stored)
        name = f"{match[1]}.weight" if match else ""
        if self.base.shapes().get(name) != self._adapter.file.entries[stored].shape:
            return False
        return np.array_equal(widen(self.base.read(name)), self._adapter.file.float32(stored))
