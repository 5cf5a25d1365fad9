"""ONNX Runtime with the rings on a device, for its CUDA provider: only ids, positions and logits travel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from galerne.errors import BackendError
from galerne.runtime.adapter import no_adapter
from galerne.runtime.engines.engine import Cache, Float32, Int64
from galerne.runtime.engines.ort import RingLayout, open_session, ring_layout, run_bound
from galerne.runtime.engines.ort_pool import CUDA, Placement, Pool
from galerne.runtime.engines.owned import Owned
from galerne.runtime.manifest import Manifest, write_index_names

# TF32 would round float32 products to 10 bits of mantissa, which no float32 bundle asked for.
_OPTIONS = {CUDA: {"use_tf32": "0"}, "cpu": {}}
_RECORDING = {CUDA: {"enable_cuda_graph": "1"}, "cpu": {}}
# ONNX Runtime's name for which recording a run makes or replays, and the one of a run that does neither.
_RECORDING_OF_RUN, _NO_RECORDING = "gpu_graph_id", -1
_ONE_TOKEN = (1, 1)


class DeviceCache:
    """Rings on a device; see `Cache`. Growing takes them through this process's memory, which happens a few times only.

    rings: the memory. adapter: what is bound to the graph's adapter inputs, on the device.
    """

    def __init__(
        self,
        placement: Placement,
        pool: Pool,
        batch: int,
        layout: Sequence[RingLayout],
        capacities: Sequence[int],
        dtype: np.dtype[Any],
        vocab_size: int,
        adapter: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        self.batch, self._pool, self._layout, self._dtype = batch, pool, layout, dtype
        self.last_logits: Float32 = np.zeros((batch, 1, vocab_size), np.float32)
        with pool.alone:
            self.adapter = {name: placement.put(array) for name, array in adapter.items()}
            self.rings = pool.take(batch, layout, capacities, dtype)
        self.capacities = self.rings.capacities

    def resize(self, capacities: Sequence[int]) -> None:
        """Move the rings into larger ones, C for each kind of layer or more; slot for slot, the new slots are empty."""
        with self._pool.alone:
            old, new = self.rings, self._pool.take(self.batch, self._layout, capacities, self._dtype)
            for target, source in zip(new.values, old.values, strict=True):
                array = source.numpy()
                whole = np.zeros(target.shape(), array.dtype)
                whole[tuple(map(slice, array.shape))] = array
                target.update_inplace(whole)
            # Nothing that Ctrl-C could interrupt stands between these: they always fit each other.
            self.rings, self.capacities = new, new.capacities
            self._pool.give(self.batch, old)

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Return copies of the rings in this process's memory."""
        pairs = zip(self._layout, self.rings.values, strict=True)
        with self._pool.alone:
            return [np.moveaxis(value.numpy().copy(), ring.slot_axis, 2) for ring, value in pairs]

    def fill(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Copy the contents of rings of the same type into these; they may have fewer slots, which are the first here."""
        with self._pool.alone:
            for ring, value, array in zip(self._layout, self.rings.values, arrays, strict=True):
                whole = np.zeros(value.shape(), array.dtype)
                np.moveaxis(whole, ring.slot_axis, 2)[:, :, : array.shape[2]] = array
                value.update_inplace(whole)

    def copy_from(self, other: "DeviceCache") -> None:
        """Copy the rings of a cache of the same engine, with as many rows and slots, within the device."""
        with self._pool.alone:
            for value, source in zip(self.rings.values, other.rings.values, strict=True):
                value.update_inplace(source)

    def close(self) -> None:
        """Let go of the memory, or leave it to the next rows of this size."""
        with self._pool.alone:
            if self._layout:
                self._pool.give(self.batch, self.rings)
            self.adapter, self._layout = {}, []


class DeviceBinding:
    """One shape of run: its inputs and its logits on the device.

    recording: the number that ONNX Runtime records it under and replays it by, or that of none; null where it cannot record.
    """

    def __init__(
        self,
        session: Owned[Any],
        placement: Placement,
        cache: DeviceCache,
        manifest: Manifest,
        layout: Sequence[RingLayout],
        shape: tuple[int, int],
        recording: int | None,
    ) -> None:
        tokens, logits = shape
        self._session, self._shape, self._recording = session, (cache.batch, tokens), recording
        sizes = {"input_ids": (cache.batch, tokens), "position_ids": (cache.batch, tokens)}
        sizes["logit_indices"] = (cache.batch, logits)
        self.starts = write_index_names(len(manifest.graph.capacities))
        self._inputs = {name: placement.new(size, np.int64) for name, size in sizes.items()}
        self._inputs |= {name: placement.new((cache.batch,), np.int64) for name in self.starts}
        self._logits = placement.new((cache.batch, logits, manifest.model.vocab_size), np.float32)
        self._io = session.value.io_binding()
        for name, value in {**self._inputs, **cache.adapter}.items():
            self._io.bind_ortvalue_input(name, value)
        self._io.bind_ortvalue_output("logits", self._logits)
        for ring, value in zip(layout, cache.rings.values, strict=True):
            self._io.bind_ortvalue_input(ring.past, value)
            self._io.bind_ortvalue_output(ring.present, value)
        self._options: Any = None
        if recording is not None:
            self._options = ort.RunOptions()
            self._options.add_run_config_entry(_RECORDING_OF_RUN, str(recording))

    def run(self, arrays: Mapping[str, Int64]) -> Float32:
        """Put the small inputs onto the device, run, and return a copy of the logits [B, K, vocab_size].

        Raises: BackendError if ONNX Runtime fails.
        """
        for name, array in arrays.items():
            self._inputs[name].update_inplace(np.ascontiguousarray(array, np.int64))
            if self._recording is None:
                # Anew each time: where a node reads an input on the CPU, binding is when ONNX Runtime copies it there.
                self._io.bind_ortvalue_input(name, self._inputs[name])
        self._io.synchronize_inputs()
        run_bound(self._session, self._io, self._shape, self._options)
        self._io.synchronize_outputs()
        logits: Float32 = self._logits.numpy()
        return logits


class DeviceEngine:
    """A graph in one of ONNX Runtime's providers, its rings on that provider's device."""

    def __init__(
        self,
        graph: Path,
        manifest: Manifest,
        *,
        device: str,
        options: ort.SessionOptions,
        name: str = CUDA,
        weights: Path | None = None,
        recording: bool = False,
    ) -> None:
        """Open the graph.

        Args:
            weights: the folder of the graph's external data, where that is not its own.
            recording: whether to record decoding, one token a row, as a CUDA graph and to replay it. Where ONNX Runtime
                refuses, since not every node runs on the device, each step is run as it is.
        Raises: BackendError if this ONNX Runtime lacks the provider, or it does not start.
        """
        self.name, self._manifest, self._placement = name, manifest, Placement(device)
        provider = self._placement.provider
        if provider not in ort.get_available_providers():
            raise BackendError(
                f"--engine {name}: ONNX Runtime {ort.__version__} here has no {provider}; `pip uninstall onnxruntime`, then "
                "`pip install 'onnxruntime-gpu[cuda,cudnn]'`, or run with `--engine portable`"
            )

        def opened(more: Mapping[str, str]) -> Owned[Any]:
            providers: dict[str, Mapping[str, str]] = {provider: {**_OPTIONS[device], **more}}
            providers.setdefault(Placement("cpu").provider, {})
            return open_session(graph, options, providers, weights)

        if recording:
            level, options.log_severity_level = options.log_severity_level, 4  # a refusal is nobody's error
            try:
                session = opened(_RECORDING[device])
            except BackendError:
                recording = False
            options.log_severity_level = level
        if not recording:
            session = opened({})
        if session.value.get_providers()[0] != provider:  # it says so in a warning, and would go on without
            raise BackendError(
                f"--engine {name}: {provider} of ONNX Runtime {ort.__version__} does not start: it needs an NVIDIA driver, CUDA "
                "and cuDNN of its versions; see its message above, or run with `--engine portable`"
            )
        self._session: Owned[Any] | None = session
        self._layout, self.ring_dtype, self.dtype = ring_layout(session, manifest)
        self._no_adapter = no_adapter(manifest.graph.adapter_slots, self.dtype)
        self._recording = recording
        self._pool = Pool(self._placement, manifest.graph.capacities, recording=recording)

    @property
    def records(self) -> bool:
        """Whether decoding is recorded and replayed."""
        return self._recording

    def new_cache(
        self, batch: int, capacities: Sequence[int], adapter: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> DeviceCache:
        """As `Engine.new_cache` says; there may be more slots than asked for."""
        bound = {**self._no_adapter, **(adapter or {})}
        vocab_size = self._manifest.model.vocab_size
        return DeviceCache(
            self._placement, self._pool, batch, self._layout, capacities, self.ring_dtype, vocab_size, bound
        )

    def tokens_of_run(self, wanted: int, most: int) -> int:
        """As `Engine.tokens_of_run` says: a graph takes any number."""
        return wanted

    def run(self, cache: Cache, ids: Int64, positions: Int64, write_indices: Int64, logit_indices: Int64) -> Float32:
        """As `Engine.run` says."""
        assert isinstance(cache, DeviceCache)
        shape = (ids.shape[1], logit_indices.shape[1])
        with self._pool.alone:
            binding = self._binding(cache, shape)
            starts = dict(zip(binding.starts, write_indices, strict=True))
            logits = binding.run(
                {"input_ids": ids, "position_ids": positions, "logit_indices": logit_indices, **starts}
            )
        if shape[1] > 1:
            return logits
        cache.last_logits[...] = logits
        return cache.last_logits

    def close(self) -> None:
        """Let go of ONNX Runtime's session; no run may follow."""
        self._pool.clear()
        self._session = None

    def _binding(self, cache: DeviceCache, shape: tuple[int, int]) -> DeviceBinding:
        assert self._session is not None
        bindings = cache.rings.bindings
        if shape not in bindings:
            for other in [key for key in bindings if key != _ONE_TOKEN]:
                del bindings[other]  # keep that of decoding and one more: prompts come in many lengths
            recording = None
            if self._recording:
                recording = self._pool.new_recording() if shape == _ONE_TOKEN else _NO_RECORDING
            bindings[shape] = DeviceBinding(
                self._session, self._placement, cache, self._manifest, self._layout, shape, recording
            )
        binding: DeviceBinding = bindings[shape]
        return binding
