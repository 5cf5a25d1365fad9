"""What one layer's keys and values reach on the calibration text, and the scales that they are rounded by.

They are taken where attention reads them: keys rotated, both with the rounding of all weights before them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from galerne.export.calibrate.layers import Float32, LayerRun
from galerne.export.calibrate.rounded import LARGEST
from galerne.export.parity.composed import round_input
from galerne.export.parity.streamed import CACHED
from galerne.optimize.quantize.cache import CacheScales
from galerne.runtime.manifest import CacheType

# The product that reads what attention makes of keys and values.
AFTER_CACHE = "self_attn.o_proj"
_ATTENTION = "self_attn"


class CacheRanges:
    """The largest magnitude of each channel of a layer's keys and values. From when it is made on, the layer rounds both."""

    def __init__(self, layer: nn.Module, kind: CacheType, run: LayerRun) -> None:
        """Run the layer up to the end of attention, with its query, key and value weights as they are now."""
        self._kind = kind
        self._attention: Any = layer.get_submodule(_ATTENTION)
        self._key = self._value = torch.zeros(())
        with self._passing(self._note):
            for _ in run.calls(AFTER_CACHE):
                pass
        setattr(self._attention, CACHED, self._rounded)

    def divide_values(self, factors: Float32) -> None:
        """Make the ranges those of values whose channels are divided by factors [Hkv * head_dim], as v's rows were."""
        self._value = self._value / torch.from_numpy(factors).reshape(self._value.shape)

    def scales(self) -> CacheScales:
        """Return one scale for the keys and one for the values, by which the largest of each is the type's largest."""
        key, value = (float(range_.max()) or 1.0 for range_ in (self._key, self._value))
        largest = LARGEST[self._kind]
        return CacheScales(self._kind, key / largest, value / largest)

    @torch.inference_mode()
    def _note(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, S, D]; the ranges are [Hkv, D]."""
        self._key = torch.maximum(self._key, keys.abs().amax((0, 2)))
        self._value = torch.maximum(self._value, values.abs().amax((0, 2)))
        return keys, values

    def _rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        scales = self.scales()
        return round_input(keys, "int", scales.key), round_input(values, "int", scales.value)

    @contextmanager
    def _passing(self, note: Any) -> Iterator[None]:
        setattr(self._attention, CACHED, note)
        try:
            yield
        finally:
            delattr(self._attention, CACHED)
