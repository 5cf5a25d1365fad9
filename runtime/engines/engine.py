"""What the runtime asks of an engine."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class Cache(Protocol):
    """The rings' memory on the engine's device: for each layer keys and values [B, num_key_value_heads, C, head_dim].

    capacities: C of each kind of layer at present.
    """

    capacities: tuple[int, ...]

    def resize(self, capacities: Sequence[int]) -> None:
        """Move the rings into larger ones, C for each kind of layer or more; slot for slot, the new slots are empty."""

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Return the rings, keys and values by turns: the memory itself where this process can read it, else copies.

        Write through `fill` only, which reaches the rings either way. Whatever order the engine keeps them in, the axes are
        [B, num_key_value_heads, C, head_dim]: strides may be unusual.
        """

    def fill(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Copy the contents of rings of the same type into these; they may have fewer slots, which are the first here."""

    def copy_from(self, other: Any) -> None:
        """Copy the rings of a cache of the same engine, with as many rows and slots, into these."""

    def close(self) -> None:
        """Let go of the memory, but for what an array of the caller's still shows."""


class Engine(Protocol):
    """Runs the graph's contract."""

    @property
    def name(self) -> str:
        """ "portable", or the target that it was built for."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of adapters, and of what the graph computes."""

    @property
    def ring_dtype(self) -> np.dtype[Any]:
        """The type of the rings: `dtype`, or what keys and values are rounded to."""

    def new_cache(
        self, batch: int, capacities: Sequence[int], adapter: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> Cache:
        """Allocate rings for `batch` rows, with C slots for each kind of layer or more.

        Args:
            adapter: what to bind to the graph's adapter inputs in every run of these rows, by their names, in `dtype`.
        """

    def tokens_of_run(self, wanted: int, most: int) -> int:
        """Return how many tokens S a run takes where each row has up to `wanted` more, and there is room for `most`.

        Args:
            wanted: at least 1, at most `most`.
        Returns: less than `wanted`, or more, where the engine takes certain sizes only: the caller pads.
        """

    def run(self, cache: Cache, ids: Int64, positions: Int64, write_indices: Int64, logit_indices: Int64) -> Float32:
        """Feed tokens, updating the cache in place.

        Args:
            ids, positions: [B, S] int64.
            write_indices: [kinds of layers, B] int64.
            logit_indices: [B, K] int64.
        Returns: logits [B, K, vocab_size] float32. The memory is the cache's and holds until the cache's next run; for K = 1
            it is the same at every run.
        Raises: BackendError if the backend fails.
        """

    def close(self) -> None:
        """Let go of the backend's memory; no run may follow."""
