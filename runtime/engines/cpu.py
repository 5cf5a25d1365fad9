"""What the `cpu` engine depends on: ONNX Runtime's version and the processor's features."""

import platform
from pathlib import Path

import onnxruntime as ort

from galerne.errors import BackendError
from galerne.runtime.bundle import ENGINES, Bundle
from galerne.runtime.engines.ort import OrtEngine, session_options
from galerne.runtime.engines.record import EngineRecord

# The flags that ONNX Runtime's kernels, and so the layout of pre-packed weights, are chosen by.
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def cpu_features() -> tuple[str, ...]:
    """Return the architecture and the flags that matter, sorted. Source: /proc/cpuinfo; only the architecture elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = {
        flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split(":")[1].split()
    }
    return tuple(sorted({platform.machine(), *flags.intersection(_FLAGS)}))


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
    return OrtEngine(graph, bundle.manifest, name=record.target, options=options)
