"""What every source of weights offers, whatever its files look like."""

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from galerne.export.checkpoint.packed import PackedTensor
from galerne.optimize.quantize.cache import CacheScales

DType = Literal["float32", "float16", "bfloat16"]


class Checkpoint(abc.ABC):
    """A model on disk under Hugging Face's names, read one tensor at a time.

    Nothing is held but the files' headers: the weights stay mapped, and a tensor lives as long as the caller keeps it.

    path: the folder, or the file, that was opened.
    format: how the weights are stored.
    config: as Hugging Face's `config.json` reads; what is wrong in it is for the model's family to say.
    quantization: what quantized the weights, such as "AWQ"; None where they are floats.
    """

    path: Path
    format: Literal["safetensors", "gguf", "consolidated"]
    config: dict[str, Any]
    quantization: str | None = None

    @abc.abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of each tensor by its name, such as `model.layers.0.mlp.up_proj.weight`: [out, in]."""

    @abc.abstractmethod
    def dtype(self, name: str) -> DType:
        """Return the type that `read` gives.

        Raises: InputError if there is no such tensor, or its stored type is none that Galerne reads.
        """

    @abc.abstractmethod
    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor, as a read-only view of the file where its stored form allows that.

        Returns: shape `shapes()[name]`, type `dtype(name)`; bfloat16 is `ml_dtypes.bfloat16`.
        Raises: InputError if there is no such tensor, or its stored type is none that Galerne reads.
        """

    def packed(self, name: str) -> PackedTensor | None:
        """Return a quantized tensor as it is stored; None for one of floats.

        Raises: InputError if there is no such tensor, or it is stored in a way that Galerne cannot keep.
        """
        return None

    def cache_scales(self) -> Mapping[int, CacheScales]:
        """Return what keys and values are rounded to, by the layer's number; empty where they are not.

        Raises: InputError if a scale is missing or damaged.
        """
        return {}

    @abc.abstractmethod
    def release(self, name: str) -> None:
        """Let go of the file's pages that reading a tensor brought into memory. Views of it stay valid."""

    @abc.abstractmethod
    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the tokenizer's files by name: `tokenizer.json` and what else there is; empty where there are none.

        Raises: InputError if there is a tokenizer that cannot be brought into `tokenizer.json`.
        """

    @abc.abstractmethod
    def files(self) -> list[Path]:
        """Return every file that the model is made from: config, weights, their index, tokenizer."""


def numpy_dtype(name: DType) -> np.dtype[Any]:
    """Return the numpy type of a checkpoint's float type."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
