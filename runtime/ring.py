"""Where the ring's rows stand: positions, slots, and how many tokens the next run may take.

Only arithmetic: the memory belongs to the engine. See docs/graph.md for the promise that this keeps.
"""

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
    """The bookkeeping of B rows that share a capacity.

    positions: [B] int64, how many tokens each row was fed: the position of its next one.
    capacity: slots C of a row at present; it grows to `GraphFacts.capacity`, and then the ring wraps.
    """

    def __init__(self, facts: GraphFacts, batch: int, *, full: bool = False) -> None:
        self._facts = facts
        self.positions: Int64 = np.zeros(batch, np.int64)
        self.capacity = facts.capacity if full else min(facts.capacity, _GRAIN)

    def check_room(self, counts: Int64) -> None:
        """Raises: InputError if feeding `counts` [B] more tokens would pass the longest context."""
        limit = self._facts.max_context
        longest = int((self.positions + counts).max())
        if limit is not None and longest > limit:
            raise InputError(
                f"sequence of {longest} tokens: the bundle's longest context is {limit}; export it with --max-context"
            )

    def wanted_capacity(self, tokens: int) -> int:
        """Return the capacity that a run of `tokens` more on each row wants: more than now, or what there is."""
        full, needed = self._facts.capacity, int(self.positions.max()) + tokens
        if needed <= self.capacity or self.capacity == full:
            return self.capacity
        grown = max(needed, int(self.capacity * _GROWTH))
        return min(full, -(-grown // _GRAIN) * _GRAIN)

    def next_run(self, wanted: int) -> int:
        """Return how many tokens the next run takes, at most `wanted`: a chunk, and no row may cross the ring's end."""
        left = self.capacity - self.positions % self.capacity
        return int(min(wanted, self._facts.chunk, left.min()))

    def write_indices(self) -> Int64:
        """Return the slot of each row's next token, [B] int64."""
        return self.positions % self.capacity

    def position_ids(self, tokens: int) -> Int64:
        """Return the positions of the next `tokens` of each row, [B, tokens] int64; padding goes on counting."""
        return self.positions[:, None] + np.arange(tokens, dtype=np.int64)
