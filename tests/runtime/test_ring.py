"""The ring's promise, checked by brute force: whatever the chunks, padding and growth, each query sees exactly its window."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galerne.errors import InputError
from galerne.runtime.manifest import GraphFacts
from galerne.runtime.ring import Ring


def facts(window: int | None, chunk: int, context: int | None = None) -> GraphFacts:
    capacity = context if window is None else window + chunk
    assert capacity is not None
    return GraphFacts("opset24", 24, "float32", chunk, capacity, context)


@settings(max_examples=150, deadline=None)
@given(
    window=st.integers(1, 300),
    chunk=st.integers(1, 64),
    full=st.booleans(),
    feeds=st.lists(st.tuples(st.integers(1, 120), st.integers(0, 120)), min_size=1, max_size=12),
)
def test_each_query_sees_its_window_and_nothing_else(
    window: int, chunk: int, full: bool, feeds: list[tuple[int, int]]
) -> None:
    ring = Ring(facts(window, chunk), 2, full=full)
    slots: list[dict[int, tuple[int, bool]]] = [{}, {}]  # per row: slot -> (position written there, real or padding)
    for feed in feeds:
        left = np.array(feed, np.int64)
        while left.any():
            ring.capacity = ring.wanted_capacity(min(int(left.max()), chunk))
            size = ring.next_run(int(left.max()))
            assert 1 <= size <= chunk
            counts = np.minimum(left, size)
            positions, starts = ring.position_ids(size), ring.write_indices()
            for row in range(2):
                assert starts[row] + size <= ring.capacity, "a run crosses the ring's end"
                for i in range(size):
                    slots[row][int(starts[row]) + i] = (int(positions[row, i]), i < counts[row])
                newest = int(positions[row, -1])
                for i in range(int(counts[row])):
                    query = int(positions[row, i])
                    seen = set()
                    for slot in range(ring.capacity):
                        held = newest - (newest - slot) % ring.capacity
                        if 0 <= held <= query and held > query - window:
                            assert slots[row][slot] == (held, True)
                            seen.add(held)
                    assert seen == set(range(max(0, query - window + 1), query + 1))
            ring.positions += counts
            left -= counts


def test_ring_grows_to_its_full_size_and_no_further() -> None:
    ring, sizes = Ring(facts(1024, 256), 1), []
    for _ in range(20):
        ring.capacity = ring.wanted_capacity(256)
        sizes.append(ring.capacity)
        ring.positions += ring.next_run(256)
    assert sizes[0] < 1280
    assert sizes == sorted(sizes)
    assert sizes[-1] == 1280


def test_longest_context_is_a_limit_without_a_window() -> None:
    ring = Ring(facts(None, 16, 100), 1)
    ring.check_room(np.array([100]))
    with pytest.raises(InputError, match="101 tokens: the bundle's longest context is 100"):
        ring.check_room(np.array([101]))
