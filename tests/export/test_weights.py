"""Bands of a weight against the whole of it."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from galerne.export import weights as module
from galerne.export.checkpoint.safetensors_folder import SafetensorsCheckpoint
from galerne.export.weights import Sources, int4_band, int8_band
from galerne.optimize.graph.weights import Weight
from galerne.optimize.quantize.rounding import pack_int4, quantize, round_to
from galerne.optimize.quantize.search import SCALES

BLOCK, HEIGHT = 32, 128


class _InMemory(SafetensorsCheckpoint):
    def __init__(self, tensors: dict[str, NDArray[np.float32]]) -> None:
        self.path, self._tensors = Path("memory"), tensors

    def read(self, name: str) -> NDArray[np.float32]:
        return self._tensors[name]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", 1024)


def _sources(widths: tuple[int, ...]) -> tuple[Sources, NDArray[np.float32]]:
    """Return a fused weight of some outputs, and the whole of it [out, in]."""
    rng = np.random.default_rng(0)
    tensors = {str(i): rng.standard_normal((width, 2 * HEIGHT)).astype(np.float32) for i, width in enumerate(widths)}
    whole = np.concatenate(list(tensors.values()))
    return Sources(_InMemory(tensors), Weight("w", "linear", tuple(tensors), (2 * HEIGHT, len(whole)))), whole


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("widths", [(256,), (128, 2, 66), (65, 63), (65, 64), (1,)])
def test_int4_bands(widths: tuple[int, ...], method: str) -> None:
    """Odd widths too: two values of one byte then come from different tiles."""
    sources, whole = _sources(widths)
    scale = SCALES[method](whole, 4, BLOCK)
    values = round_to(whole, scale, 4)
    scales = np.zeros((2 * HEIGHT // BLOCK, len(whole)), np.float16)
    bands = [int4_band(sources, first, first + HEIGHT, BLOCK, scales, SCALES[method]) for first in (0, HEIGHT)]
    assert np.array_equal(
        np.concatenate([band.reshape(-1) for band in bands]), pack_int4(np.ascontiguousarray(values.T))
    )
    assert np.array_equal(scales, scale.T)


@pytest.mark.parametrize("widths", [(256,), (65, 63, 1)])
def test_int8_bands(widths: tuple[int, ...]) -> None:
    sources, whole = _sources(widths)
    values, scale = quantize(whole, 8, 2 * HEIGHT)
    bands = [int8_band(sources, first, first + HEIGHT, np.ascontiguousarray(scale.T)) for first in (0, HEIGHT)]
    assert np.array_equal(np.concatenate(bands), values.T)
