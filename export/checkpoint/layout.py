"""What the layouts of quantized checkpoints share: how a folder's tensors are asked for, and the columns of AWQ and GPTQ."""

import abc
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from galerne.errors import InputError
from galerne.export.checkpoint.packed import Bytes, PackedTensor, nibbles
from galerne.runtime.manifest import CacheType

Bits = Literal[4, 8]


class Tensors(Protocol):
    """The tensors of a folder as they are stored."""

    def stored_shape(self, name: str) -> tuple[int, ...]: ...

    def stored(self, name: str) -> NDArray[Any]: ...

    def where(self, name: str) -> str: ...


class Layout(abc.ABC):
    """How one method of quantization lays a weight out over tensors.

    title: the method's name, for messages and the manifest.
    cache: what keys and values are rounded to, by scales beside the weights; None where they are not.
    """

    title: str
    cache: CacheType | None = None

    @abc.abstractmethod
    def find(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return the quantized weights by their plain names, each with its tensors' names by what they are."""

    @abc.abstractmethod
    def shape(self, parts: Mapping[str, str], tensors: Tensors) -> tuple[int, int]:
        """Return [out, in] of a weight. Raises: InputError if a part is missing or the parts' shapes do not fit together."""

    @abc.abstractmethod
    def packed(self, parts: Mapping[str, str], tensors: Tensors) -> PackedTensor:
        """Return a weight. Raises: InputError if what its parts hold cannot be kept as it is."""

    def note(self) -> str:
        """Return what of the checkpoint is left out, for the manifest; empty where it is whole."""
        return ""


def gather(names: Iterable[str], anchor: str, others: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the modules that have a tensor of the anchor's name, by their weight's plain name, with the parts there are."""
    found = set(names)
    modules = [name.removesuffix(anchor) for name in found if name.endswith(f".{anchor}")]
    return {
        f"{module}weight": {part: module + part for part in (anchor, *others) if module + part in found}
        for module in sorted(modules)
    }


def expect_parts(parts: Mapping[str, str], wanted: Iterable[str], tensors: Tensors) -> None:
    """Raises: InputError if a part of a weight is missing."""
    some = next(iter(parts.values()))
    for part in wanted:
        if part not in parts:
            name = f"{some.rpartition('.')[0]}.{part}"
            raise InputError(
                f"{tensors.where(some)}: {name}: missing, but {some} is there; download the checkpoint again"
            )


def expect_shape(name: str, wanted: tuple[int, ...], tensors: Tensors, why: str) -> None:
    """Raises: InputError if a tensor has another shape."""
    found = tensors.stored_shape(name)
    if tuple(found) != wanted:
        raise InputError(f"{tensors.where(name)}: {name}: shape {list(found)}; expected {list(wanted)} from {why}")


def integers(name: str, tensors: Tensors, *kinds: str) -> NDArray[Any]:
    """Return a tensor of one of some integer types. Raises: InputError if it is of another."""
    values = tensors.stored(name)
    if values.dtype.name not in kinds:
        raise InputError(f"{tensors.where(name)}: {name}: type {values.dtype.name}; expected {' or '.join(kinds)}")
    return values


def finite_scales(name: str, tensors: Tensors) -> NDArray[Any]:
    """Return scales. Raises: InputError if they are no finite floats."""
    scales = tensors.stored(name)
    if scales.dtype.name not in ("float16", "bfloat16", "float32"):
        raise InputError(
            f"{tensors.where(name)}: {name}: type {scales.dtype.name}; expected float16, bfloat16 or float32"
        )
    if not np.isfinite(scales.astype(np.float32)).all():
        raise InputError(f"{tensors.where(name)}: {name}: holds NaN or infinity; the checkpoint is damaged")
    return scales


def one_scale(name: str, tensors: Tensors) -> float:
    """Return the one scale of a tensor. Raises: InputError if it is not one, or not above 0."""
    scale = finite_scales(name, tensors)
    if scale.size != 1 or not float(scale.reshape(-1)[0]) > 0:
        found = f"shape {list(scale.shape)}" if scale.size != 1 else str(float(scale.reshape(-1)[0]))
        raise InputError(f"{tensors.where(name)}: {name}: expected one scale above 0, found {found}")
    return float(scale.reshape(-1)[0])


def expect_zero_points(name: str, tensors: Tensors) -> None:
    """Raises: InputError if zero points are not all 0, as they must be where config.json says symmetric."""
    if bool((tensors.stored(name).astype(np.float32) != 0).any()):
        raise InputError(f"{tensors.where(name)}: {name}: expected 0, as config.json says symmetric")


def split_columns(packed: NDArray[Any], bits: Bits) -> Bytes:
    """Unpack integers that lie along the last axis, the first in the low bits: [n, m] int32 to [n, m * 32 // bits] uint8."""
    if bits == 8:
        return np.ascontiguousarray(packed).view(np.uint8).reshape(len(packed), -1)
    return np.stack(nibbles(packed), axis=-1).reshape(len(packed), -1)


def group_order(name: str, groups: NDArray[Any], count: int, block: int, tensors: Tensors) -> NDArray[np.int64] | None:
    """Return the order that brings the rows of each group together; None where they stand so already.

    Args:
        groups: [in], the group of each input feature.
        count: of groups, each of which must have `block` rows.
    Raises: InputError if a group has more or fewer.
    """
    sizes = np.bincount(groups.astype(np.int64), minlength=count) if len(groups) and groups.min() >= 0 else np.empty(0)
    if len(sizes) != count or not bool((sizes == block).all()):
        raise InputError(
            f"{tensors.where(name)}: {name}: expected {count} groups of {block} input features, found others; "
            "the checkpoint is damaged, or was made with a group size that does not divide the input axis"
        )
    if np.array_equal(groups, np.arange(len(groups)) // block):
        return None
    return np.argsort(groups, kind="stable").astype(np.int64)
