"""The folder that a quantized checkpoint is written into: one file for each decoder layer, and one for the rest."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from galerne.export.calibrate.compressed import Scheme, quantization_config
from galerne.export.calibrate.layers import Float32
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.safetensors_folder import CONFIG, INDEX
from galerne.runtime.manifest import CacheType
from galerne.runtime.safetensors import SafetensorsHeader

_HIDDEN, _SCRATCH, _NEW = "hidden-*.npy", "scratch-*.npy", ".new"


class QuantizedFolder:
    """Files appear in it whole, in the layers' order, so that what is there after a run was killed can be gone on from.

    Between two layers it also holds the hidden states that the next one starts from.
    """

    def __init__(self, path: Path, layers: int) -> None:
        self._path, self._layers = path, layers

    def layers_done(self) -> int:
        """Return how many of the first layers are written, with the hidden states that come after them."""
        return next(i for i in range(self._layers + 1) if not (self._path / self._file(i)).is_file())

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a layer's tensors, or, with the number after the last layer's, the rest."""
        new = self._path / (self._file(number) + _NEW)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, metadata={"format": "pt"})
        new.chmod(0o644)  # the library leaves it to its owner alone
        os.replace(new, self._path / self._file(number))

    def new_hidden(self, shape: tuple[int, ...]) -> Float32:
        """Return a mapped array for hidden states that `keep_hidden` is called with when they are whole."""
        return _mapped(self._path / f"hidden{_NEW}", shape)

    def keep_hidden(self, number: int, hidden: Float32) -> None:
        """Keep what a layer starts from, before the layer before it is written."""
        assert isinstance(hidden, np.memmap)
        hidden.flush()
        os.replace(self._path / f"hidden{_NEW}", self._hidden(number))

    def hidden(self, number: int) -> Float32:
        """Return the hidden states that a layer starts from, [sequences, S, hidden_size], mapped."""
        states: Float32 = np.load(self._hidden(number), mmap_mode="r")
        return states

    def scratch(self, name: str, shape: tuple[int, ...]) -> Float32:
        """Return a mapped array for activations within a layer."""
        return _mapped(self._path / _SCRATCH.replace("*", name), shape)

    def clear(self, number: int | None) -> None:
        """Remove what is needed no more when a layer is to start; None for all."""
        kept = None if number is None else self._hidden(number)
        for pattern in (_HIDDEN, _SCRATCH, f"*{_NEW}"):
            for file in self._path.glob(pattern):
                if file != kept:
                    file.unlink()

    def finish(
        self,
        config: Mapping[str, Any],
        schemes: Mapping[str, Scheme],
        ignored: list[str],
        cache: CacheType | None,
        others: Mapping[str, bytes],
    ) -> None:
        """Write index, config and other files, and remove what only the run needed.

        Args:
            config: the checkpoint's, without `quantization_config`.
            schemes, ignored, cache: as in `quantization_config`.
            others: by name, such as the tokenizer's.
        """
        self.clear(None)
        home = {
            name: file
            for file in map(self._file, range(self._layers + 1))
            for name in SafetensorsHeader(self._path / file).entries
        }
        total = sum((self._path / file).stat().st_size for file in set(home.values()))
        _write_json(self._path / INDEX, {"metadata": {"total_size": total}, "weight_map": home})
        table = quantization_config(schemes, ignored, cache)
        _write_json(self._path / CONFIG, {**config, "quantization_config": table})
        for name, data in others.items():
            (self._path / name).write_bytes(data)

    def _file(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{self._layers + 1:05}.safetensors"

    def _hidden(self, number: int) -> Path:
        return self._path / _HIDDEN.replace("*", f"{number:05}")


def as_stored(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return a tensor in the checkpoint's type."""
    values = np.array(checkpoint.read(name))
    if checkpoint.dtype(name) == "bfloat16":
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _mapped(path: Path, shape: tuple[int, ...]) -> Float32:
    made: Float32 = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    return made


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
