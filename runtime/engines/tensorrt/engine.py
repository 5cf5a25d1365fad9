"""Runs the graph's contract on an engine that TensorRT has loaded."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from galerne.errors import InputError
from galerne.runtime.engines.engine import Cache, Float32, Int64
from galerne.runtime.engines.owned import Owned
from galerne.runtime.engines.tensorrt.cache import Group, TensorRTCache
from galerne.runtime.engines.tensorrt.driver import Driver
from galerne.runtime.engines.tensorrt.memory import Stream
from galerne.runtime.engines.tensorrt.plan import IDS, LOGIT_INDICES, POSITIONS, Plan, PlanProfile


class TensorRTEngine:
    """See `Engine`. Its runs follow one another, whichever thread they come from: all compute in the same scratch memory."""

    def __init__(self, plan: Plan, driver: Driver, name: str, capacities: Sequence[int], chunk: int) -> None:
        """Take a plan and a driver over.

        Args:
            capacities: the rings' full sizes.
            chunk: the most tokens of one run.
        Raises: InputError if the plan's profiles leave out a run of one token.
        """
        self.name = name
        self.dtype = self.ring_dtype = plan.ring_dtype
        self._plan, self._driver, self._capacities = plan, driver, tuple(capacities)
        self._lock, self._closed = threading.Lock(), False
        self._contexts: dict[int, Owned[Any]] = {}
        self._group = min(profile.batch[1] for profile in plan.profiles)
        if not any(profile.takes(self._group, 1) for profile in plan.profiles):
            raise InputError(f"{plan.where}: no profile of it takes one token; build it again with --force")
        # Alone for the first use of a context: after that it is used in the streams of caches.
        with driver.current():
            self._stream = Stream(driver)

    def new_cache(
        self, batch: int, capacities: Sequence[int], adapter: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> TensorRTCache:
        """As `Engine.new_cache` says; the rings have their full size whatever is asked for."""
        assert not adapter  # such an engine is not built from a bundle with adapter slots
        return TensorRTCache(self._plan, batch, self._group, self._capacities)

    def tokens_of_run(self, wanted: int, most: int) -> int:
        """As `Engine.tokens_of_run` says: `wanted` where a profile takes that, else the next larger or smaller size."""
        sizes = [profile.tokens for profile in self._plan.profiles if profile.batch[0] <= self._group]
        if any(low <= wanted <= high for low, high in sizes):
            return wanted
        larger = [low for low, _ in sizes if wanted < low <= most]
        return min(larger) if larger else max(high for _, high in sizes if high < wanted)

    def run(self, cache: Cache, ids: Int64, positions: Int64, write_indices: Int64, logit_indices: Int64) -> Float32:
        """As `Engine.run` says. Rows, and logits, beyond what a profile takes at once come one after the other."""
        assert isinstance(cache, TensorRTCache)
        count = logit_indices.shape[1]
        every = cache.last_logits
        if count > 1:
            every = np.empty((cache.batch, count, self._plan.vocab_size), np.float32)
        with self._lock, self._driver.current():
            for group in cache.groups:
                rows = group.rows
                self._run(group, ids[rows], positions[rows], write_indices[:, rows], logit_indices[rows], every[rows])
        return every

    def close(self) -> None:
        """Let go of the engine and the GPU; no run may follow. Caches must be closed first."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._contexts.clear()
            self._stream.close()
            self._plan.close()
            self._driver.close()

    def _run(self, group: Group, ids: Int64, positions: Int64, starts: Int64, indices: Int64, logits: Float32) -> None:
        tokens, count = ids.shape[1], indices.shape[1]
        profile = self._profile(group.size, tokens, count)
        fewest, most = profile.logits
        size = max(min(count, most), fewest)
        # The same tokens again for the next logits: they write the same keys into the same slots.
        for first in range(0, count, size):
            part = indices[:, first : first + size]
            wanted = part.shape[1]
            step = group.step(profile, tokens, size)
            step.inputs[IDS][...], step.inputs[POSITIONS][...] = ids, positions
            for name, start in zip(self._plan.starts, starts, strict=True):
                step.inputs[name][...] = start
            staged = step.inputs[LOGIT_INDICES]
            staged[:, :wanted], staged[:, wanted:] = part, part[:, -1:]
            found = step.run(None if tokens == 1 else self._context(profile))
            if not np.may_share_memory(found, logits):
                logits[:, first : first + wanted] = found[:, :wanted]
        group.advance()

    def _profile(self, batch: int, tokens: int, logits: int) -> PlanProfile:
        """Choose among the profiles that take a run: one that gives all logits, and the one made for the fewest tokens."""
        fitting = [profile for profile in self._plan.profiles if profile.takes(batch, tokens)]
        if not fitting:
            held = "; ".join(
                f"B {p.batch[0]} to {p.batch[1]}, S {p.tokens[0]} to {p.tokens[1]}" for p in self._plan.profiles
            )
            raise InputError(
                f"{self._plan.where}: no profile takes {batch} sequences of {tokens} tokens (there are: {held}); build it "
                "again with other profiles"
            )
        return min(fitting, key=lambda profile: (profile.logits[1] < logits, profile.tokens[1]))

    def _context(self, profile: PlanProfile) -> Owned[Any]:
        """Return the context that all caches' longer runs share."""
        if profile.index not in self._contexts:
            self._contexts[profile.index] = self._plan.new_context(profile, self._stream.handle)
        return self._contexts[profile.index]
