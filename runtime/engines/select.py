"""Chooses what runs a bundle here."""

import logging

from galerne.errors import BackendError, GalerneError
from galerne.runtime.bundle import GRAPH, WEIGHTS, Bundle
from galerne.runtime.engines.cpu import open_cpu
from galerne.runtime.engines.engine import Engine
from galerne.runtime.engines.ort import OrtEngine, session_options
from galerne.runtime.engines.ort_cuda import open_cuda_provider, open_ort_cuda
from galerne.runtime.engines.ort_pool import CUDA
from galerne.runtime.engines.record import load_record
from galerne.runtime.engines.tensorrt.open import open_tensorrt
from galerne.runtime.page_cache import read_ahead

PORTABLE = "portable"
CPU = "cpu"

logger = logging.getLogger(__name__)


def open_engine(bundle: Bundle, name: str | None = None, *, exact: bool = False, threads: int | None = None) -> Engine:
    """Open an engine of a bundle.

    Args:
        name: "portable" for the graph itself, "cuda" for the same in ONNX Runtime's CUDA provider, or an engine's name. By
            default the `cpu` engine where there is one that fits this machine, and the portable graph otherwise.
        exact: multiply quantized weights with float32 activations (portable graph only).
        threads: of ONNX Runtime; by default one for each core.
    Raises: InputError if there is no such engine, BackendError if it cannot run here.
    """
    if name is None and not exact and CPU in bundle.engines():
        try:
            return open_engine(bundle, CPU, threads=threads)
        except GalerneError as exc:
            logger.warning("%s; running the portable graph instead", exc)
    if name is None or name == PORTABLE:
        if bundle.manifest.graph.compute_type == "bfloat16":
            raise BackendError(
                f"{bundle.path}: ONNX Runtime's CPU provider does not compute in bfloat16; build the cpu engine, which "
                f"computes in float32: `galerne build {bundle.path} --target cpu`"
            )
        options = session_options(exact=exact, threads=threads)
        read_ahead(bundle.file(WEIGHTS))
        return OrtEngine(bundle.file(GRAPH), bundle.manifest, name=PORTABLE, options=options)
    if name == CUDA:
        return open_cuda_provider(bundle, exact=exact, threads=threads)
    record = load_record(bundle, name)
    if record.backend == "onnxruntime":
        return open_cpu(bundle, record, threads)
    if record.backend == "onnxruntime_cuda":
        return open_ort_cuda(bundle, record, threads)
    if record.backend in ("tensorrt", "tensorrt_rtx"):
        return open_tensorrt(bundle, record)
    raise BackendError(
        f"{bundle.path}: engine {name}: backend {record.backend!r} is unknown to this version of Galerne"
    )
