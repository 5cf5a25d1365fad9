"""The rings on the GPU, at their full size from the start, and the steps that are bound to them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from galerne.runtime.engines.engine import Float32
from galerne.runtime.engines.tensorrt.memory import DeviceMemory, Stream, pinned_array
from galerne.runtime.engines.tensorrt.plan import Plan, PlanProfile
from galerne.runtime.engines.tensorrt.step import Step


class Group:
    """Rows that run together: as many as the engine takes at once.

    rows: which of the cache's rows.
    rings: past and present, for each ring. They are the same memory where the engine updates in place; else `turn` swaps
        them after each run.
    """

    def __init__(self, plan: Plan, stream: Stream, rows: slice, logits: Float32) -> None:
        self.rows, self._plan, self._stream, self._logits = rows, plan, stream, logits
        self.size = rows.stop - rows.start
        self._steps: dict[tuple[int, int, int], Step] = {}
        self._turn = 0
        first = [self._new(shape) for shape in plan.ring_shapes]
        self.rings = (first, first if plan.in_place else [self._new(shape) for shape in plan.ring_shapes])

    @property
    def past(self) -> Sequence[DeviceMemory]:
        """The rings as the last run left them."""
        return self.rings[self._turn]

    def clear(self) -> None:
        """Fill the rings with zeros, not waiting for it: a masked slot's value meets a weight of zero, and 0 times NaN is NaN."""
        for ring in dict.fromkeys((*self.rings[0], *self.rings[1])):
            self._plan.driver.clear(ring.address, ring.size, self._stream.handle)

    def step(self, profile: PlanProfile, tokens: int, logits: int) -> Step:
        """Return the step of a shape, which is kept."""
        key = (tokens, logits, self._turn)
        if key not in self._steps:
            others = [old for old in self._steps if old[:2] not in ((1, 1), (tokens, logits))]
            for old in others:  # keep that of decoding and one more: prompts come in many lengths
                self._steps.pop(old).close()
            rings = (self.rings[self._turn], self.rings[1 - self._turn])
            last = self._logits if logits == 1 else None
            shape = (self.size, tokens, logits)
            self._steps[key] = Step(self._plan, self._stream, profile, shape, rings, last)
        return self._steps[key]

    def advance(self) -> None:
        """Take what the last run wrote for the past of the next."""
        if not self._plan.in_place:
            self._turn = 1 - self._turn

    def close(self) -> None:
        """Let go of everything on the GPU."""
        for step in self._steps.values():
            step.close()
        for memory in (*self.rings[0], *self.rings[1]):
            memory.close()
        self._steps, self.rings = {}, ([], [])

    def _new(self, shape: tuple[int, ...]) -> DeviceMemory:
        size = self.size * int(np.prod(shape)) * self._plan.ring_dtype.itemsize
        return DeviceMemory(self._plan.driver, size)


class TensorRTCache:
    """Rings on the GPU; see `Cache`.

    groups: of rows. last_logits: [B, 1, vocab_size], where every run of K = 1 leaves its logits.
    """

    def __init__(self, plan: Plan, batch: int, group: int, capacities: Sequence[int]) -> None:
        """Allocate rings for `batch` rows, at most `group` of which run at once. Raises: BackendError if memory is short."""
        self._plan, self.batch, self.capacities = plan, batch, tuple(capacities)
        self.last_logits: Float32 = pinned_array(plan.driver, (batch, 1, plan.vocab_size), np.float32)
        with plan.driver.current():
            self.stream = Stream(plan.driver)
            parts = [slice(first, min(first + group, batch)) for first in range(0, batch, group)]
            self.groups = [Group(plan, self.stream, rows, self.last_logits[rows]) for rows in parts]
            # Not before all of it is there: memory that is being cleared could not be given back where more runs out.
            for each in self.groups:
                each.clear()
            plan.driver.synchronize(self.stream.handle)

    def resize(self, capacities: Sequence[int]) -> None:
        """Do nothing: the rings have their full size from the start."""
        assert tuple(capacities) == self.capacities

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Return copies of the rings in this process's memory. bfloat16, which NumPy lacks, comes as its bits in uint16."""
        plan, copies = self._plan, []
        with plan.driver.current():
            for i, shape in enumerate(plan.ring_shapes):
                array = np.empty((self.batch, *shape), plan.ring_dtype)
                for group in self.groups:
                    plan.driver.read(array[group.rows], group.past[i].address)
                copies.append(array)
        return copies

    def fill(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Copy the contents of rings of the same type into these; they may have fewer slots, which are the first here."""
        plan = self._plan
        with plan.driver.current():
            for i, (shape, array) in enumerate(zip(plan.ring_shapes, arrays, strict=True)):
                whole = np.zeros((self.batch, *shape), plan.ring_dtype)
                whole[:, :, : array.shape[2]] = array
                for group in self.groups:
                    plan.driver.write(group.past[i].address, whole[group.rows])

    def copy_from(self, other: "TensorRTCache") -> None:
        """Copy another cache's rings, of as many rows, within the GPU."""
        driver, stream = self._plan.driver, self.stream.handle
        with driver.current():
            for mine, theirs in zip(self.groups, other.groups, strict=True):
                for target, source in zip(mine.past, theirs.past, strict=True):
                    driver.copy(target.address, source.address, target.size, stream)
            driver.synchronize(stream)

    def close(self) -> None:
        """Let go of the memory on the GPU. `last_logits` lives as long as someone holds it."""
        for group in self.groups:
            group.close()
        self.groups = []
        self.stream.close()
