"""The header of a GGUF file: its metadata and the list of its tensors, checked against the file's size.

The `gguf` package's reader makes several objects for each of a vocabulary's 100,000 strings (2 s for a small model),
and a garbled count sends it into a loop without an end. Here every step is checked against the end of the file, and
long arrays are stepped over.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from galerne.errors import InputError
from galerne.runtime.mapped import MappedFile

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class ArrayValue:
    """Stands for an array in the metadata, whose items were stepped over."""

    count: int


Value = int | float | bool | str | ArrayValue


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` is outermost first, as numpy has it; `offset` and `size` count bytes in the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What stands before the tensors' bytes. Tensors have llama.cpp's names, such as `blk.0.attn_q.weight`."""

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def read_header(file: MappedFile) -> Header:
    """Read the header.

    Raises: InputError if the file is no GGUF, is truncated, or has a tensor whose type, shape or place is impossible.
    """
    cursor = _Cursor(file)
    if file.bytes(0, 4) != _MAGIC:
        raise InputError(
            f"{file.path}: expected a GGUF file, found other content; give a .gguf file or a Hugging Face folder"
        )
    cursor.position = 4
    version = cursor.number("<I", "version")
    if version not in _VERSIONS:
        raise InputError(
            f"{file.path}: version: found {version}, expected 2 or 3 (little-endian); "
            "convert the model again with a current llama.cpp"
        )
    tensor_count, value_count = cursor.number("<Q", "tensor_count"), cursor.number("<Q", "kv_count")
    metadata: dict[str, Value] = {}
    for _ in range(value_count):
        key = cursor.name("a metadata key")
        metadata[key] = cursor.value(cursor.number("<I", key), key)
    infos = [cursor.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise InputError(f"{file.path}: general.alignment: expected a power of two, found {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: _place(file, name, info, start) for name, info in infos}
    if len(tensors) != len(infos):
        raise InputError(f"{file.path}: two tensors have one name; the file is damaged, download or convert it again")
    _check_overlap(file, tensors)
    return Header(metadata, tensors)


class _Cursor:
    """Steps through a header, with an InputError in place of a step past the file's end."""

    def __init__(self, file: MappedFile) -> None:
        self._file, self.position = file, 0

    def take(self, count: int, what: str) -> bytes:
        """Return the next `count` bytes."""
        self.skip(count, what)
        return self._file.bytes(self.position - count, count)

    def skip(self, count: int, what: str) -> None:
        """Step over `count` bytes."""
        if self.position + count > self._file.size:
            raise InputError(
                f"{self._file.path}: {what}: runs past the end of the file ({self._file.size} bytes); "
                "the file is truncated or damaged, download it again"
            )
        self.position += count

    def number(self, form: str, what: str) -> int:
        """Return the next integer."""
        return int(struct.unpack(form, self.take(struct.calcsize(form), what))[0])

    def text(self, what: str) -> str:
        """Return the next string."""
        data = self.take(self.number("<Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as exc:
            raise self._damaged(what, "text that is not UTF-8") from exc

    def name(self, what: str) -> str:
        """Return the next string, which names something and so must be printable."""
        name = self.text(what)
        if not name.isprintable():
            raise self._damaged(what, repr(name))
        return name

    def value(self, kind: int, key: str) -> Value:
        """Return the next metadata value, of the type numbered `kind`."""
        if kind == GGUFValueType.STRING:
            return self.text(key)
        if kind == GGUFValueType.ARRAY:
            item, count = self.number("<I", key), self.number("<Q", key)
            if item == GGUFValueType.STRING:
                for _ in range(count):
                    self.skip(self.number("<Q", key), key)
            else:
                self.skip(count * struct.calcsize(self._scalar(item, key)), key)
            return ArrayValue(count)
        form = self._scalar(kind, key)
        scalar: int | float | bool = struct.unpack(form, self.take(struct.calcsize(form), key))[0]
        return scalar

    def tensor(self) -> tuple[str, TensorInfo]:
        """Return the next tensor's name and entry, its offset still counted from the first tensor."""
        name = self.name("a tensor's name")
        dimensions = self.number("<I", name)
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(name, f"{dimensions} dimensions")
        shape = tuple(self.number("<Q", name) for _ in range(dimensions))[::-1]
        number, offset = self.number("<I", name), self.number("<Q", name)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as exc:
            raise InputError(
                f"{self._file.path}: {name}: tensor type {number} is not supported; quantize the model to another type"
            ) from exc
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise self._damaged(name, f"shape {list(shape)} for {kind.name}, whose blocks have {block} values")
        return name, TensorInfo(shape, kind, offset, math.prod(shape) // block * block_bytes)

    def _scalar(self, kind: int, key: str) -> str:
        for known, form in _SCALARS.items():
            if known == kind:
                return form
        raise self._damaged(key, f"a value of unknown type {kind}")

    def _damaged(self, what: str, found: str) -> InputError:
        return InputError(
            f"{self._file.path}: {what}: found {found}; the file is damaged, download or convert it again"
        )


def _place(file: MappedFile, name: str, info: TensorInfo, start: int) -> TensorInfo:
    end = start + info.offset + info.size
    if end > file.size:
        raise InputError(
            f"{file.path}: {name}: ends at byte {end}, but the file has {file.size}; "
            "the file is truncated, download it again"
        )
    return TensorInfo(info.shape, info.type, start + info.offset, info.size)


def _check_overlap(file: MappedFile, tensors: dict[str, TensorInfo]) -> None:
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise InputError(
                f"{file.path}: {name}: overlaps the tensor before it; the file is damaged, download it again"
            )
        end = info.offset + info.size
