"""What must hold before an engine is loaded. Each refusal gives both values and what to rebuild; none needs a GPU."""

import platform
import sys

from galerne.errors import BackendError, InputError
from galerne.files import sha256_file
from galerne.runtime.bundle import ENGINES, MANIFEST, WEIGHTS, Bundle
from galerne.runtime.engines.record import EngineRecord
from galerne.runtime.engines.tensorrt.driver import Device
from galerne.runtime.engines.tensorrt.package import NAMES, numbers

# The lowered graph, which lies beside a stripped engine.
NETWORK = "network.onnx"
# The first capability that TensorRT's "ampere plus" engines run on.
_AMPERE = (8, 0)


def check_version(bundle: Bundle, record: EngineRecord, installed: str) -> None:
    """Raises: BackendError if the engine was built by a version that the installed one does not load engines of."""
    built = record.backend_version
    if built == installed:
        return
    accepted = f"{built}"
    if record.version_compatible:
        major = numbers(built)[:1]
        if numbers(installed)[:1] == major and numbers(installed) >= numbers(built):
            return
        accepted = f"{built} to the last of {major[0]}.x"
    library = NAMES[record.backend]
    raise BackendError(
        f"{_where(bundle, record)}: built by {library} {built}, here is {installed}; it loads in {accepted} only: install "
        f"that, or {_rebuild(bundle, record)}"
    )


def check_platform(bundle: Bundle, record: EngineRecord) -> None:
    """Raises: BackendError if the engine was built for another operating system or architecture than this machine's."""
    here = f"{sys.platform}-{platform.machine()}"
    if record.platform not in (None, here):
        raise BackendError(
            f"{_where(bundle, record)}: built for {record.platform}, this machine is {here}; {_rebuild(bundle, record)} on it"
        )


def check_driver(bundle: Bundle, record: EngineRecord, device: Device) -> None:
    """Raises: BackendError if the driver is of an older major version of CUDA than the engine was built with."""
    if record.cuda is not None and numbers(device.driver_version)[:1] < numbers(record.cuda)[:1]:
        raise BackendError(
            f"{_where(bundle, record)}: built with CUDA {record.cuda}, the driver here runs up to {device.driver_version}; "
            "update the driver"
        )


def check_capability(bundle: Bundle, record: EngineRecord, device: Device) -> None:
    """Raises: BackendError if the engine was built for GPUs of another compute capability."""
    built, here = record.compute_capability, device.compute_capability
    if built is None:
        raise InputError(
            f"{_where(bundle, record)}: compute_capability: expected one, found null; {_rebuild(bundle, record)}"
        )
    if built == here:
        return
    accepted = built
    if record.hardware_compatibility == "ampere_plus":
        if numbers(here) >= _AMPERE:
            return
        accepted = "8.0 and later"
    raise BackendError(
        f"{_where(bundle, record)}: built for compute capability {accepted}, the {device.name} has {here}; on this machine "
        f"`galerne build {bundle.path} --target` the one of `galerne targets` that it is"
    )


def check_rings(bundle: Bundle, record: EngineRecord) -> None:
    """Raises: InputError if the engine's rings have other sizes than the bundle's. Records without sizes pass."""
    built, expected = record.options.get("capacities"), bundle.manifest.graph.capacities
    if built is not None and tuple(built) != expected:
        raise InputError(
            f"{_where(bundle, record)}: built with rings of {_list(built)} slots, the bundle's have {_list(expected)}; "
            f"{_rebuild(bundle, record)}"
        )


def check_bytes(bundle: Bundle, record: EngineRecord) -> None:
    """Read what is about to be loaded and compare it with the manifest: the engine, and what a stripped one is refitted from.

    Raises: InputError if a byte was changed.
    """
    folder = f"{ENGINES}/{record.target}"
    names = [f"{folder}/{record.file}"]
    if record.weights == "stripped":
        names += [f"{folder}/{NETWORK}", WEIGHTS]
    for name in names:
        if name not in bundle.manifest.files:
            raise InputError(f"{bundle.path / MANIFEST}: files: {name!r} is not listed; {_rebuild(bundle, record)}")
        found, expected = sha256_file(bundle.file(name)), bundle.manifest.files[name].sha256
        if found != expected:
            raise InputError(
                f"{bundle.path / name}: its SHA-256 is {found[:12]}…, the manifest says {expected[:12]}…: the file was changed; "
                f"copy it again, or {_rebuild(bundle, record)}"
            )


def check_memory(bundle: Bundle, record: EngineRecord, free_bytes: int) -> None:
    """Raises: BackendError if the GPU's free memory does not even hold the engine's weights."""
    size = bundle.manifest.files[f"{ENGINES}/{record.target}/{record.file}"].size
    if record.weights == "inside" and size > free_bytes:
        raise BackendError(
            f"{_where(bundle, record)}: takes {size / 1e9:.1f} GB of GPU memory and more to run, {free_bytes / 1e9:.1f} GB are "
            "free; close other programs, or take a smaller recipe"
        )


def _where(bundle: Bundle, record: EngineRecord) -> str:
    return str(bundle.path / ENGINES / record.target / record.file)


def _rebuild(bundle: Bundle, record: EngineRecord) -> str:
    return f"rebuild it with `galerne build {bundle.path} --target {record.target} --force`"


def _list(sizes: object) -> str:
    return " and ".join(map(str, sizes)) if isinstance(sizes, list | tuple) else str(sizes)
