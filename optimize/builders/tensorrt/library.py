"""Finds the TensorRT that is installed, and says what differs between one version and another, and TensorRT-RTX.

Source: NVIDIA/TensorRT, python/src/infer/pyCore.cpp and include/NvInfer.h at the tags v10.3.0 to v11.1; for TensorRT-RTX its
package 1.7.1.
"""

import ctypes
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from galerne.errors import BackendError
from galerne.runtime.engines.tensorrt.package import NAMES, import_package, numbers

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability


@dataclass(frozen=True)
class Library:
    """A builder's Python package.

    version: in full, such as "10.3.0".
    """

    backend: str
    version: str
    module: ModuleType

    @property
    def title(self) -> str:
        """Its name and version, for people."""
        return f"{NAMES[self.backend]} {self.version}"

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds for a GPU that is not there: TensorRT-RTX does, TensorRT measures on the GPU at hand."""
        return self.backend == "tensorrt_rtx"

    @property
    def network_flags(self) -> int:
        """What `create_network` is to be told: up to TensorRT 10 that types are the graph's own; later ones know no other way."""
        if self.ahead_of_time or not older(self.version, (11, 0)):
            return 0
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    @property
    def streams(self) -> bool:
        """Whether it writes an engine block by block, rather than whole from memory: from TensorRT 10.13 on."""
        return hasattr(self.module, "IStreamWriter")

    def capability(self, compute_capability: str, target: str) -> Any:
        """Return its own name for a compute capability, such as "8.9".

        Raises: BackendError if it does not build ahead of time for that one.
        """
        members = self.module.ComputeCapability.__members__.items()
        known = {name[2:]: value for name, value in members if name[:2] == "SM"}
        found = compute_capability.replace(".", "")
        if found not in known:
            builds = ", ".join(f"{name[:-1]}.{name[-1]}" for name in known)
            raise BackendError(
                f"--target {target}: {self.title} builds for compute capability {builds}, found {compute_capability}; "
                "choose another target, see `galerne targets`"
            )
        return known[found]


def import_library(backend: str) -> Library:
    """Import the builder's package. Raises: BackendError if it is not installed or does not load."""
    module = import_package(backend)
    return Library(backend, str(module.__version__), module)


def is_version(found: str, wanted: str) -> bool:
    """Return whether a full version is the wanted one as far as that is given: 10.3.0.26 is 10.3, and 10.16.2 is not 10.1."""
    return (found + ".").startswith(wanted + ".")


def older(found: str, than: tuple[int, int]) -> bool:
    """Return whether a version, such as "10.3" or "10.3.0.26", is older than another."""
    return numbers(found)[:2] < than


def compute_capability_here() -> str | None:
    """Return the first GPU's compute capability, such as "8.7"; None if there is no driver or no GPU.

    Source: the CUDA driver API: cuInit, cuDeviceGet, cuDeviceGetAttribute.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, numbers = ctypes.c_int(0), [ctypes.c_int(0), ctypes.c_int(0)]
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return f"{numbers[0].value}.{numbers[1].value}"
