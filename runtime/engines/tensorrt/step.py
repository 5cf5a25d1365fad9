"""One shape of run of some rows: its inputs staged, its addresses bound, and replayed as a CUDA graph where that is possible."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from galerne.errors import BackendError, GalerneError
from galerne.runtime.engines.engine import Float32
from galerne.runtime.engines.owned import Owned
from galerne.runtime.engines.tensorrt.memory import ALIGNMENT, DeviceMemory, Graph, PinnedMemory, Stream, pinned_array
from galerne.runtime.engines.tensorrt.plan import IDS, LOGIT_INDICES, LOGITS, POSITIONS, Plan, PlanProfile

logger = logging.getLogger(__name__)


class Step:
    """A run of B rows, S tokens and K logits, over and over.

    inputs: by name, page-locked; write them before `run`.
    logits: [B, K, vocab_size] float32, page-locked; there after `run`.
    """

    def __init__(
        self,
        plan: Plan,
        stream: Stream,
        profile: PlanProfile,
        shape: tuple[int, int, int],
        rings: tuple[Sequence[DeviceMemory], Sequence[DeviceMemory]],
        logits: Float32 | None = None,
    ) -> None:
        """Allocate what the run needs.

        Args:
            shape: B, S, K.
            rings: what past and present are bound to: the same, where the engine updates them in place.
            logits: where to leave the logits: page-locked, and contiguous.
        """
        self._plan, self._stream, self._profile = plan, stream, profile
        self._past, self._present = rings
        batch, tokens, count = shape
        shapes: dict[str, tuple[int, ...]] = {
            IDS: (batch, tokens),
            POSITIONS: (batch, tokens),
            LOGIT_INDICES: (batch, count),
        }
        shapes.update(dict.fromkeys(plan.starts, (batch,)))
        places, size = _places(shapes, plan.index_dtypes)
        self._staged, self._inputs = PinnedMemory(plan.driver, size), DeviceMemory(plan.driver, size)
        self.inputs: dict[str, npt.NDArray[Any]] = {
            name: self._staged.array(shapes[name], plan.index_dtypes[name], place) for name, place in places.items()
        }
        self._places = places
        if logits is None:
            logits = pinned_array(plan.driver, (batch, count, plan.vocab_size), np.float32)
        assert logits.flags.c_contiguous
        self.logits: Float32 = logits
        self._output = DeviceMemory(plan.driver, logits.nbytes)
        self._context: Owned[Any] | None = None
        self._graph: Graph | None = None
        self._recordable = True

    def run(self, shared: Owned[Any] | None = None) -> Float32:
        """Run what `inputs` hold and wait for it. Returns: `logits`.

        Args:
            shared: a context that other steps use too. Without one the step keeps its own, and from its second run on
                replays what it recorded: a graph depends on its context, so that one must be nobody else's.
        Raises: BackendError if TensorRT or CUDA fails.
        """
        driver, stream = self._plan.driver, self._stream.handle
        try:
            if self._graph is not None:
                driver.launch(self._graph.handle, stream)
            elif shared is not None:
                self._bind(shared.value)
                self._enqueue(shared.value)
            else:
                if self._context is None:
                    context = self._plan.new_context(self._profile, stream, one_shape=True)
                    self._bind(context.value)
                    self._context = context
                self._enqueue(self._context.value)
        except BaseException:
            # Whatever ended this, Ctrl-C too: the staged memory is written again next, so nothing may still be reading it.
            with suppress(GalerneError):  # after an error of CUDA's this is the same one again
                driver.synchronize(stream)
            raise
        driver.synchronize(stream)
        if self._context is not None and self._recordable:
            self._record(self._context.value)
        return self.logits

    def close(self) -> None:
        """Let go of the graph, the context and the memory on the GPU; `logits` lives as long as someone holds it."""
        if self._graph is not None:
            self._graph.close()
        self._context = self._graph = None
        self.inputs = {}
        for memory in (self._inputs, self._output, self._staged):
            memory.close()

    def _enqueue(self, context: Any) -> None:
        driver, stream = self._plan.driver, self._stream.handle
        driver.upload(self._inputs.address, self._staged.address, self._inputs.size, stream)
        if not context.execute_async_v3(stream):
            library = self._plan.library
            raise BackendError(f"{self._plan.where}: {library.name} failed in a run: {library.cause()}")
        driver.download(self.logits.ctypes.data, self._output.address, self.logits.nbytes, stream)

    def _record(self, context: Any) -> None:
        """Record the run. It has run once before, since TensorRT does a new shape's first work outside of what is recorded."""
        driver, stream = self._plan.driver, self._stream.handle
        self._recordable = False
        capturable = getattr(context, "is_stream_capturable", None)  # TensorRT-RTX says it beforehand
        if capturable is not None and not capturable(stream):
            return
        whole = False
        driver.begin_capture(stream)
        try:
            self._enqueue(context)
            whole = True
        except GalerneError as exc:
            logger.debug("decoding without a CUDA graph: %s", exc)
        finally:
            try:
                graph = Graph(driver, driver.end_capture(stream))
            except GalerneError as exc:
                logger.debug("decoding without a CUDA graph: %s", exc)
            else:
                if whole:
                    self._graph = graph
                else:
                    graph.close()

    def _bind(self, context: Any) -> None:
        plan = self._plan
        addresses = {name: self._inputs.address + place for name, place in self._places.items()}
        batch = self.logits.shape[0]
        for name, array in self.inputs.items():
            self._check(context.set_input_shape(name, array.shape), name)
        for name, row in zip(plan.past, plan.ring_shapes, strict=True):
            self._check(context.set_input_shape(name, (batch, *row)), name)
        addresses |= dict(zip(plan.past, (ring.address for ring in self._past), strict=True))
        addresses |= dict(zip(plan.present, (ring.address for ring in self._present), strict=True))
        addresses[LOGITS] = self._output.address
        for name, address in addresses.items():
            self._check(context.set_tensor_address(name, address), name)

    def _check(self, done: bool, name: str) -> None:
        if not done:
            library = self._plan.library
            raise BackendError(f"{self._plan.where}: {library.name} refused {name}: {library.cause()}")


def _places(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]]) -> tuple[dict[str, int], int]:
    """Return where each input begins in one piece of memory, aligned as TensorRT asks, and the size of all."""
    places, end = {}, 0
    for name, shape in shapes.items():
        places[name] = end
        end += -(-int(np.prod(shape)) * dtypes[name].itemsize // ALIGNMENT) * ALIGNMENT
    return places, end
