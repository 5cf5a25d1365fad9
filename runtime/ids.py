"""Token ids as callers have them: lists, arrays, buffers, tensors of other libraries. Read where they lie."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from galerne.errors import InputError, one_line

Ids = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class DLPackExporter(Protocol):
    """What NumPy, PyTorch, JAX and others give their arrays. Source: the Python array API standard, DLPack."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


# A list of ints; or int32 or int64 in one dimension, as NumPy, DLPack or the buffer protocol gives it.
TokenIds = Sequence[int] | DLPackExporter


def as_ids(ids: TokenIds, where: str, vocab_size: int) -> Ids:
    """Return token ids as an array, without a copy where they lie in memory as int32 or int64.

    Args:
        where: what to call them in an error.
    Raises: InputError if they are not whole numbers in one dimension in the CPU's memory, or not in the vocabulary.
    """
    array = _view(ids, where)
    if array.ndim != 1 or array.dtype not in (np.int32, np.int64):
        raise InputError(
            f"{where}: expected token ids as int32 or int64 in one dimension, found {array.dtype} of shape {array.shape}"
        )
    if len(array) and not 0 <= array.min() <= array.max() < vocab_size:
        index = int(np.argmax((array < 0) | (array >= vocab_size)))
        raise InputError(f"{where}, token {index}: id {array[index]} is not in the vocabulary of {vocab_size}")
    return array


def _view(ids: Any, where: str) -> npt.NDArray[Any]:
    if isinstance(ids, np.ndarray):
        return ids
    try:
        if not isinstance(ids, list | tuple):
            if hasattr(ids, "__dlpack__"):
                return np.from_dlpack(ids)
            if (buffer := _buffer(ids)) is not None:
                return np.asarray(buffer)
        listed = list(ids)
        return np.array(listed) if listed else np.zeros(0, np.int64)
    # Memory of another device, a type that NumPy lacks, lists of several lengths, or nothing that could be gone through.
    except (BufferError, RuntimeError, ValueError, TypeError) as exc:
        raise InputError(
            f"{where}: expected token ids as int32 or int64 in the CPU's memory, found {one_line(exc)}"
        ) from exc


def _buffer(ids: Any) -> memoryview | None:
    try:
        return memoryview(ids)
    except TypeError:
        return None
