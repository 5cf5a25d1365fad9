"""ONNX Runtime: the graph's session, and its CPU provider with weights mapped and the ring bound as both past and present."""

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from galerne.errors import BackendError, one_line
from galerne.runtime.adapter import no_adapter
from galerne.runtime.engines.cpu_features import sums_bytes_exactly
from galerne.runtime.engines.engine import Cache, Float32, Int64
from galerne.runtime.engines.owned import Owned
from galerne.runtime.heap import give_back
from galerne.runtime.manifest import Manifest, adapter_input_names, cache_names, layer_kinds, write_index_names

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
# How exactly MatMulNBits multiplies: 4 rounds the activations to int8, block by block; 1 keeps them float32.
_FAST, _EXACT = "4", "1"


def session_options(*, exact: bool, threads: int | None) -> ort.SessionOptions:
    """Return the options that a graph runs with, and that the `cpu` engine is made with."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # shapes change as the ring grows; a pattern for each would only pile up
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _EXACT if exact else _FAST)
    # Unsigned by unsigned bytes, which no CPU sums wrongly; a third as fast where it is not needed.
    options.add_session_config_entry("session.x64quantprecision", "0" if sums_bytes_exactly() else "1")
    return options


@dataclass(frozen=True)
class RingLayout:
    """How one ring lies in memory.

    past, present: the graph's input and output.
    axes: the sizes of its axes, with the names of B and C, of which B comes first. The `cpu` engine keeps values transposed.
    kind: of its layer.
    """

    past: str
    present: str
    axes: tuple[int | str, ...]
    kind: int

    @property
    def slot_axis(self) -> int:
        """The axis of C."""
        return next(axis for axis in range(1, len(self.axes)) if isinstance(self.axes[axis], str))

    def shape(self, batch: int, capacity: int) -> tuple[int, ...]:
        """Return the sizes for a number of rows and of slots."""
        return batch, *(capacity if isinstance(size, str) else size for size in self.axes[1:])


class _Ring:
    """A ring's memory, and the same as ONNX Runtime has it. They are made together, so that no interrupt parts them."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array, self.value = array, ort.OrtValue.ortvalue_from_numpy(array)


def _zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return zeros in memory of their own, which goes back to the system with them, and comes from it as it is written to.

    Zeros and not any contents: a masked slot's value still meets a weight of zero, and zero times NaN is NaN.

    Raises: BackendError if there is not enough memory.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return np.zeros(shape, dtype)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as exc:
        raise BackendError(
            f"no memory for keys and values: {size} bytes for a ring of {'x'.join(map(str, shape))} ({exc.strerror})"
        ) from exc
    return np.frombuffer(memory, dtype).reshape(shape)


def _resized(old: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return an array of another size with the same contents as far as both reach."""
    new = _zeros(shape, old.dtype)
    shared = tuple(slice(min(sizes)) for sizes in zip(old.shape, shape, strict=True))
    new[shared] = old[shared]
    return new


class OrtCache:
    """Rings in this process's memory.

    batch: rows B.
    adapter: what is bound to the graph's adapter inputs, by name.
    """

    def __init__(
        self,
        batch: int,
        layout: Sequence[RingLayout],
        capacities: Sequence[int],
        dtype: npt.DTypeLike,
        vocab_size: int,
        adapter: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        self.adapter = adapter
        self.batch, self.capacities, self._layout = batch, tuple(capacities), layout
        # Where every run of K = 1 leaves its logits, so that whoever holds this array sees each step's.
        self.last_logits = np.zeros((batch, 1, vocab_size), np.float32)
        self._rings = [_Ring(_zeros(ring.shape(batch, capacities[ring.kind]), dtype)) for ring in layout]
        self.bindings: dict[tuple[int, int], _Binding] = {}

    @property
    def values(self) -> list[Any]:
        """The rings as ONNX Runtime has them, keys and values by turns."""
        return [ring.value for ring in self._rings]

    def resize(self, capacities: Sequence[int]) -> None:
        """Move the rings into larger ones, C for each kind of layer; slot for slot, the new slots are empty.

        One after the other, so that no more than one ring is in memory twice.
        """
        self.bindings = {}  # they hold the old ones
        try:
            self._fit(capacities)
            self.capacities = tuple(capacities)
        except BaseException:  # no memory, or Ctrl-C: whatever comes, the rings have the size that `capacities` says
            self._fit(self.capacities)
            raise
        give_back()

    def _fit(self, capacities: Sequence[int]) -> None:
        for i, ring in enumerate(self._layout):
            shape = ring.shape(self.batch, capacities[ring.kind])
            if shape != self._rings[i].array.shape:
                self._rings[i] = _Ring(_resized(self._rings[i].array, shape))

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Return the rings, keys and values by turns: the memory itself, as long as the rings keep their size."""
        return [np.moveaxis(own.array, ring.slot_axis, 2) for ring, own in zip(self._layout, self._rings, strict=True)]

    def fill(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Copy the contents of rings of the same type into these; they may have fewer slots, which are the first here."""
        for own, other in zip(self.arrays(), arrays, strict=True):
            own[:, :, : other.shape[2]] = other

    def copy_from(self, other: "OrtCache") -> None:
        """Copy the rings of a cache of the same engine, with as many rows and slots, into these."""
        self.fill(other.arrays())

    def close(self) -> None:
        """Let go of the memory, but for what an array of the caller's still shows."""
        self._layout, self._rings, self.bindings, self.adapter = [], [], {}, {}


class _Binding:
    """One shape of run, bound once: its inputs are written in place, so that a step costs no binding."""

    def __init__(
        self,
        session: ort.InferenceSession,
        cache: OrtCache,
        manifest: Manifest,
        layout: Sequence[RingLayout],
        tokens: int,
        logits: int,
    ):
        batch, starts = cache.batch, write_index_names(len(manifest.graph.capacities))
        self.ids = np.zeros((batch, tokens), np.int64)
        self.positions = np.zeros((batch, tokens), np.int64)
        self.write_indices = np.zeros((len(starts), batch), np.int64)
        self.logit_indices = np.zeros((batch, logits), np.int64)
        self.logits = (
            cache.last_logits if logits == 1 else np.zeros((batch, logits, manifest.model.vocab_size), np.float32)
        )
        self.io = session.io_binding()
        inputs = {
            "input_ids": self.ids,
            "position_ids": self.positions,
            "logit_indices": self.logit_indices,
            **dict(zip(starts, self.write_indices, strict=True)),
            **cache.adapter,
        }
        for name, array in inputs.items():
            self.io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self.io.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self.logits))
        for ring, value in zip(layout, cache.values, strict=True):
            self.io.bind_ortvalue_input(ring.past, value)
            self.io.bind_ortvalue_output(ring.present, value)


def open_session(
    graph: Path, options: ort.SessionOptions, providers: Mapping[str, Mapping[str, str]], weights: Path | None = None
) -> Owned[Any]:
    """Open a graph in ONNX Runtime.

    Args:
        providers: in order, each with its options.
        weights: the folder of the graph's external data, where that is not its own.
    Raises: BackendError if it cannot.
    """
    try:
        source: str | bytes = str(graph)
        if weights is not None:  # ONNX Runtime looks elsewhere only for a graph that it has no path of
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
            source = graph.read_bytes()
        return Owned(ort.InferenceSession(source, options, providers=list(providers.items())))
    except Exception as exc:  # onnxruntime's errors share no base class of their own
        raise BackendError(f"{graph}: ONNX Runtime {ort.__version__} cannot open it: {one_line(exc)}") from exc


def run_bound(session: Owned[Any], io: Any, shape: tuple[int, ...], options: Any = None) -> None:
    """Run what is bound, with ONNX Runtime's options of a run. Raises: BackendError if ONNX Runtime fails."""
    try:
        session.value.run_with_iobinding(io, options)
    except Exception as exc:
        raise BackendError(f"ONNX Runtime {ort.__version__} failed in a run of {shape}: {one_line(exc)}") from exc


def ring_layout(session: Owned[Any], manifest: Manifest) -> tuple[list[RingLayout], np.dtype[Any], np.dtype[Any]]:
    """Return how a graph's rings lie in memory, keys and values by turns, their type, and the type of adapters."""
    inputs = {value.name: value for value in session.value.get_inputs()}
    kinds = layer_kinds(manifest.model.layer_windows)[1]
    past, present = (cache_names(prefix, len(kinds)) for prefix in ("past_key_values", "present"))
    layout = [
        RingLayout(before, after, tuple(inputs[before].shape), kinds[i // 2])
        for i, (before, after) in enumerate(zip(past, present, strict=True))
    ]
    # An engine computes in the type that its adapters have; one that has none computes in that of its rings.
    computed = [adapter_input_names(slot)[0] for slot in manifest.graph.adapter_slots]
    ring, adapter = (np.dtype(_TYPES[inputs[name].type]) for name in (past[0], (computed or past)[0]))
    return layout, ring, adapter


class OrtEngine:
    """A graph in ONNX Runtime's CPU provider: the portable one, or the `cpu` engine."""

    def __init__(self, graph: Path, manifest: Manifest, *, name: str, options: ort.SessionOptions) -> None:
        self.name = name
        session = open_session(graph, options, {"CPUExecutionProvider": {}})
        self._session: Owned[Any] | None = session
        give_back()
        self._manifest = manifest
        self._layout, self.ring_dtype, self.dtype = ring_layout(session, manifest)
        self._no_adapter = no_adapter(manifest.graph.adapter_slots, self.dtype)

    def new_cache(
        self, batch: int, capacities: Sequence[int], adapter: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> OrtCache:
        """As `Engine.new_cache` says."""
        bound = {**self._no_adapter, **(adapter or {})}
        return OrtCache(batch, self._layout, capacities, self.ring_dtype, self._manifest.model.vocab_size, bound)

    def tokens_of_run(self, wanted: int, most: int) -> int:
        """As `Engine.tokens_of_run` says: a graph takes any number."""
        return wanted

    def run(self, cache: Cache, ids: Int64, positions: Int64, write_indices: Int64, logit_indices: Int64) -> Float32:
        """As `Engine.run` says."""
        assert isinstance(cache, OrtCache) and self._session is not None
        shape = (ids.shape[1], logit_indices.shape[1])
        binding = cache.bindings.get(shape)
        if binding is None:
            if len(cache.bindings) > 1:  # keep that of decoding and one more: prompts come in many lengths
                cache.bindings = {key: kept for key, kept in cache.bindings.items() if key == (1, 1)}
            binding = _Binding(self._session.value, cache, self._manifest, self._layout, *shape)
            cache.bindings[shape] = binding
        binding.ids[:], binding.positions[:] = ids, positions
        binding.write_indices[:], binding.logit_indices[:] = write_indices, logit_indices
        run_bound(self._session, binding.io, ids.shape)
        return binding.logits

    def close(self) -> None:
        """Let go of ONNX Runtime's session; no run may follow."""
        self._session = None
