"""Sequences that are fed together, and the one loop that feeds them."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from galerne.errors import Cancelled, InputError
from galerne.runtime.adapter import Adapter
from galerne.runtime.exclusive import Exclusive
from galerne.runtime.ids import TokenIds, as_ids
from galerne.runtime.manifest import layer_kinds
from galerne.runtime.ring import Int64, Ring

if TYPE_CHECKING:
    from galerne.runtime.model import Model

Float32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


class Rows:
    """Sequences of their own lengths that are fed together. One thread at a time may use them.

    model: what runs them.
    ring: where they stand.
    adapter: the LoRA adapter that they run with, and that their keys and values belong to.
    cache: the engine's memory of them.
    exclusive: held by whoever uses them; all methods but `cancel` raise BusyError while another thread does.
    """

    def __init__(self, model: "Model", ring: Ring, adapter: Adapter | None = None) -> None:
        self.model, self.ring, self.exclusive = model, ring, Exclusive("the sequence")
        self.adapter = adapter
        self._windows = layer_kinds(model.facts.layer_windows)[0]
        # A plain flag and no Event: a signal's handler may set it while this very thread looks at it.
        self._cancelled, self._closed = False, False
        inputs = None if adapter is None else adapter.inputs
        self.cache = model.engine.new_cache(len(ring.positions), ring.capacities, inputs)
        self.ring.capacities = self.cache.capacities  # larger than asked for, where an engine's rings have few sizes

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row holds. Any thread may ask: during a long `feed` it grows chunk by chunk."""
        return [int(position) for position in self.ring.positions]

    @property
    def capacities(self) -> tuple[int, ...]:
        """Slots of each kind's ring at present."""
        return self.ring.capacities

    @property
    def rewindable(self) -> list[int]:
        """How many tokens each row can take back: at least the bundle's chunk, less padding; see `Ring.rewindable`."""
        return [int(count) for count in self.ring.rewindable(self._windows)]

    def rewind(self, counts: Sequence[int]) -> None:
        """Take back the last `counts` tokens of each row, as if they had never been fed. Costs nothing: no memory moves.

        Raises: InputError if a count is more than `rewindable` says; a row's whole length can always be taken back.
        """
        with self.exclusive:
            self.ring.rewind(np.array(counts, np.int64), self._windows)

    def feed(self, tokens: Sequence[TokenIds]) -> Float32:
        """Append tokens to each row and return the logits after its last one.

        Args:
            tokens: token ids for each row; one that gets none keeps its place. Arrays, buffers and DLPack exporters of
                int32 or int64 are read in place.
        Returns: [B, vocab_size] float32, a copy; NaN for a row that got none.
        Raises: InputError on a token outside of the vocabulary, or beyond the longest context; BusyError if another
            thread uses the rows; Cancelled after `cancel`. `lengths` says what was taken before.
        """
        last = np.full((len(tokens), self.model.facts.vocab_size), np.nan, np.float32)
        for counts, ended, logits in self.runs(tokens, every=False):
            rows = np.flatnonzero(ended & (counts > 0))
            last[rows] = logits[rows, 0]
        return last

    def feed_all(self, tokens: Sequence[TokenIds], *, keep: Sequence[Sequence[int]] | None = None) -> list[Float32]:
        """Append tokens to each row and return the logits after every one of them: [tokens, vocab_size] for each row.

        Args:
            keep: for each row the indices into its new tokens whose logits are wanted, ascending; all by default.
        Raises: as `feed`.
        """
        parts: list[list[Float32]] = [[] for _ in tokens]
        done = [0] * len(tokens)
        for counts, _, logits in self.runs(tokens, every=True):
            for row, count in enumerate(counts):
                kept = (
                    np.arange(count)
                    if keep is None
                    else np.flatnonzero(np.isin(np.arange(count) + done[row], keep[row]))
                )
                parts[row].append(logits[row, kept])
                done[row] += int(count)
        empty = np.zeros((0, self.model.facts.vocab_size), np.float32)
        return [np.concatenate([empty, *part]) for part in parts]

    def runs(self, tokens: Sequence[TokenIds], *, every: bool) -> Iterator[tuple[Int64, Bools, Float32]]:
        """Feed tokens chunk by chunk; see `feed`.

        Yields: how many tokens each row got in this run [B], which rows have no more of them [B], and the logits
        [B, K, vocab_size] after each token, or (unless `every`) after the row's last token of the run. Their memory holds
        until the next run.
        """
        with self.exclusive:
            self.check_usable()
            ring, vocab_size = self.ring, self.model.facts.vocab_size
            pending = [as_ids(ids, f"row {row}", vocab_size) for row, ids in enumerate(tokens)]
            lengths = np.array([len(ids) for ids in pending], np.int64)
            ring.check_room(lengths)
            done = np.zeros_like(lengths)
            while (done < lengths).any():
                if self._cancelled:
                    self._cancelled = False
                    raise Cancelled(f"cancelled: {done.sum()} of {lengths.sum()} new tokens were fed")
                wanted = int((lengths - done).max())
                self._grow(min(wanted, self.model.graph.chunk))
                size = self.model.engine.tokens_of_run(ring.next_run(wanted), ring.room())
                counts = np.minimum(lengths - done, size)
                # Shorter rows are padded at their end: the padding's positions go on counting, and are overwritten later.
                ids = np.zeros((len(pending), size), np.int64)
                for row, count in enumerate(counts):
                    ids[row, :count] = pending[row][done[row] : done[row] + count]
                picked = np.broadcast_to(np.arange(size), ids.shape) if every else np.maximum(counts - 1, 0)[:, None]
                ring.begin_run(size)
                logits = self.model.engine.run(self.cache, ids, ring.position_ids(size), ring.write_indices(), picked)
                ring.positions = ring.positions + counts
                done += counts
                yield counts, done == lengths, logits

    def cancel(self) -> None:
        """Ask from any thread that feeding ends: between two chunks, or, if nothing is being fed, when that is next tried.

        The feeding thread gets `Cancelled`, once; after that the rows can be fed again.
        """
        self._cancelled = True

    def fork(self) -> "Rows":
        """Return rows of the same contents that go on by themselves. Raises: BusyError; InputError if closed."""
        with self.exclusive:
            self.check_usable()
            twin = self.model.rows_at(self.ring.copy(), self.adapter)
            twin.cache.copy_from(self.cache)
            return twin

    def close(self) -> None:
        """Release the memory, but for what an array of the caller's still shows. Raises: BusyError if being fed."""
        with self.exclusive:
            self.release()

    def release(self) -> None:
        """As `close`, for whoever holds `exclusive`."""
        self._closed = True
        self.cache.close()

    def check_usable(self) -> None:
        """Raises: InputError if these rows or their model are closed, or this is a forked child of the model's process."""
        self.model.check_usable()
        if self._closed:
            raise InputError("the sequence is closed; start a new one")

    def _grow(self, tokens: int) -> None:
        # What the cache has counts, not what the ring says: an interrupt may have come between the two.
        self.ring.capacities = self.cache.capacities
        capacities = self.ring.wanted_capacities(tokens)
        if capacities != self.ring.capacities:
            self.cache.resize(capacities)
            self.ring.capacities = self.cache.capacities
