"""A bundle that is loaded and can be run."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from galerne.errors import InputError
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines.engine import Engine
from galerne.runtime.engines.select import open_engine
from galerne.runtime.manifest import layer_kinds
from galerne.runtime.ring import Ring

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Model:
    """A bundle and the engine that runs it. It holds no state of a generation: that is in `Rows`.

    load_s: how long opening the engine took, in seconds.
    """

    def __init__(self, bundle: Bundle, engine: Engine, load_s: float) -> None:
        self.bundle, self.engine, self.load_s = bundle, engine, load_s
        self.facts, self.graph = bundle.manifest.model, bundle.manifest.graph

    @staticmethod
    def open(path: Path, engine: str | None = None, *, exact: bool = False, threads: int | None = None) -> "Model":
        """Open a bundle and the engine that fits this machine; see `open_engine` for the arguments."""
        bundle = Bundle.open(path)
        start = time.perf_counter()
        opened = open_engine(bundle, engine, exact=exact, threads=threads)
        return Model(bundle, opened, time.perf_counter() - start)

    def rows(self, batch: int = 1, *, full_ring: bool = False) -> "Rows":
        """Start `batch` empty sequences that are fed together. `full_ring` allocates the ring's full size at once."""
        return Rows(self, batch, full_ring=full_ring)


class Rows:
    """Sequences of their own lengths that are fed together."""

    def __init__(self, model: Model, batch: int, *, full_ring: bool = False) -> None:
        self._model = model
        self._ring = Ring(model.graph, batch, full=full_ring)
        self._windows = layer_kinds(model.facts.layer_windows)[0]
        self.cache = model.engine.new_cache(batch, self._ring.capacities)

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row holds."""
        return [int(position) for position in self._ring.positions]

    @property
    def capacities(self) -> tuple[int, ...]:
        """Slots of each kind's ring at present."""
        return self._ring.capacities

    @property
    def rewindable(self) -> list[int]:
        """How many tokens each row can take back: at least the bundle's chunk, less padding; see `Ring.rewindable`."""
        return [int(count) for count in self._ring.rewindable(self._windows)]

    def rewind(self, counts: Sequence[int]) -> None:
        """Take back the last `counts` tokens of each row, as if they had never been fed. Costs nothing: no memory moves.

        Raises: InputError if a count is more than `rewindable` says; a row's whole length can always be taken back.
        """
        self._ring.rewind(np.array(counts, np.int64), self._windows)

    def feed(self, tokens: Sequence[Sequence[int]]) -> Float32:
        """Append tokens to each row and return the logits after its last one.

        Args:
            tokens: a list of token ids for each row; one that gets none keeps its place.
        Returns: [B, vocab_size] float32, a copy; NaN for a row that got none.
        Raises: InputError on a token outside of the vocabulary, or beyond the longest context.
        """
        last = np.full((len(tokens), self._model.facts.vocab_size), np.nan, np.float32)
        for counts, ended, logits in self._runs(tokens, every=False):
            rows = np.flatnonzero(ended & (counts > 0))
            last[rows] = logits[rows, 0]
        return last

    def feed_all(
        self, tokens: Sequence[Sequence[int]], *, keep: Sequence[Sequence[int]] | None = None
    ) -> list[Float32]:
        """Append tokens to each row and return the logits after every one of them: [tokens, vocab_size] for each row.

        Args:
            keep: for each row the indices into its new tokens whose logits are wanted, ascending; all by default.
        """
        parts: list[list[Float32]] = [[] for _ in tokens]
        done = [0] * len(tokens)
        for counts, _, logits in self._runs(tokens, every=True):
            for row, count in enumerate(counts):
                kept = (
                    np.arange(count)
                    if keep is None
                    else np.flatnonzero(np.isin(np.arange(count) + done[row], keep[row]))
                )
                parts[row].append(logits[row, kept])
                done[row] += int(count)
        empty = np.zeros((0, self._model.facts.vocab_size), np.float32)
        return [np.concatenate([empty, *part]) for part in parts]

    def _runs(self, tokens: Sequence[Sequence[int]], *, every: bool) -> Iterator[tuple[Int64, Bools, Float32]]:
        """Feed tokens chunk by chunk.

        Yields: how many tokens each row got in this run [B], which rows have no more of them [B], and the logits
        [B, K, vocab_size] after each token, or (unless `every`) after the row's last token of the run.
        """
        ring, pending = self._ring, [self._checked(row, list(ids)) for row, ids in enumerate(tokens)]
        lengths = np.array([len(ids) for ids in pending], np.int64)
        ring.check_room(lengths)
        done = np.zeros_like(lengths)
        while (done < lengths).any():
            wanted = int((lengths - done).max())
            capacities = ring.wanted_capacities(min(wanted, self._model.graph.chunk))
            if capacities != ring.capacities:
                self.cache.resize(capacities)
                ring.capacities = capacities
            size = ring.next_run(wanted)
            counts = np.minimum(lengths - done, size)
            # Shorter rows are padded at their end: the padding's positions go on counting, and are overwritten later.
            ids = np.zeros((len(pending), size), np.int64)
            for row, count in enumerate(counts):
                ids[row, :count] = pending[row][done[row] : done[row] + count]
            picked = np.broadcast_to(np.arange(size), ids.shape) if every else np.maximum(counts - 1, 0)[:, None]
            ring.begin_run(size)
            logits = self._model.engine.run(self.cache, ids, ring.position_ids(size), ring.write_indices(), picked)
            ring.positions += counts
            done += counts
            yield counts, done == lengths, logits

    def _checked(self, row: int, ids: list[int]) -> list[int]:
        vocab_size = self._model.facts.vocab_size
        for index, token in enumerate(ids):
            if not 0 <= token < vocab_size:
                raise InputError(f"row {row}, token {index}: id {token} is not in the vocabulary of {vocab_size}")
        return ids
