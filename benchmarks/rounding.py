"""How fast one core rounds bfloat16 weights to int4, as an export does it, by method: `python -m benchmarks.rounding`."""

import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from galerne.export.checkpoint.safetensors_folder import SafetensorsCheckpoint
from galerne.export.weights import Sources, int4_band
from galerne.optimize.graph.weights import Weight
from galerne.optimize.quantize.search import SCALES

_ROUNDS, _OUT, _IN, _BLOCK, _HEIGHT = 5, 14336, 4096, 128, 512


class _InMemory(SafetensorsCheckpoint):
    """A checkpoint of one random weight that is on no disk, so that only the rounding is timed."""

    def __init__(self) -> None:
        self.path = Path("memory")
        values = np.random.default_rng(0).standard_normal((_OUT, _IN), np.float32) * _IN**-0.5
        self._weight: NDArray[Any] = values.astype(ml_dtypes.bfloat16)

    def read(self, name: str) -> NDArray[Any]:
        """Return the weight, whatever it is called."""
        return self._weight


def main() -> None:
    """Print the rate of the best of some rounds for each method, in MB of bfloat16 a second."""
    sources = Sources(_InMemory(), Weight("weight", "linear", ("weight",), (_IN, _OUT)))
    scales = np.empty((_IN // _BLOCK, _OUT), np.float16)
    for method, find in SCALES.items():
        best = float("inf")
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            for first in range(0, _IN, _HEIGHT):
                int4_band(sources, first, first + _HEIGHT, _BLOCK, scales, find)
            best = min(best, time.perf_counter() - start)
        print(f"{method}: {2 * _OUT * _IN / best / 1e6:.0f} MB/s of bfloat16 on one core")


if __name__ == "__main__":
    main()
