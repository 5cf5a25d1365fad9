"""The ring's promise, checked by brute force: whatever the chunks, padding and growth, each query sees exactly its window."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galerne.errors import InputError
from galerne.runtime.manifest import GraphFacts
from galerne.runtime.ring import Ring


def facts(windows: Sequence[int | None], chunk: int, context: int | None = None) -> GraphFacts:
    capacities = tuple((context or 0) if window is None else window + chunk for window in windows)
    return GraphFacts("opset24", 24, "float32", chunk, capacities, context)


@settings(max_examples=150, deadline=None)
@given(
    windows=st.lists(st.integers(1, 300), min_size=1, max_size=2, unique=True),
    chunk=st.integers(1, 64),
    full=st.booleans(),
    feeds=st.lists(st.tuples(st.integers(1, 120), st.integers(0, 120)), min_size=1, max_size=12),
)
def test_each_query_sees_its_window_and_nothing_else(
    windows: list[int], chunk: int, full: bool, feeds: list[tuple[int, int]]
) -> None:
    """One kind of layers and two: each kind's ring wraps on its own."""
    ring = Ring(facts(windows, chunk), 2, full=full)
    # per kind and row: slot -> (position written there, real or padding)
    slots: list[list[dict[int, tuple[int, bool]]]] = [[{}, {}] for _ in windows]
    for feed in feeds:
        left = np.array(feed, np.int64)
        while left.any():
            ring.capacities = ring.wanted_capacities(min(int(left.max()), chunk))
            size = ring.next_run(int(left.max()))
            assert 1 <= size <= chunk
            counts = np.minimum(left, size)
            positions, starts = ring.position_ids(size), ring.write_indices()
            for kind, row in itertools.product(range(len(windows)), range(2)):
                window, capacity, held_by = windows[kind], ring.capacities[kind], slots[kind][row]
                start = int(starts[kind, row])
                assert start + size <= capacity, "a run crosses the ring's end"
                for i in range(size):
                    held_by[start + i] = (int(positions[row, i]), i < counts[row])
                newest = int(positions[row, -1])
                for i in range(int(counts[row])):
                    query = int(positions[row, i])
                    seen = set()
                    for slot in range(capacity):
                        held = newest - (newest - slot) % capacity
                        if 0 <= held <= query and held > query - window:
                            assert held_by[slot] == (held, True)
                            seen.add(held)
                    assert seen == set(range(max(0, query - window + 1), query + 1))
            ring.positions += counts
            left -= counts


def test_ring_grows_to_its_full_size_and_no_further() -> None:
    ring, sizes = Ring(facts([1024], 256), 1), []
    for _ in range(20):
        ring.capacities = ring.wanted_capacities(256)
        sizes.append(ring.capacities[0])
        ring.positions += ring.next_run(256)
    assert sizes[0] < 1280
    assert sizes == sorted(sizes)
    assert sizes[-1] == 1280


def test_longest_context_is_a_limit_without_a_window() -> None:
    ring = Ring(facts([None], 16, 100), 1)
    ring.check_room(np.array([100]))
    with pytest.raises(InputError, match="101 tokens: the bundle's longest context is 100"):
        ring.check_room(np.array([101]))
