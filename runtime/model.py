"""A bundle that is loaded and can be run."""

import os
import threading
import time
import weakref
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from galerne.errors import InputError
from galerne.runtime.adapter import Adapter, load_adapter
from galerne.runtime.bundle import Bundle
from galerne.runtime.engines.engine import Engine
from galerne.runtime.engines.select import open_engine
from galerne.runtime.ring import Ring
from galerne.runtime.rows import Rows
from galerne.runtime.session import Session
from galerne.runtime.session_file import read_session


class Model:
    """A bundle and the engine that runs it. It holds no state of a generation: that is in `Rows` and `Session`.

    Any number of threads may use one model, each with rows or sessions of its own.

    load_s: how long opening the engine took, in seconds.
    """

    def __init__(self, bundle: Bundle, engine: Engine, load_s: float) -> None:
        self.bundle, self.engine, self.load_s = bundle, engine, load_s
        self.facts, self.graph = bundle.manifest.model, bundle.manifest.graph
        self._pid, self._closed, self._lock = os.getpid(), False, threading.Lock()
        self._open: weakref.WeakSet[Rows] = weakref.WeakSet()

    @staticmethod
    def open(path: Path, engine: str | None = None, *, exact: bool = False, threads: int | None = None) -> "Model":
        """Open a bundle and the engine that fits this machine; see `open_engine` for the arguments."""
        bundle = Bundle.open(path)
        start = time.perf_counter()
        opened = open_engine(bundle, engine, exact=exact, threads=threads)
        return Model(bundle, opened, time.perf_counter() - start)

    def load_adapter(self, path: Path) -> Adapter:
        """Read a LoRA adapter as peft saves it. Any number can be held, and each row or session runs with one or none.

        Raises: InputError if the bundle was not exported with adapter slots, or the adapter is damaged or does not fit.
        """
        return load_adapter(self.bundle, path, self.engine.dtype)

    def rows(self, batch: int = 1, *, full_ring: bool = False, adapter: Adapter | None = None) -> Rows:
        """Start `batch` empty sequences that are fed together.

        Args:
            full_ring: allocate the ring's full size at once.
            adapter: what they all run with, from their first token to their last.
        Raises: InputError if the model is closed, this process was forked from the one that opened it, or the adapter was
            loaded for another bundle or another engine's type.
        """
        return self.rows_at(Ring(self.graph, batch, full=full_ring), adapter)

    def rows_at(self, ring: Ring, adapter: Adapter | None = None) -> Rows:
        """Start rows that stand where `ring` does. Their memory is empty: fill it. Raises: as `rows`."""
        self.check_usable()
        self._check_adapter(adapter)
        rows = Rows(self, ring, adapter)
        with self._lock:
            self._open.add(rows)
        return rows

    def session(self, adapter: Adapter | None = None) -> Session:
        """Start an empty session. `adapter` and Raises: as `rows`."""
        return Session(self.rows(adapter=adapter))

    def load_session(self, path: Path, adapter: Adapter | None = None) -> Session:
        """Go on with a session that `Session.save` wrote, with the adapter that it had.

        Raises: InputError if the file is damaged, or of another bundle, adapter or engine's type of cache; and as `rows`.
        """
        return Session(*read_session(self, path, adapter))

    def check_usable(self) -> None:
        """Raises: InputError if the model is closed, or this process was forked from the one that opened it."""
        if self._closed:
            raise InputError(f"{self.bundle.path}: the model is closed; open it again")
        if os.getpid() != self._pid:
            raise InputError(
                f"{self.bundle.path}: opened in process {self._pid} and used in its forked child {os.getpid()}, where the "
                'engine\'s threads do not run; open it in the child, or start children with the "spawn" method'
            )

    def _check_adapter(self, adapter: Adapter | None) -> None:
        if adapter is None:
            return
        types = {array.dtype for array in adapter.inputs.values()}
        if adapter.bundle != self.bundle.fingerprint() or types != {self.engine.dtype}:
            raise InputError(
                f"{adapter.path}: loaded for another model than {self.bundle.path}, engine {self.engine.name!r}; load it with "
                "the load_adapter of the model that runs it"
            )

    def close(self) -> None:
        """Release the engine and the memory of all rows and sessions. Closing twice is closing once.

        Raises: BusyError if one of them is being fed, and nothing is closed; `cancel` it first.
        """
        with self._lock, ExitStack() as held:
            rows = list(self._open)
            for each in rows:
                held.enter_context(each.exclusive)
            for each in rows:
                each.release()
            self._closed = True
            self._open.clear()
            self.engine.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
