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


class Simulation:
    """Writes what a run writes, slot by slot, and remembers which token each row truly holds at each position."""

    def __init__(self, windows: Sequence[int | None], chunk: int, context: int | None, *, full: bool) -> None:
        self.windows, self.context, self.serial = windows, context, 0
        self.ring = Ring(facts(windows, chunk, context), 2, full=full)
        self.chunk = chunk
        self.truth: list[list[int]] = [[], []]  # of each row: the token at each position
        # per kind and row: slot -> (position written there, token; None for padding)
        self.slots: list[list[dict[int, tuple[int, int | None]]]] = [[{}, {}] for _ in windows]

    def feed(self, counts: tuple[int, int]) -> None:
        """Feed two rows, check each query of each run against its window."""
        ring, left = self.ring, np.array(counts, np.int64)
        if self.context is not None:
            left = np.minimum(left, self.context - ring.positions)
        while left.any():
            ring.capacities = ring.wanted_capacities(min(int(left.max()), self.chunk))
            size = ring.next_run(int(left.max()))
            assert 1 <= size <= self.chunk
            taken = np.minimum(left, size)
            positions, starts = ring.position_ids(size), ring.write_indices()
            for row in range(2):
                self.truth[row] += range(self.serial, self.serial + int(taken[row]))
                self.serial += int(taken[row])
            ring.begin_run(size)
            for kind, row in itertools.product(range(len(self.windows)), range(2)):
                capacity, start = ring.capacities[kind], int(starts[kind, row])
                assert start + size <= capacity, "a run crosses the ring's end"
                for i in range(size):
                    position = int(positions[row, i])
                    token = self.truth[row][position] if i < taken[row] else None
                    self.slots[kind][row][start + i] = (position, token)
                for query in positions[row, : taken[row]]:
                    self.check_query(kind, row, int(query), int(positions[row, -1]))
            ring.positions += taken
            left -= taken

    def check_query(self, kind: int, row: int, query: int, newest: int) -> None:
        """The slots that the graph's mask shows to a query hold exactly the tokens of its window."""
        capacity, window, seen = self.ring.capacities[kind], self.windows[kind], set()
        for slot in range(capacity):
            held = newest - (newest - slot) % capacity
            if 0 <= held <= query and (window is None or held > query - window):
                assert self.slots[kind][row][slot] == (held, self.truth[row][held])
                seen.add(held)
        assert seen == set(range(0 if window is None else max(0, query - window + 1), query + 1))

    def holds_window(self, row: int, position: int) -> bool:
        """Whether every key that a query at `position` sees, but for its own, still stands in its slot."""
        return all(
            self.slots[kind][row][held % capacity] == (held, self.truth[row][held])
            for kind, (window, capacity) in enumerate(zip(self.windows, self.ring.capacities, strict=True))
            for held in range(0 if window is None else max(0, position - window + 1), position)
        )

    def rewind(self, counts: Sequence[int]) -> None:
        self.ring.rewind(np.array(counts, np.int64), self.windows)
        for truth, count in zip(self.truth, counts, strict=True):
            del truth[len(truth) - count :]


# What a test does in turn: feed two rows, or take back shares (per mille) of what each can take back.
FEED = st.tuples(st.just("feed"), st.integers(0, 120), st.integers(0, 120))
REWIND = st.tuples(st.just("rewind"), st.integers(0, 1000), st.integers(0, 1000))
WINDOWS = st.lists(st.one_of(st.integers(1, 300), st.none()), min_size=1, max_size=2, unique=True)


@settings(max_examples=200, deadline=None)
@given(
    windows=WINDOWS,
    chunk=st.integers(1, 64),
    context=st.integers(1, 800),
    full=st.booleans(),
    steps=st.lists(st.one_of(FEED, FEED, REWIND), min_size=1, max_size=14),
)
def test_each_query_sees_its_window_and_nothing_else(
    windows: list[int | None], chunk: int, context: int, full: bool, steps: list[tuple[str, int, int]]
) -> None:
    """One kind of layers and two, each wrapping on its own, whatever was fed, padded and taken back before."""
    run = Simulation(windows, chunk, context if None in windows else None, full=full)
    for what, *amounts in steps:
        if what == "feed":
            run.feed((amounts[0], amounts[1]))
            continue
        most = run.ring.rewindable(windows)
        for row, (length, count) in enumerate(zip(run.ring.positions.tolist(), most.tolist(), strict=True)):
            if length == run.context:  # no query can follow; a neighbour's run has padded over the row's start
                continue
            assert all(run.holds_window(row, length - back) for back in {0, count // 2, count})
            # And it is not too careful: one token further back, a key is missing (a window of 1 needs no key at all).
            if count < length - 1 and 1 not in windows:
                assert not run.holds_window(row, length - count - 1)
                with pytest.raises(InputError, match=f"rewind by {count + 1} tokens: the ring can take back {count}, "):
                    run.ring.rewind(np.eye(2, dtype=np.int64)[row] * (count + 1), windows)
        run.rewind([count * share // 1000 for count, share in zip(most.tolist(), amounts, strict=True)])


def test_a_row_can_always_go_back_by_a_chunk_and_to_its_start() -> None:
    ring = Ring(facts([100], 16), 1, full=True)
    for _ in range(500):  # token by token, far around the ring: no padding
        ring.begin_run(1)
        ring.positions += 1
    assert ring.rewindable([100]).tolist() == [17]
    with pytest.raises(InputError, match="rewind by 18 tokens: the ring can take back 17, or all 500 to start anew"):
        ring.rewind(np.array([18]), [100])
    with pytest.raises(InputError, match="rewind by -1"):
        ring.rewind(np.array([-1]), [100])
    ring.rewind(np.array([17]), [100])
    assert ring.rewindable([100]).tolist() == [0]
    ring.rewind(np.array([483]), [100])
    assert ring.positions.tolist() == [0]


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
