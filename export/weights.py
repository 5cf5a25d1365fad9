"""Streams a checkpoint's weights into `weights.bin`, one tensor in memory at a time."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.optimize.graph.weights import Weight
from galerne.optimize.quantize.qdq import insert_dequantize
from galerne.optimize.quantize.recipe import Recipe, WeightFormat
from galerne.optimize.quantize.rounding import dequantize, pack_int4, quantize

# External data starts on pages, so that a reader can map it.
ALIGNMENT_BYTES = 4096
# How much of a tensor is widened to float32 at once, in weights: enough to work on, little to hold.
_STRIPE = 4 << 20

Array = NDArray[Any]


class WeightsFile:
    """`weights.bin` while it is written, next to the graph's initializers that it fills."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._name, self._folder = path.name, path.parent

    def __enter__(self) -> "WeightsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, value: ir.Value, data: Array) -> None:
        """Append a tensor's bytes and make the initializer point at them."""
        assert value.shape is not None and value.dtype is not None and value.name is not None
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT_BYTES))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        shape = ir.Shape(value.shape.numpy())
        value.const_value = ir.ExternalTensor(
            self._name,
            offset,
            self._file.tell() - offset,
            value.dtype,
            shape=shape,
            name=value.name,
            base_dir=self._folder,
        )


def write_weights(
    model: ir.Model,
    weights: list[Weight],
    checkpoint: Checkpoint,
    recipe: Recipe,
    path: Path,
    advance: Callable[[int], None],
) -> None:
    """Write every weight in the recipe's format, and make the graph read it: in place, with DequantizeLinear where quantized.

    Args:
        model: the graph, its weights named and without data.
        weights: what to write, in the file's order.
        path: of `weights.bin`.
        advance: told the number of weights that each tensor had, for progress.
    Raises: InputError on a weight that is not finite, or too large for the type it is stored in.
    """
    compute = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[recipe.compute]]
    with WeightsFile(path) as file:
        for weight in weights:
            value = model.graph.initializers[weight.name]
            form = recipe.format_for(weight.name)
            if weight.role == "linear" and form.bits is not None:
                block = form.block_for(weight.shape[0], weight.name)
                values, scale = insert_dequantize(model.graph, value, form.bits, block, compute)
                rounded, scales = _quantized(checkpoint, weight, form.bits, block)
                file.append(values, pack_int4(rounded) if form.bits == 4 else rounded)
                file.append(scale, scales if form.bits == 4 else scales[0])
            else:
                assert value.dtype is not None
                file.append(value, _floats(checkpoint, weight, value.dtype.numpy()))
            advance(math.prod(weight.shape))


def _quantized(checkpoint: Checkpoint, weight: Weight, bits: int, block: int) -> tuple[Array, Array]:
    """Return values [in, out] int8 and scales [in // block, out] float16 of a linear weight."""
    rows, columns = weight.shape
    values = np.empty((rows, columns), np.int8)
    scales = np.empty((rows // block, columns), np.float16)
    for first, stripe in _stripes(checkpoint, weight):
        rounded, scale = quantize(stripe, bits, block)
        values[:, first : first + len(stripe)] = rounded.T
        scales[:, first : first + len(stripe)] = scale.T
    return values, scales


def _floats(checkpoint: Checkpoint, weight: Weight, dtype: np.dtype[Any]) -> Array:
    """Return a weight as floats: [in, out] for a linear one, as the checkpoint has it otherwise."""
    out = np.empty(weight.shape, dtype)
    for first, stripe in _stripes(checkpoint, weight):
        with np.errstate(over="ignore"):  # said below, by name
            narrow = stripe.astype(dtype)
        if dtype.itemsize == 2 and not np.isfinite(narrow.astype(np.float32)).all():
            raise InputError(f"{weight.sources}: a value is too large for {dtype}; use --precision bf16 or fp32")
        if weight.role == "linear":
            out[:, first : first + len(stripe)] = narrow.T
        else:
            out[first : first + len(stripe)] = narrow
    return out


def _stripes(checkpoint: Checkpoint, weight: Weight) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (first row, rows as float32) over the weight's sources one after the other."""
    first = 0
    for name in weight.sources:
        tensor = checkpoint.read(name)
        step = max(1, _STRIPE // max(1, math.prod(tensor.shape[1:])))
        for start in range(0, len(tensor), step):
            stripe = widen(tensor[start : start + step])
            if not np.isfinite(stripe).all():
                raise InputError(f"{checkpoint.path}: {name}: holds NaN or infinity; the checkpoint is damaged")
            yield first, stripe
            first += len(stripe)
        checkpoint.release(name)


def widen(array: Array) -> NDArray[np.float32]:
    """Return floats of any width as float32; bfloat16 by shifting, which is many times faster than a cast in numpy."""
    if array.dtype == ml_dtypes.bfloat16:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def rounded_like(tensor: torch.Tensor, name: str, recipe: Recipe) -> torch.Tensor:
    """Return a checkpoint's tensor as the recipe stores it, widened again, for a PyTorch model that must match a bundle.

    Args:
        tensor: [out, in] for a linear weight, [experts, out, in] for those of several experts, float32.
        name: of the tensor in transformers.
    """
    if tensor.ndim == 3:
        return torch.stack([rounded_like(part, name, recipe) for part in tensor])
    if name.endswith(".bias"):
        return tensor.to(getattr(torch, recipe.compute)).float()
    if tensor.ndim != 2:
        return tensor
    form = WeightFormat(recipe.compute) if name == "model.embed_tokens.weight" else recipe.format_for(name)
    if form.bits is None:
        return tensor.to(getattr(torch, form.dtype)).float()
    block = form.block_for(tensor.shape[1], name)
    return torch.from_numpy(dequantize(*quantize(tensor.numpy(), form.bits, block)))
