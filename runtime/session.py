"""One sequence that is fed, taken back, forked and saved: what a service holds for each conversation."""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from galerne.errors import InputError
from galerne.runtime.ids import TokenIds
from galerne.runtime.rows import Float32, Rows
from galerne.runtime.session_file import write_session


class Session:
    """One sequence of any length in constant memory. It keeps its keys and values, not its tokens.

    One thread at a time may use it, and BusyError tells a second one so; only `cancel` and `length` are for any thread.
    Other threads run meanwhile: the engine holds no GIL while it computes.
    """

    def __init__(self, rows: Rows, logits: Float32 | None = None) -> None:
        """Wrap rows of one sequence; `Model.session` and `Model.load_session` make them."""
        self._rows, self._logits = rows, logits

    @property
    def length(self) -> int:
        """How many tokens it holds. During a long `append` it grows chunk by chunk."""
        return self._rows.lengths[0]

    @property
    def rewindable(self) -> int:
        """How many tokens `rewind` can take back now: all while the ring has not wrapped, then the chunk and one more."""
        return self._rows.rewindable[0]

    def append(self, ids: TokenIds) -> None:
        """Feed tokens; `logits` are then those after the last one.

        Args:
            ids: a list; or int32 or int64 in one dimension in any form that DLPack or the buffer protocol gives, read in
                place, so do not write to it meanwhile.
        Raises: InputError on a token outside of the vocabulary, beyond the longest context, or if closed; BusyError if
            another thread uses the session; Cancelled after `cancel`. In every case the session is as good as before and
            `length` says what was taken.
        """
        for _, _, logits in self._rows.runs([ids], every=False):
            self._logits = logits[0, 0]

    @property
    def logits(self) -> Float32:
        """The logits after the last token, [vocab_size] float32: the memory itself, not a copy.

        It is the same memory from one `append` to the next, so an array taken once shows each step's; copy it to keep
        it. It stays valid when the session is closed.

        Raises: InputError if nothing was appended since the start or the last `rewind`; BusyError.
        """
        with self._rows.exclusive:
            if self._logits is None:
                raise InputError("logits: none yet; append a token, after a rewind the last one that is kept")
            return self._logits

    @property
    def cache(self) -> list[npt.NDArray[Any]]:
        """Keys and values of the layers by turns, [1, num_key_value_heads, C, head_dim]: the memory itself.

        The axes are these whatever the engine; strides may be unusual: the `cpu` engine keeps values transposed.

        Slot p mod C holds position p. The arrays stay valid whatever happens, but the session leaves them behind when
        it moves to larger ones, which it does until C is the bundle's full capacity, and when it is closed.

        Raises: BusyError; InputError if closed.
        """
        with self._rows.exclusive:
            self._rows.check_usable()
            return self._rows.cache.arrays()

    def rewind(self, count: int) -> None:
        """Take back the last `count` tokens, as if they had never been appended. Nothing is copied or computed.

        Afterwards there are no `logits` until the next `append`: to have those of the last token kept, take it back too
        and append it again.

        Raises: InputError if `count` is more than `rewindable` says, and not the whole length.
        """
        self._rows.rewind([count])
        if count:
            self._logits = None

    def fork(self) -> "Session":
        """Return a session of the same contents that goes on by itself. Copies the memory: see `cache` for how much."""
        twin = self._rows.fork()
        return Session(twin, None if self._logits is None else self._logits.copy())

    def save(self, path: Path) -> None:
        """Write the session to a file that `Model.load_session` reads; the file is there whole or not at all.

        The form is that of safetensors, so other tools can read the keys and values too.

        Raises: InputError if the file cannot be written, or the session is closed; BusyError.
        """
        with self._rows.exclusive:
            self._rows.check_usable()
            write_session(path, self._rows, self._logits)

    def cancel(self) -> None:
        """Ask from any thread that appending ends: between two chunks, or, if none is under way, at the next `append`.

        The thread that appends gets `Cancelled`, once; after that the session can be used again.
        """
        self._rows.cancel()

    def close(self) -> None:
        """Release the memory, but for what an array of the caller's still shows. Raises: BusyError."""
        self._rows.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
