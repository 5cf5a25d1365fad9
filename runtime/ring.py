"""Where the rings' rows stand: positions, slots, and how many tokens the next run may take.

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
    """The bookkeeping of B rows that share their capacities, one for each kind of layer.

    positions: [B] int64, how many tokens each row was fed: the position of its next one.
    capacities: slots C of a row at present; each grows to that of `GraphFacts.capacities`, and then its ring wraps.
    """

    def __init__(self, facts: GraphFacts, batch: int, *, full: bool = False) -> None:
        self._facts = facts
        self.positions: Int64 = np.zeros(batch, np.int64)
        self.capacities = tuple(size if full else min(size, _GRAIN) for size in facts.capacities)

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

    def next_run(self, wanted: int) -> int:
        """Return how many tokens the next run takes, at most `wanted`: a chunk, and no row may cross a ring's end."""
        left = min(capacity - int((self.positions % capacity).max()) for capacity in self.capacities)
        return min(wanted, self._facts.chunk, left)

    def write_indices(self) -> Int64:
        """Return the slot of each row's next token in each kind's ring, [kinds, B] int64."""
        return np.stack([self.positions % capacity for capacity in self.capacities])

    def position_ids(self, tokens: int) -> Int64:
        """Return the positions of the next `tokens` of each row, [B, tokens] int64; padding goes on counting."""
        return self.positions[:, None] + np.arange(tokens, dtype=np.int64)
