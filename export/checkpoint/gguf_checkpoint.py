"""A GGUF file as a checkpoint: weights dequantized to what transformers would load, bit for bit."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from galerne.errors import InputError, one_line
from galerne.export.checkpoint.checkpoint import Checkpoint, DType, numpy_dtype
from galerne.export.checkpoint.gguf_config import architecture, compose_config, hugging_face_names
from galerne.export.checkpoint.gguf_header import TensorInfo, read_header
from galerne.export.checkpoint.rotary import halves_apart
from galerne.runtime.mapped import MappedFile

_NATIVE: dict[GGMLQuantizationType, DType] = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
_NOT_WEIGHTS = frozenset(GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "F64"))
_VALUES_AT_ONCE = 1 << 20  # dequantize keeps some ten bytes a value beside its result


class GgufCheckpoint(Checkpoint):
    """A GGUF file of one of llama.cpp's architectures in `gguf_architectures`."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        """Open a file. Raises: InputError if it is damaged, or holds a model that is not supported."""
        self.path = path
        self._file = MappedFile(path)
        self._header = read_header(self._file)
        self._stored = architecture(self._header, path)
        self.config = compose_config(self._header, path)
        self._names = hugging_face_names(self._header, path)
        self._shapes = {name: self._header.tensors[stored].shape for name, stored in self._names.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the tensors' shapes by Hugging Face's names."""
        return self._shapes

    def dtype(self, name: str) -> DType:
        """Return the type that `read` gives: the stored one of an unquantized tensor, float32 of a quantized one."""
        info = self._info(name)
        if info.type in _NOT_WEIGHTS:
            raise self._unsupported(name, info)
        return _NATIVE.get(info.type, "float32")

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor, dequantized where it is stored in blocks."""
        info, dtype = self._info(name), self.dtype(name)
        if info.type in _NATIVE:
            values = self._file.view(info.offset, info.shape, numpy_dtype(dtype))
        else:
            values = self._dequantize(name, info)
        if self._stored.norm_offset and name.endswith("norm.weight"):
            return values - np.float32(self._stored.norm_offset)
        if not self._stored.neighbours_rotate:
            return values
        # Query and key alone: llama.cpp rotates neighbouring values of a llama, Hugging Face the two halves of a head.
        if ".q_proj." in name:
            return self._halves_apart(name, values, int(self.config["num_attention_heads"]))
        if ".k_proj." in name:
            return self._halves_apart(name, values, int(self.config["num_key_value_heads"]))
        return values

    def release(self, name: str) -> None:
        """Drop a tensor's pages from the resident set."""
        info = self._info(name)
        self._file.release(info.offset, info.size)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Return the tokenizer as transformers converts it, chat template included."""
        if "tokenizer.ggml.model" not in self._header.metadata:
            return {}
        from transformers import AutoTokenizer

        path = self.path.absolute()
        with tempfile.TemporaryDirectory() as folder:
            try:
                tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
                tokenizer.save_pretrained(folder)
            except Exception as exc:
                raise InputError(f"{self.path}: tokenizer: transformers cannot convert it ({one_line(exc)})") from exc
            return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}

    def files(self) -> list[Path]:
        """Return the file: it holds weights, config and tokenizer."""
        return [self.path]

    def _info(self, name: str) -> TensorInfo:
        if name not in self._names:
            raise InputError(f"{self.path}: {name}: no such tensor in the checkpoint; it has {len(self._names)} others")
        return self._header.tensors[self._names[name]]

    def _dequantize(self, name: str, info: TensorInfo) -> NDArray[np.float32]:
        block, block_bytes = GGML_QUANT_SIZES[info.type]
        row_bytes = info.shape[-1] // block * block_bytes
        rows = math.prod(info.shape[:-1])
        packed = self._file.view(info.offset, (rows, row_bytes), np.uint8)
        values = np.empty((rows, info.shape[-1]), np.float32)
        step = max(1, _VALUES_AT_ONCE // info.shape[-1])
        try:
            with np.errstate(all="ignore"):  # a scale that is no number shows in parity, not as a warning of numpy
                for row in range(0, rows, step):
                    values[row : row + step] = gguf.dequantize(packed[row : row + step], info.type)
        except NotImplementedError as exc:  # how the gguf package says that it cannot unpack a type
            raise self._unsupported(name, info) from exc
        return values.reshape(info.shape)

    def _halves_apart(self, name: str, values: NDArray[Any], heads: int) -> NDArray[Any]:
        rows = values.shape[0]
        if rows % (2 * heads):
            raise InputError(f"{self.path}: {name}: {rows} rows do not divide into {heads} heads of an even size")
        return halves_apart(values, heads)

    def _unsupported(self, name: str, info: TensorInfo) -> InputError:
        return InputError(
            f"{self.path}: {self._names[name]}: type {info.type.name} is not supported; "
            "quantize the model to another type"
        )
