"""ONNX Runtime with the rings on a device, for its CUDA provider: only ids, positions and logits travel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from galerne.errors import BackendError, one_line
from galerne.runtime.adapter import no_adapter
from galerne.runtime.bundle import GRAPH, Bundle
from galerne.runtime.engines.engine import Cache, Float32, Int64
from galerne.runtime.engines.ort import RingLayout, open_session, ring_layout, run_bound, session_options
from galerne.runtime.engines.owned import Owned
from galerne.runtime.manifest import Manifest, write_index_names

CUDA = "cuda"

_PROVIDERS = {CUDA: "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}


class Placement:
    """A device, as ONNX Runtime names it. "cpu" stands for one in tests: its memory is ONNX Runtime's own all the same."""

    def __init__(self, device: str) -> None:
        self.device, self.provider = device, _PROVIDERS[device]

    def new(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Any:
        """Return new memory on the device. Raises: BackendError if there is not enough."""
        try:
            return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self.device, 0)
        except Exception as exc:  # onnxruntime's errors share no base class of their own
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            raise BackendError(
                f"ONNX Runtime {ort.__version__} cannot allocate {size} bytes on {self.device}: {one_line(exc)}"
            ) from exc

    def put(self, array: npt.NDArray[Any]) -> Any:
        """Return a copy of an array on the device."""
        value = self.new(array.shape, array.dtype)
        value.update_inplace(np.ascontiguousarray(array))
        return value


class DeviceCache:
    """Rings on a device; see `Cache`. Growing takes them through this process's memory, which happens a few times only.

    values: the rings, in the layout's order. adapter: what is bound to the graph's adapter inputs, on the device.
    bindings: by S and K.
    """

    def __init__(
        self,
        placement: Placement,
        batch: int,
        layout: Sequence[RingLayout],
        capacities: Sequence[int],
        dtype: np.dtype[Any],
        vocab_size: int,
        adapter: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        self.batch, self.capacities, self._placement, self._layout = batch, tuple(capacities), placement, layout
        self.last_logits: Float32 = np.zeros((batch, 1, vocab_size), np.float32)
        self.adapter = {name: placement.put(array) for name, array in adapter.items()}
        self.bindings: dict[tuple[int, int], DeviceBinding] = {}
        # Zeros: a masked slot's value meets a weight of zero, and zero times NaN is NaN.
        self.values = [placement.put(np.zeros(ring.shape(batch, capacities[ring.kind]), dtype)) for ring in layout]

    def resize(self, capacities: Sequence[int]) -> None:
        """Move the rings into larger ones, C for each kind of layer; slot for slot, the new slots are empty."""
        grown = []
        for ring, value in zip(self._layout, self.values, strict=True):
            old, new = value.numpy(), value
            if (shape := ring.shape(self.batch, capacities[ring.kind])) != old.shape:
                larger = np.zeros(shape, old.dtype)
                larger[tuple(map(slice, old.shape))] = old
                new = self._placement.put(larger)
            grown.append(new)
        # Nothing that Ctrl-C could interrupt stands between these: they always fit each other.
        self.values, self.capacities, self.bindings = grown, tuple(capacities), {}

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Return copies of the rings in this process's memory."""
        pairs = zip(self._layout, self.values, strict=True)
        return [np.moveaxis(value.numpy().copy(), ring.slot_axis, 2) for ring, value in pairs]

    def fill(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Copy the contents of rings of the same type into these; they may have fewer slots, which are the first here."""
        for ring, value, array in zip(self._layout, self.values, arrays, strict=True):
            whole = np.zeros(ring.shape(self.batch, self.capacities[ring.kind]), array.dtype)
            np.moveaxis(whole, ring.slot_axis, 2)[:, :, : array.shape[2]] = array
            value.update_inplace(whole)

    def copy_from(self, other: "DeviceCache") -> None:
        """Copy the rings of a cache of the same engine, with as many rows and slots, within the device."""
        for value, source in zip(self.values, other.values, strict=True):
            value.update_inplace(source)

    def close(self) -> None:
        """Let go of the memory."""
        self.values, self.bindings, self.adapter, self._layout = [], {}, {}, []


class DeviceBinding:
    """One shape of run: its inputs on the device, and where its logits come to."""

    def __init__(
        self,
        session: Owned[Any],
        cache: DeviceCache,
        manifest: Manifest,
        layout: Sequence[RingLayout],
        shape: tuple[int, int],
    ) -> None:
        tokens, logits = shape
        sizes = {"input_ids": (cache.batch, tokens), "position_ids": (cache.batch, tokens)}
        sizes["logit_indices"] = (cache.batch, logits)
        self.starts = write_index_names(len(manifest.graph.capacities))
        self.inputs = {name: cache._placement.new(size, np.int64) for name, size in sizes.items()}
        self.inputs |= {name: cache._placement.new((cache.batch,), np.int64) for name in self.starts}
        self.logits: Float32 = cache.last_logits
        if logits > 1:
            self.logits = np.zeros((cache.batch, logits, manifest.model.vocab_size), np.float32)
        self.io = session.value.io_binding()
        for name, value in cache.adapter.items():
            self.io.bind_ortvalue_input(name, value)
        self.io.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self.logits))
        for ring, value in zip(layout, cache.values, strict=True):
            self.io.bind_ortvalue_input(ring.past, value)
            self.io.bind_ortvalue_output(ring.present, value)

    def write(self, arrays: Mapping[str, Int64]) -> None:
        """Put the small inputs onto the device."""
        for name, array in arrays.items():
            self.inputs[name].update_inplace(np.ascontiguousarray(array, np.int64))
            # Anew each time: where a node reads an input on the CPU, binding is when ONNX Runtime copies it there.
            self.io.bind_ortvalue_input(name, self.inputs[name])
        self.io.synchronize_inputs()


class DeviceEngine:
    """The portable graph in one of ONNX Runtime's providers, its rings on that provider's device."""

    def __init__(
        self, graph: Path, manifest: Manifest, *, device: str, options: ort.SessionOptions, name: str = CUDA
    ) -> None:
        """Open the graph. Raises: BackendError if this ONNX Runtime lacks the provider, or it does not start."""
        self.name, self._manifest, self._placement = name, manifest, Placement(device)
        provider = self._placement.provider
        if provider not in ort.get_available_providers():
            raise BackendError(
                f"--engine {name}: ONNX Runtime {ort.__version__} here has no {provider}; install galerne[cuda] "
                "(onnxruntime-gpu, in place of onnxruntime), or run with `--engine portable`"
            )
        session = open_session(graph, options, list(dict.fromkeys((provider, _PROVIDERS["cpu"]))))
        if session.value.get_providers()[0] != provider:  # it says so in a warning, and would go on without
            raise BackendError(
                f"--engine {name}: {provider} of ONNX Runtime {ort.__version__} does not start: it needs an NVIDIA driver, CUDA "
                "and cuDNN of its versions; see its message above, or run with `--engine portable`"
            )
        self._session: Owned[Any] | None = session
        self._layout, self.ring_dtype, self.dtype = ring_layout(session, manifest)
        self._no_adapter = no_adapter(manifest.graph.adapter_slots, self.dtype)

    def new_cache(
        self, batch: int, capacities: Sequence[int], adapter: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> DeviceCache:
        """As `Engine.new_cache` says."""
        bound = {**self._no_adapter, **(adapter or {})}
        facts = self._manifest.model
        return DeviceCache(self._placement, batch, self._layout, capacities, self.ring_dtype, facts.vocab_size, bound)

    def tokens_of_run(self, wanted: int, most: int) -> int:
        """As `Engine.tokens_of_run` says: a graph takes any number."""
        return wanted

    def run(self, cache: Cache, ids: Int64, positions: Int64, write_indices: Int64, logit_indices: Int64) -> Float32:
        """As `Engine.run` says."""
        assert isinstance(cache, DeviceCache) and self._session is not None
        shape = (ids.shape[1], logit_indices.shape[1])
        if shape not in cache.bindings:
            # Keep that of decoding and one more: prompts come in many lengths.
            cache.bindings = {key: kept for key, kept in cache.bindings.items() if key == (1, 1)}
            cache.bindings[shape] = DeviceBinding(self._session, cache, self._manifest, self._layout, shape)
        binding = cache.bindings[shape]
        starts = dict(zip(binding.starts, write_indices, strict=True))
        binding.write({"input_ids": ids, "position_ids": positions, "logit_indices": logit_indices, **starts})
        run_bound(self._session, binding.io, ids.shape)
        binding.io.synchronize_outputs()
        return binding.logits

    def close(self) -> None:
        """Let go of ONNX Runtime's session; no run may follow."""
        self._session = None


def open_cuda_provider(bundle: Bundle, *, exact: bool, threads: int | None) -> DeviceEngine:
    """Open the portable graph in ONNX Runtime's CUDA provider. Raises: BackendError if it does not run here."""
    if bundle.manifest.graph.compute_type == "bfloat16":
        raise BackendError(f"{bundle.path}: --engine {CUDA} takes no bfloat16 bundle; export with --precision fp16")
    options = session_options(exact=exact, threads=threads)
    return DeviceEngine(bundle.file(GRAPH), bundle.manifest, device=CUDA, options=options)
