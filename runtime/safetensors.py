"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes.

The `safetensors` library copies each tensor that it gives to numpy, so the format, which is small, is read here over a
memory map. The checks are the library's own: tensors fill the file without a hole or an overlap.

Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import DTypeLike, NDArray

from galerne.errors import InputError
from galerne.runtime.mapped import MappedFile

_AGAIN = "the file is damaged, download or copy it again"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's limit
_FLOATS = {"F32": "<f4", "F16": "<f2"}
# Bits an element takes: the sizes of all are checked, whatever a reader hands out.
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def entries_in_a_row(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> dict[str, Any]:
    """Return the header's entries of tensors (name, type such as "F16", shape) that lie one after the other."""
    entries: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * _BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return entries


def header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return what stands in a file before the tensors' bytes, padded to a multiple of 8."""
    header = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits, which are the upper halves of theirs."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


@dataclass(frozen=True)
class Entry:
    """One tensor of the header: `begin` and `end` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsHeader:
    """A mapped safetensors file whose header was read and checked.

    entries: the tensors by name. metadata: the file's own notes, which the format leaves free.
    """

    def __init__(self, path: Path) -> None:
        """Open a file. Raises: InputError if it is missing, truncated, or its header does not describe it."""
        self.path = path
        self._file = MappedFile(path)
        length = int.from_bytes(self._file.bytes(0, _LENGTH_BYTES), "little")
        self._start = _LENGTH_BYTES + length
        if self._file.size < _LENGTH_BYTES or length > _MAX_HEADER_BYTES or self._start > self._file.size:
            raise InputError(
                f"{path}: header length: found {length} bytes in a file of {self._file.size}; "
                f"either this is no safetensors file or {_AGAIN}"
            )
        header = _parse_json(self._file.bytes(_LENGTH_BYTES, length), str(path))
        metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        self.entries = {name: _parse_entry(item, f"{path}: {name!r}") for name, item in header.items()}
        self._check_layout()

    def view(self, name: str, dtype: DTypeLike) -> NDArray[Any]:
        """Return a tensor's bytes as a read-only array of a type of its width."""
        entry = self.entries[name]
        return self._file.view(self._start + entry.begin, entry.shape, dtype)

    def float32(self, name: str) -> NDArray[np.float32]:
        """Return a tensor of floats as float32. Raises: InputError if it is of another type."""
        stored = self.entries[name].dtype
        if stored == "BF16":
            return from_bfloat16(self.view(name, "<u2"))
        if stored not in _FLOATS:
            raise InputError(f"{self.path}: {name!r}: type {stored} is not supported; expected F32, F16, BF16")
        return self.view(name, _FLOATS[stored]).astype(np.float32)

    def release(self, name: str) -> None:
        """Drop a tensor's pages from the resident set."""
        entry = self.entries[name]
        self._file.release(self._start + entry.begin, entry.end - entry.begin)

    def _check_layout(self) -> None:
        end = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != end:
                raise InputError(
                    f"{self.path}: {name!r}: data_offsets: expected to start at {end}, found {entry.begin}, "
                    f"which leaves a hole or overlaps another tensor; {_AGAIN}"
                )
            end = entry.end
        if self._start + end != self._file.size:
            raise InputError(
                f"{self.path}: size: expected {self._start + end} bytes, found {self._file.size}; "
                f"{'the download was cut off, fetch it again' if self._start + end > self._file.size else _AGAIN}"
            )


def _parse_json(data: bytes, where: str) -> dict[str, object]:
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{where}: header: not JSON ({exc}); either this is no safetensors file or {_AGAIN}") from exc
    if not isinstance(header, dict):
        raise InputError(f"{where}: header: expected a table, found {type(header).__name__}; {_AGAIN}")
    return header


def _parse_entry(item: object, where: str) -> Entry:
    if not isinstance(item, dict):
        raise InputError(f"{where}: expected a table, found {item!r}; {_AGAIN}")
    dtype, shape, offsets = item.get("dtype"), item.get("shape"), item.get("data_offsets")
    if dtype not in _BITS:
        raise InputError(f"{where}: dtype: {dtype!r} is no type of the format; {_AGAIN}")
    if not _counts(shape):
        raise InputError(f"{where}: shape: expected a list of sizes, found {shape!r}; {_AGAIN}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where}: data_offsets: expected a start and an end from 0, found {offsets!r}; {_AGAIN}")
    bits = _BITS[dtype]
    for size in shape:
        bits *= size
    if bits != 8 * (offsets[1] - offsets[0]):
        raise InputError(
            f"{where}: data_offsets: expected {bits // 8} bytes for {dtype} {shape}, "
            f"found {offsets[1] - offsets[0]}; {_AGAIN}"
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _counts(value: object) -> TypeGuard[list[int]]:
    # Bounded as numpy bounds an array's shape.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
    )
