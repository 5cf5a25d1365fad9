"""Streams a checkpoint's weights into `weights.bin`, a few bands of a tensor in memory at a time.

A band is a part of a tensor that lies in one piece in the file. Bands are made on all cores, and written and hashed in the
file's order, so that the bytes are the same for any number of threads.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.packed_weights import packed_initializers, packed_sources
from galerne.export.tiles import is_finite, narrow, pack_rows, transpose_into, widen
from galerne.optimize.graph.weights import Weight
from galerne.optimize.quantize.qdq import insert_dequantize
from galerne.optimize.quantize.recipe import AnyRecipe, WeightFormat
from galerne.optimize.quantize.rounding import Float16, Float32, pack_int4, round_to, scales_of
from galerne.optimize.quantize.search import scales_by
from galerne.optimize.quantize.table import insert_quantized_table
from galerne.parallel import ordered
from galerne.runtime.manifest import FileEntry

# External data starts on pages, so that a reader can map it.
ALIGNMENT_BYTES = 4096
# Weights of a band: enough to work on, little to hold.
_BAND = 8 << 20
# Weights of a tile, on which all steps are done while a core's cache holds it.
_TILE = 128 << 10
# Rows of a tile that is turned: they become columns, so that at least a cache line is written at once.
_TILE_ROWS = 64
# Bands begin at a multiple of this along the input axis, which every int4 block divides.
_GRAIN = 256

Array = NDArray[Any]
# Gives the scales of a tile [out, in] for some bits and a block.
Scales = Callable[[Float32, int, int], Float16]
FloatTypes = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Piece:
    """What comes next in the file.

    data: its bytes.
    begins: the initializer that starts with it, and the initializer's whole size in bytes.
    ends: the weight that is complete with it.
    """

    data: Array
    begins: tuple[ir.Value, int] | None = None
    ends: Weight | None = None


class WeightsFile:
    """`weights.bin` while it is written and hashed, next to the graph's initializers that it fills."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._name, self._folder = path.name, path.parent
        self._digest, self._size = hashlib.sha256(), 0

    def __enter__(self) -> "WeightsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begin(self, value: ir.Value, size: int) -> None:
        """Make the initializer point at the next page, where its `size` bytes are written next."""
        assert value.shape is not None and value.dtype is not None and value.name is not None
        self.write(np.zeros(-self._size % ALIGNMENT_BYTES, np.uint8))
        shape = ir.Shape(value.shape.numpy())
        value.const_value = ir.ExternalTensor(
            self._name, self._size, size, value.dtype, shape=shape, name=value.name, base_dir=self._folder
        )

    def write(self, data: Array) -> None:
        """Append an array's bytes."""
        left = data.reshape(-1).view(np.uint8).data
        self._digest.update(left)
        self._size += len(left)
        while left:
            left = left[self._file.write(left) :]

    def entry(self) -> FileEntry:
        """Return the hash and the size of what was written."""
        return FileEntry(self._digest.hexdigest(), self._size)


class Sources:
    """The checkpoint's tensors that a weight is made of, one after the other along their first axis."""

    def __init__(self, checkpoint: Checkpoint, weight: Weight) -> None:
        self.weight, self._path = weight, checkpoint.path
        self._tensors = [(name, checkpoint.read(name)) for name in weight.sources]
        self.rows = [len(tensor) for _, tensor in self._tensors]

    def parts(self, rows: int) -> Iterator[tuple[int, str, Array]]:
        """Yield (number of the first row, tensor's name, at most `rows` of its rows)."""
        offset = 0
        for name, tensor in self._tensors:
            for start in range(0, len(tensor), rows):
                yield offset + start, name, tensor[start : start + rows]
            offset += len(tensor)

    def tiles(self, first: int, last: int) -> Iterator[tuple[slice, str, Array]]:
        """Yield (where it lies in rows [first, last), tensor's name, some of these rows)."""
        for offset, name, rows in self.parts(_TILE // max(1, math.prod(self.weight.shape[1:])) or 1):
            start, end = max(offset, first), min(offset + len(rows), last)
            if start < end:
                yield slice(start - first, end - first), name, rows[start - offset : end - offset]

    def check(self, stored: Array, name: str, tile: Array) -> None:
        """Raises: InputError if what is stored of a tile, its values or its scales, is not finite."""
        if is_finite(stored):
            return
        if not is_finite(tile):
            raise InputError(f"{self._path}: {name}: holds NaN or infinity; the checkpoint is damaged")
        raise InputError(f"{self._path}: {name}: a value is too large for {stored.dtype}; use --precision bf16 or fp32")


def write_weights(
    model: ir.Model,
    weights: list[Weight],
    checkpoint: Checkpoint,
    recipe: AnyRecipe,
    path: Path,
    advance: Callable[[int], None],
    threads: int | None = None,
) -> FileEntry:
    """Write every weight in the recipe's format, and make the graph read it: in place, with DequantizeLinear where quantized.

    Args:
        model: the graph, its weights named and without data.
        weights: what to write, in the file's order.
        path: of `weights.bin`.
        advance: told the number of weights that each tensor had, for progress.
        threads: by default one for each core. The bytes do not depend on it.
    Returns: the file's hash and size.
    Raises: InputError on a weight that is not finite, or too large for the type it is stored in.
    """
    work = (step for weight in weights for step in _weight(model, weight, checkpoint, recipe, threads))
    with WeightsFile(path) as file:
        for piece in ordered(work, threads):
            if piece.begins is not None:
                file.begin(*piece.begins)
            file.write(piece.data)
            if piece.ends is not None:
                for name in piece.ends.sources:
                    checkpoint.release(name)
                advance(math.prod(piece.ends.shape))
        return file.entry()


def _weight(
    model: ir.Model, weight: Weight, checkpoint: Checkpoint, recipe: AnyRecipe, threads: int | None
) -> Iterator[Callable[[], Piece]]:
    """Yield what makes a weight's pieces, in the file's order, and put the weight into the graph."""
    value = model.graph.initializers[weight.name]
    if packed := packed_sources(weight, checkpoint):
        for initializer, size, data in packed_initializers(model.graph, value, packed):
            yield partial(_piece, data, (initializer, size))
        yield partial(_piece, partial(np.empty, 0, np.uint8), ends=weight)
        return
    sources = Sources(checkpoint, weight)
    if weight.role == "table" and recipe.table.bits is not None:
        yield from _quantized_table(model, value, sources)
        return
    # Parts of a product are of one form; one that is the embedding's table too goes by its own name.
    form = recipe.format_for(weight.name if len(weight.sources) == 1 else weight.sources[0])
    if weight.role == "linear" and form.bits is not None:
        yield from _quantized(model, value, sources, form, recipe, threads)
        return
    assert value.dtype is not None
    dtype = value.dtype.numpy()
    make = _turned if weight.role == "linear" else _as_it_is
    begins = (value, math.prod(weight.shape) * dtype.itemsize)
    for first, last in _bands(weight.shape):
        yield partial(_piece, partial(make, sources, first, last, dtype), begins if first == 0 else None)
    yield partial(_piece, partial(np.empty, 0, np.uint8), ends=weight)


def _quantized(
    model: ir.Model, value: ir.Value, sources: Sources, form: WeightFormat, recipe: AnyRecipe, threads: int | None
) -> Iterator[Callable[[], Piece]]:
    weight = sources.weight
    (rows, columns), bits = weight.shape, form.bits
    assert bits is not None
    block, find = form.block_for(rows, weight.name), scales_by(recipe.method, bits)
    stored, groups = (ir.DataType.INT4, block) if bits == 4 else (ir.DataType.INT8, None)
    values, scale = insert_dequantize(model.graph, value, stored, groups, FloatTypes[recipe.compute])
    scales = np.empty((rows // block, columns), np.float16)
    if bits == 8:  # one scale for a whole row of the source, so that it must be known before the first band
        parts = sources.parts(_TILE // rows or 1)
        for _ in ordered((partial(_fill_scales, sources, *part, scales, find) for part in parts), threads):
            pass
    size = (rows * columns * bits + 7) // 8
    for first, last in _bands(weight.shape):
        make = partial(int8_band, sources, first, last, scales)
        if bits == 4:
            make = partial(int4_band, sources, first, last, block, scales, find)
        yield partial(_piece, make, (values, size) if first == 0 else None)
    # Handed over now and read at its turn, when every band has filled in its part.
    yield partial(_piece, lambda: scales, (scale, scales.nbytes), weight)


def _quantized_table(model: ir.Model, value: ir.Value, sources: Sources) -> Iterator[Callable[[], Piece]]:
    shape = sources.weight.shape
    values, scale = insert_quantized_table(model.graph, value)
    scales = np.empty((shape[0], 1), np.float16)
    for first, last in _bands(shape):
        make = partial(_rounded_rows, sources, first, last, scales)
        yield partial(_piece, make, (values, math.prod(shape)) if first == 0 else None)
    yield partial(_piece, lambda: scales, (scale, scales.nbytes), sources.weight)


def _piece(make: Callable[[], Array], begins: tuple[ir.Value, int] | None = None, ends: Weight | None = None) -> Piece:
    return Piece(make(), begins, ends)


def _bands(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Cut the first axis of what is written into bands."""
    rows = _BAND // max(1, math.prod(shape[1:])) // _GRAIN * _GRAIN or _GRAIN
    for first in range(0, shape[0], rows):
        yield first, min(first + rows, shape[0])


def _as_it_is(sources: Sources, first: int, last: int, dtype: np.dtype[Any]) -> Array:
    """Return rows [first, last) of a table or of vectors that follow each other."""
    out = np.empty((last - first, *sources.weight.shape[1:]), dtype)
    for place, name, tile in sources.tiles(first, last):
        stored = narrow(tile, dtype)
        out[place] = stored
        sources.check(stored, name, tile)
    return out


def _rounded_rows(sources: Sources, first: int, last: int, scales: Array) -> Array:
    """Return rows [first, last) of a table in int8, and fill in their scales [rows, 1]."""
    out = np.empty((last - first, sources.weight.shape[1]), np.int8)
    for place, name, tile in sources.tiles(first, last):
        wide = widen(tile)
        scale = scales_of(wide, 8, wide.shape[1])
        sources.check(scale, name, tile)
        scales[first:last][place] = scale
        out[place] = round_to(wide, scale, 8)
    return out


def _turned(sources: Sources, first: int, last: int, dtype: np.dtype[Any]) -> Array:
    """Return rows [first, last) of a linear weight [in, out]."""
    out = np.empty((last - first, sources.weight.shape[1]), dtype)
    for column, name, rows in sources.parts(_tile_rows(last - first)):
        tile = rows[:, first:last]
        stored = narrow(tile, dtype)
        sources.check(stored, name, tile)
        transpose_into(out[:, column : column + len(rows)], stored)
    return out


def int4_band(sources: Sources, first: int, last: int, block: int, scales: Array, find: Scales) -> Array:
    """Return rows [first, last) of an int4 weight [in, out], two values to a byte, and fill in their scales."""
    columns = sources.weight.shape[1]
    even = all(rows % 2 == 0 for rows in sources.rows)  # else two values of one byte come from different tiles
    out = np.empty((last - first, columns // 2 if even else columns), np.uint8)
    for column, name, rows in sources.parts(_tile_rows(last - first)):
        tile = rows[:, first:last]
        wide = widen(tile)
        scale = find(wide, 4, block)
        sources.check(scale, name, tile)
        scales[first // block : last // block, column : column + len(rows)] = scale.T
        if even:
            transpose_into(out[:, column // 2 : (column + len(rows)) // 2], pack_rows(round_to(wide, scale, 4)))
        else:
            transpose_into(out[:, column : column + len(rows)], round_to(wide, scale, 4).view(np.uint8))
    return out if even else pack_int4(out.view(np.int8))


def int8_band(sources: Sources, first: int, last: int, scales: Array) -> Array:
    """Return rows [first, last) of an int8 weight [in, out] with known scales [1, out]."""
    out = np.empty((last - first, sources.weight.shape[1]), np.int8)
    for column, _, rows in sources.parts(_tile_rows(last - first)):
        columns = slice(column, column + len(rows))
        transpose_into(out[:, columns], round_to(widen(rows[:, first:last]), scales[:, columns].T, 8))
    return out


def _fill_scales(sources: Sources, offset: int, name: str, rows: Array, scales: Array, find: Scales) -> None:
    scale = find(widen(rows), 8, rows.shape[1])
    sources.check(scale, name, rows)
    scales[0, offset : offset + len(rows)] = scale[:, 0]


def _tile_rows(height: int) -> int:
    return _TILE // height // _TILE_ROWS * _TILE_ROWS or _TILE_ROWS
