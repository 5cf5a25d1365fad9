"""The `cpu` engine, which depends on ONNX Runtime's version and the processor's features."""

import onnxruntime as ort

from galerne.errors import BackendError
from galerne.runtime.bundle import ENGINES, Bundle
from galerne.runtime.engines.cpu_features import cpu_features
from galerne.runtime.engines.ort import OrtEngine, session_options
from galerne.runtime.engines.record import EngineRecord
from galerne.runtime.page_cache import read_ahead

ENGINE_GRAPH, ENGINE_WEIGHTS = "engine.onnx", "engine.bin"


def open_cpu(bundle: Bundle, record: EngineRecord, threads: int | None) -> OrtEngine:
    """Open the bundle's `cpu` engine: its weights lie packed on disk and are mapped.

    Raises: BackendError if it was built by another ONNX Runtime or for another processor.
    """
    for what, built, here in (
        ("ONNX Runtime", record.backend_version, ort.__version__),
        ("CPU features", " ".join(record.cpu_features or ()), " ".join(cpu_features())),
    ):
        if built != here:
            raise BackendError(
                f"{bundle.path / ENGINES / record.target}: built for {what} {built}, here is {here}; rebuild it with "
                f"`galerne build {bundle.path} --target {record.target} --force`"
            )
    options = session_options(exact=False, threads=threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimized already
    graph = bundle.file(f"{ENGINES}/{record.target}/{record.file}")
    read_ahead(graph.with_name(ENGINE_WEIGHTS))
    return OrtEngine(graph, bundle.manifest, name=record.target, options=options)
