"""The figures of a target that sizes are held against; those of a CPU are measured on the spot."""

import time
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from galerne.parallel import cores
from galerne.runtime.bench import memory_bandwidth
from galerne.runtime.machine_memory import machine_memory
from galerne.targets.target import Target

_LARGE, _SMALL, _SMALL_ONES, _ROUNDS = 512, 64, 256, 40
# An instruction that multiplies int8 does at most four times the work of one that multiplies float32 in a register as wide.
_INT8_GAIN = 4
# On tensor cores a product of float32 runs, rounded to 19 bits, at half the rate of float16.
_TF32_SHARE = 0.5


@dataclass(frozen=True)
class Device:
    """What a target has.

    memory_bytes: all of it. usable_bytes: what is left for models.
    ops_per_s: peak by the type that is computed in; empty where it is not known.
    measured: whether these were measured on this machine and not read from the target's file.
    """

    name: str
    title: str
    memory_bytes: int
    usable_bytes: int
    bandwidth_bytes_per_s: float
    ops_per_s: dict[str, float]
    measured: bool

    def ops_for(self, compute: str, quantized: bool) -> float | None:
        """Return the most operations a second of products with activations in a type; None where it is not known."""
        if self.measured:  # ONNX Runtime rounds the activations to int8 where the weights are quantized
            return self.ops_per_s["int8" if quantized else "float32"]
        rate = self.ops_per_s.get(compute)
        if compute == "float32" and rate is not None:
            return max(rate, _TF32_SHARE * self.ops_per_s.get("float16", 0))
        return rate


def device_of(target: Target) -> Device:
    """Return a target's figures, this machine's for `cpu`.

    Raises: BackendError if this machine does not say what memory it has.
    """
    if target.kind == "cpu":
        return _this_machine(target.name, target.title)
    assert target.memory_bytes is not None and target.usable_bytes is not None
    assert target.bandwidth_bytes_per_s is not None
    return Device(
        target.name,
        target.title,
        target.memory_bytes,
        target.usable_bytes,
        target.bandwidth_bytes_per_s,
        {kind: float(rate) for kind, rate in target.dense_ops_per_s.items()},
        measured=False,
    )


@cache
def _this_machine(name: str, title: str) -> Device:
    total, available = machine_memory()
    rate = _float32_ops_per_s()
    ops = {"float32": rate, "int8": _INT8_GAIN * rate}
    return Device(name, title, total, available, memory_bandwidth(), ops, measured=True)


def _float32_ops_per_s() -> float:
    """Return the most operations a second of products of float32 matrices that this machine's cores are seen to do.

    Large matrices on all cores at once, and small ones that one core multiplies alone, times the cores: the first is what
    counts on a quiet machine, and the second holds on one where the cores are seldom free together.
    """
    large, small = (np.ones((count, side, side), np.float32) for count, side in ((1, _LARGE), (_SMALL_ONES, _SMALL)))
    return max(_rate(large), cores() * _rate(small))


def _rate(matrices: NDArray[np.float32]) -> float:
    count, side, _ = matrices.shape
    best = 0.0
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        np.matmul(matrices, matrices)
        best = max(best, 2 * count * side**3 / (time.perf_counter() - start))
    return best
