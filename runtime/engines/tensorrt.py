"""Opens engines that TensorRT or TensorRT-RTX built. So far it says in one line why one cannot run here."""

import ctypes
from typing import NoReturn

from galerne.errors import BackendError
from galerne.runtime.bundle import ENGINES, Bundle
from galerne.runtime.engines.record import EngineRecord

_DRIVERS = ("libcuda.so.1", "nvcuda.dll")


def gpu_count() -> int | None:
    """Return how many GPUs the NVIDIA driver shows; None if there is no driver or it does not start.

    Source: the CUDA driver API, cuInit and cuDeviceGetCount, so that nothing heavy is imported to find out.
    """
    for name in _DRIVERS:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return None


def open_tensorrt(bundle: Bundle, record: EngineRecord) -> NoReturn:
    """Refuse to run a TensorRT engine, saying what is missing.

    Raises: BackendError always: no driver, no GPU, or a GPU, on which this version does not run engines yet.
    """
    engine = bundle.path / ENGINES / record.target / record.file
    count = gpu_count()
    if not count:
        missing = "NVIDIA driver" if count is None else "NVIDIA GPU"
        raise BackendError(
            f"{engine}: this machine has no {missing}; run with `--engine portable` or an engine for `cpu`"
        )
    raise BackendError(
        f"{engine}: this version of Galerne builds {record.backend} engines but does not run them yet; "
        "run with `--engine portable` or an engine for `cpu`"
    )
