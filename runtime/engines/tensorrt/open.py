"""Opens an engine that TensorRT or TensorRT-RTX built, once everything that can be checked beforehand has been."""

from collections.abc import Callable
from contextlib import ExitStack

from galerne.errors import BackendError
from galerne.runtime.bundle import ENGINES, Bundle
from galerne.runtime.engines.record import EngineRecord
from galerne.runtime.engines.tensorrt.checks import (
    check_bytes,
    check_capability,
    check_driver,
    check_memory,
    check_platform,
    check_rings,
    check_version,
)
from galerne.runtime.engines.tensorrt.cuda import open_cuda
from galerne.runtime.engines.tensorrt.driver import Driver
from galerne.runtime.engines.tensorrt.engine import TensorRTEngine
from galerne.runtime.engines.tensorrt.library import Library, open_library
from galerne.runtime.engines.tensorrt.plan import load_plan


def open_tensorrt(
    bundle: Bundle,
    record: EngineRecord,
    *,
    library: Callable[[str], Library] = open_library,
    driver: Callable[[], Driver] = open_cuda,
) -> TensorRTEngine:
    """Open one of the bundle's engines.

    The version, the rings and the file's hash are checked first, which needs no GPU; then the GPU's capability and memory;
    and only then is anything loaded.

    Args:
        library: what imports TensorRT, by the record's backend.
        driver: what opens the GPU.
    Raises: InputError if the engine was changed or is not of this bundle; BackendError if TensorRT, the driver or the GPU is
        missing or another than the engine's.
    """
    path = bundle.file(f"{ENGINES}/{record.target}/{record.file}")
    try:
        opened = library(record.backend)
        check_version(bundle, record, opened.version)
        check_platform(bundle, record)
        check_rings(bundle, record)
        check_bytes(bundle, record)
        gpu = driver()
    except BackendError as exc:
        raise BackendError(f"{path}: {exc}" if str(path) not in str(exc) else str(exc)) from exc
    with ExitStack() as undo:
        undo.callback(gpu.close)
        check_driver(bundle, record, gpu.device)
        check_capability(bundle, record, gpu.device)
        graph = bundle.manifest.graph
        with gpu.current():
            check_memory(bundle, record, gpu.free_bytes())
            plan = load_plan(bundle, record, path, opened, gpu)
            undo.callback(plan.close)
            engine = TensorRTEngine(plan, gpu, record.target, graph.capacities, graph.chunk)
        undo.pop_all()
    return engine
