"""A LoRA adapter in memory, as the inputs of a graph that was exported with adapter slots."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from galerne.errors import InputError
from galerne.files import sha256_file
from galerne.runtime.bundle import Bundle
from galerne.runtime.lora import LoraFolder, Product
from galerne.runtime.manifest import AdapterSlot, adapter_input_names

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Adapter:
    """An adapter for one bundle, in the type that an engine computes in; `Model.load_adapter` makes it. Read only.

    path: its folder.
    fingerprint: a hex SHA-256 that stands for what it computes.
    bundle: `Bundle.fingerprint` of the bundle that it was read for.
    inputs: by the names of the graph's inputs; a slot that it leaves alone has none.
    """

    path: Path
    fingerprint: str
    bundle: str
    inputs: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        """Its memory in bytes, which all rows that use it share."""
        return sum(array.nbytes for array in self.inputs.values())


def load_adapter(bundle: Bundle, path: Path, dtype: npt.DTypeLike) -> Adapter:
    """Read an adapter as peft saves it.

    Args:
        bundle: what it shall run in.
        path: the adapter's folder.
        dtype: of the graph's inputs.
    Raises: InputError if the bundle has no slots, the adapter is damaged, is not plain LoRA, changes a layer that has no slot,
        does not fit one, or holds what is not finite in `dtype`.
    """
    slots = bundle.manifest.graph.adapter_slots
    if not slots:
        raise InputError(f"{bundle.path}: has no adapter slots; export it with --adapter-slots")
    folder = LoraFolder(path)
    shapes = {
        module: (out_features, slot.in_features)
        for slot in slots.values()
        for module, out_features in zip(slot.modules, slot.out_features, strict=True)
    }
    products = folder.products(
        shapes, bundle.path, f"no adapter slot for it in {bundle.path}; is it the adapter's base?"
    )
    inputs: dict[str, Array] = {}
    for name, slot in slots.items():
        if found := [module for module in slot.modules if module in products]:
            a, b = _side_by_side(folder, slot, {module: products[module] for module in found}, np.dtype(dtype))
            inputs.update(zip(adapter_input_names(name), (a, b), strict=True))
    digest = hashlib.sha256("".join(map(sha256_file, folder.files())).encode()).hexdigest()
    return Adapter(path, digest, bundle.fingerprint(), inputs)


def fingerprint(bundle: Bundle, adapter: Adapter | None) -> str:
    """Return a hex SHA-256 that stands for what a bundle computes with an adapter, or with none: `Bundle.fingerprint`."""
    whole = bundle.fingerprint()
    return whole if adapter is None else hashlib.sha256(f"{whole} {adapter.fingerprint}".encode()).hexdigest()


def no_adapter(slots: Mapping[str, AdapterSlot], dtype: npt.DTypeLike) -> dict[str, Array]:
    """Return what the inputs of slots hold where there is no adapter: one rank of zeros."""
    inputs = {}
    for name, slot in slots.items():
        a, b = adapter_input_names(name)
        inputs[a] = np.zeros((slot.in_features, 1), dtype)
        inputs[b] = np.zeros((1, sum(slot.out_features)), dtype)
    return inputs


def _side_by_side(
    folder: LoraFolder, slot: AdapterSlot, products: Mapping[str, Product], dtype: np.dtype[Any]
) -> tuple[Array, Array]:
    """Return A [in, ranks] and block-diagonal B [ranks, out] with the scales in it."""
    ranks = sum(product.rank for product in products.values())
    a, b = np.empty((slot.in_features, ranks), dtype), np.zeros((ranks, sum(slot.out_features)), dtype)
    rank = column = 0
    for module, out_features in zip(slot.modules, slot.out_features, strict=True):
        if product := products.get(module):
            place = slice(rank, rank + product.rank)
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
                a[:, place] = folder.file.float32(product.a).T
                b[place, column : column + out_features] = folder.file.float32(product.b).T * np.float32(product.scale)
            if not np.isfinite(a[:, place]).all() or not np.isfinite(b[place]).all():
                raise InputError(
                    f"{folder.file.path}: {module}: a value is not finite in {dtype}, which the engine computes in"
                )
            rank += product.rank
        column += out_features
    return a, b
