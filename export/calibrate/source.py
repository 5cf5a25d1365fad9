"""A checkpoint's weights for a streamed model, with those of one decoder layer held, and replaced as they are rounded."""

import math

import numpy as np
import torch
from torch import Tensor

from galerne.errors import InputError
from galerne.export.calibrate.experts import stored_name
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.tiles import is_finite, widen
from galerne.progress import Task
from galerne.runtime.footprint import HEAD, TABLE

# Values that are looked at together: few enough to stay in a core's cache.
_TILE = 1 << 18


def layer_prefix(number: int) -> str:
    """Return what the names of a decoder layer's tensors begin with."""
    return f"model.layers.{number}."


def check_finite(checkpoint: Checkpoint) -> None:
    """Read all weights once: what is damaged in the last layer would come to light when hours of rounding are over.

    Raises: InputError if a tensor holds NaN or infinity.
    """
    shapes = checkpoint.shapes()
    with Task("check weights", sum(map(math.prod, shapes.values()))) as task:
        for name, shape in shapes.items():
            values = np.ascontiguousarray(checkpoint.read(name)).reshape(-1)
            if not all(is_finite(values[first : first + _TILE]) for first in range(0, len(values), _TILE)):
                raise InputError(f"{checkpoint.path}: {name}: holds NaN or infinity; the checkpoint is damaged")
            checkpoint.release(name)
            task.advance(math.prod(shape))


class LayerWeights:
    """Gives `StreamedModel` every weight in float32. Only the current layer's stay in memory.

    changed: the current layer's tensors that `replace` changed.
    """

    def __init__(self, checkpoint: Checkpoint, *, tied: bool) -> None:
        """Prepare. `tied`: whether the vocabulary projection is the embedding table."""
        self._checkpoint, self.tied = checkpoint, tied
        self._prefix = ""
        self._held: dict[str, Tensor] = {}
        self._gone: set[str] = set()
        self.changed: set[str] = set()

    def enter(self, number: int) -> None:
        """Let go of the layer before and hold what is read of this one."""
        self._held.clear()
        self._gone.clear()
        self.changed.clear()
        self._prefix = layer_prefix(number)

    def __call__(self, name: str) -> Tensor:
        """Return a weight as it is now, by its name in the checkpoint or in the model."""
        name = stored_name(name)
        assert name not in self._gone, name
        found = self._held.get(name)
        if found is None:
            found = self.read(name)
            if self._prefix and name.startswith(self._prefix):
                self._held[name] = found
        return found

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor of this name."""
        return name in self._checkpoint.shapes()

    def replace(self, name: str, value: Tensor) -> None:
        """Put another weight in the place of one of the current layer."""
        assert name.startswith(self._prefix)
        self._held[name] = value
        self.changed.add(name)

    def drop(self, name: str) -> None:
        """Let go of a weight of the current layer that nothing reads any more."""
        self._held.pop(name, None)
        self._gone.add(name)

    def read(self, name: str) -> Tensor:
        """Return a tensor as the checkpoint has it, in float32."""
        if name == HEAD and self.tied:
            name = TABLE
        wide = torch.from_numpy(widen(self._checkpoint.read(name)))
        self._checkpoint.release(name)
        return wide
