"""Where the rings' rows stand: positions, slots, and how many tokens the next run may take.

Only arithmetic: the memory belongs to the engine. See docs/graph.md for the promise that this keeps.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from galerne.errors import InputError
from galerne.runtime.manifest import GraphFacts

Int64 = npt.NDArray[np.int64]

# Slots that a ring starts with, and the grain it grows by. Attention reads every slot, used or not, so a ring is kept
# tight: growing by a quarter copies each key four times at most, which is less than reading empty slots at every step.
_GRAIN = 128
_GROWTH = 1.25


class Ring:
    """The bookkeeping of B rows that share their capacities, one for each kind of layer.

    positions: [B] int64, how many tokens each row holds: the position of its next one.
    written: [B] int64, one past the highest position that was ever written to each row, padding included.
    capacities: slots C of a row at present; each grows to that of `GraphFacts.capacities`, and then its ring wraps.
    """

    def __init__(self, facts: GraphFacts, batch: int, *, full: bool = False) -> None:
        self._facts = facts
        self.positions: Int64 = np.zeros(batch, np.int64)
        self.written: Int64 = np.zeros(batch, np.int64)
        self.capacities = tuple(size if full else min(size, _GRAIN) for size in facts.capacities)

    def copy(self) -> "Ring":
        """Return a ring that stands where this one does and goes on by itself."""
        twin = Ring(self._facts, len(self.positions))
        twin.positions, twin.written, twin.capacities = self.positions.copy(), self.written.copy(), self.capacities
        return twin

    def check_room(self, counts: Int64) -> None:
        """Raises: InputError if feeding `counts` [B] more tokens would pass the longest context."""
        limit = self._facts.max_context
        longest = int((self.positions + counts).max())
        if limit is not None and longest > limit:
            raise InputError(
                f"sequence of {longest} tokens: the bundle's longest context is {limit}; export it with --max-context"
            )

    def wanted_capacities(self, tokens: int) -> tuple[int, ...]:
        """Return the capacities that a run of `tokens` more on each row wants: more than now, or what there is."""
        needed = int(self.positions.max()) + tokens
        return tuple(
            now if needed <= now else min(full, -(-max(needed, int(now * _GROWTH)) // _GRAIN) * _GRAIN)
            for now, full in zip(self.capacities, self._facts.capacities, strict=True)
        )

    def room(self) -> int:
        """Return how many tokens the next run takes at most: a chunk, and no row may cross a ring's end."""
        left = min(capacity - int((self.positions % capacity).max()) for capacity in self.capacities)
        return min(self._facts.chunk, left)

    def next_run(self, wanted: int) -> int:
        """Return how many of `wanted` more tokens the next run takes."""
        return min(wanted, self.room())

    def write_indices(self) -> Int64:
        """Return the slot of each row's next token in each kind's ring, [kinds, B] int64."""
        return np.stack([self.positions % capacity for capacity in self.capacities])

    def position_ids(self, tokens: int) -> Int64:
        """Return the positions of the next `tokens` of each row, [B, tokens] int64; padding goes on counting."""
        return self.positions[:, None] + np.arange(tokens, dtype=np.int64)

    def begin_run(self, tokens: int) -> None:
        """Note that `tokens` slots of each row are about to be written. Before the run, as one that fails may have written."""
        self.written = np.maximum(self.written, self.positions + tokens)

    def rewindable(self, windows: Sequence[int | None]) -> Int64:
        """Return how many tokens each row can take back, [B] int64, with every query after that still seeing its window.

        A slot holds the last position that was written to it, so positions below `written` - C are lost. The next query, at
        position n, sees n - window + 1 and later: so n may go down to `written` - C + window - 1, and to 0 while nothing
        is lost. A ring of window + chunk slots can always take back chunk + 1 tokens, less the padding of the last run.

        Args:
            windows: of each kind of layer, as `layer_kinds` gives them.
        """
        lowest = np.zeros_like(self.positions)
        for window, capacity in zip(windows, self.capacities, strict=True):
            lost = self.written - capacity
            bound = self.positions if window is None else lost + window - 1
            lowest = np.maximum(lowest, np.where(lost > 0, bound, 0))
        return self.positions - np.minimum(lowest, self.positions)

    def rewind(self, counts: Int64, windows: Sequence[int | None]) -> None:
        """Take back the last `counts` [B] tokens of each row. All of a row's tokens can always be taken back.

        Raises: InputError if a count is negative, or more than `rewindable` gives.
        """
        most = self.rewindable(windows)
        for row, count in enumerate(counts):
            fed = int(self.positions[row])
            if not (0 <= count <= most[row] or count == fed):
                held = f"can take back {most[row]}, or all {fed} to start anew"
                raise InputError(f"row {row}: rewind by {count} tokens: the ring {held}; feed the text again instead")
        self.positions = self.positions - counts
