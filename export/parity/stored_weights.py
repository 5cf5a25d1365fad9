"""A checkpoint's weights for the reference, row by row: as the safetensors library reads them, or as transformers loads them."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.checkpoint.lora import AdaptedCheckpoint
from galerne.export.parity.composed import adapter_products, composed_weights


class StoredWeights(Protocol):
    """Weights by transformers' names. `rows` gives [first, last) of the first axis, in the type that they are stored in."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def rows(self, name: str, first: int, last: int) -> Tensor: ...


class _Safetensors:
    """Weights in safetensors files, read row by row."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        files: list[Any] = [safe_open(path, "pt") for path in checkpoint.files() if path.suffix == ".safetensors"]
        self._home = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no mapping

    def names(self) -> set[str]:
        return set(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._home[name].get_slice(name).get_shape())

    def rows(self, name: str, first: int, last: int) -> Tensor:
        rows: Tensor = self._home[name].get_slice(name)[first:last]
        return rows


class Held:
    """Weights that transformers loaded, or that were composed for it, all of them in memory."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    @staticmethod
    def load(checkpoint: Checkpoint) -> tuple["Held", Any]:
        folder, extra = checkpoint.path.absolute(), {}
        if checkpoint.format == "gguf":
            folder, extra = folder.parent, {"gguf_file": folder.name}
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            local_files_only=True,
            **extra,
        )
        return Held(model.state_dict()), model.config

    def names(self) -> set[str]:
        return set(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        rows: Tensor = self._state[name][first:last]
        return rows


class _Adapted:
    """Weights with a LoRA adapter's products added in float32 as they are read."""

    def __init__(self, base: StoredWeights, checkpoint: AdaptedCheckpoint) -> None:
        self._base, self._products = base, adapter_products(checkpoint.folder)

    def names(self) -> set[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        rows = self._base.rows(name, first, last)
        return rows.float() + part_of_product(self._products[name], first, last) if name in self._products else rows


def loaded_weights(checkpoint: Checkpoint) -> StoredWeights:
    """Return all weights as transformers loads them, for a checkpoint whose names are not those of transformers' class."""
    if isinstance(checkpoint, AdaptedCheckpoint):
        return _Adapted(loaded_weights(checkpoint.base), checkpoint)
    return Held.load(checkpoint)[0]


def open_weights(checkpoint: Checkpoint) -> tuple[StoredWeights, Any]:
    """Return a checkpoint's weights, left on disk where its layout allows that, and its config as transformers reads it."""
    if isinstance(checkpoint, AdaptedCheckpoint):
        base, config = open_weights(checkpoint.base)
        return _Adapted(base, checkpoint), config
    if (composed := composed_weights(checkpoint)) is not None:
        return Held(composed), AutoConfig.for_model(**checkpoint.config)
    if checkpoint.format == "gguf":
        return Held.load(checkpoint)
    return _Safetensors(checkpoint), AutoConfig.from_pretrained(str(checkpoint.path.absolute()), local_files_only=True)


def part_of_product(product: tuple[float, Tensor, Tensor], first: int, last: int) -> Tensor:
    """Return rows [first, last) of what an adapter's (scale, B, A) adds to a weight."""
    scale, b, a = product
    return scale * (b[first:last] @ a)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and hints off stderr, which is our own; its errors arrive as exceptions."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar heeds no setting
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
