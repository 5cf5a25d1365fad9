"""ONNX Runtime's CUDA provider: the portable graph in it, and the engine that was lowered for it."""

import contextlib
import sys

import onnxruntime as ort

from galerne.errors import BackendError
from galerne.runtime.bundle import ENGINES, GRAPH, Bundle
from galerne.runtime.engines.ort import session_options
from galerne.runtime.engines.ort_device import DeviceEngine
from galerne.runtime.engines.ort_pool import CUDA
from galerne.runtime.engines.record import EngineRecord
from galerne.runtime.footprint import forms_of, stored_products
from galerne.runtime.manifest import Manifest

# An engine's graph, which reads the bundle's own `weights.bin`.
ENGINE_GRAPH = "engine.onnx"
# The longest block of int4 weights in the CUDA provider's kernel for one token; at 256 ONNX Runtime 1.31 fails in the first run.
LONGEST_BLOCK = 128


def open_cuda_provider(bundle: Bundle, *, exact: bool, threads: int | None) -> DeviceEngine:
    """Open the portable graph in ONNX Runtime's CUDA provider. Raises: BackendError if it does not run here."""
    if bundle.manifest.graph.compute_type == "bfloat16":
        raise BackendError(f"{bundle.path}: --engine {CUDA} takes no bfloat16 bundle; export with --precision fp16")
    block = _longest_block(bundle.manifest)
    if block > LONGEST_BLOCK:
        raise BackendError(
            f"{bundle.path}: --engine {CUDA} takes int4 in blocks of up to {LONGEST_BLOCK}, this bundle's are of {block}; build "
            "an engine, which repeats the scales: `galerne build` with `--stack onnxruntime-cuda`"
        )
    _find_libraries()
    options = session_options(exact=exact, threads=threads)
    return DeviceEngine(bundle.file(GRAPH), bundle.manifest, device=CUDA, options=options)


def open_ort_cuda(bundle: Bundle, record: EngineRecord, threads: int | None, *, device: str = CUDA) -> DeviceEngine:
    """Open an engine that was built for ONNX Runtime's CUDA provider.

    Args:
        device: what stands for the GPU in tests.
    Raises: BackendError if it does not run here.
    """
    if device == CUDA:
        _find_libraries()
    return DeviceEngine(
        bundle.file(f"{ENGINES}/{record.target}/{record.file}"),
        bundle.manifest,
        device=device,
        options=session_options(exact=True, threads=threads),  # the GPU's products take activations as they are
        name=record.target,
        weights=bundle.path,
        recording=True,
    )


def _longest_block(manifest: Manifest) -> int:
    """Return how many weights share a scale at most, 0 where none are in blocks."""
    products = stored_products(manifest.model, forms_of(manifest.recipe))
    return max((form.block_for(rows) for form, rows, _ in products if form.block_size is not None), default=0)


def _find_libraries() -> None:
    """Load CUDA's and cuDNN's libraries from where pip put them."""
    with contextlib.redirect_stdout(sys.stderr):  # where it prints which it does not find
        ort.preload_dlls()
