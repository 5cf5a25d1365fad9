"""What a build is told, all of it: made where the graph can be read, carried out there or on a box without onnx."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from galerne import schema
from galerne.errors import InputError
from galerne.files import read_file
from galerne.runtime.engines.record import HardwareCompatibility, Parity, Profile, Weights, check_profiles

SCHEMA_VERSION = 1
# The two files of a plan, beside the bundle's weights.bin.
NETWORK, PLAN = "network.onnx", "build.json"

_REMEDY = "make it again with this version of Galerne"


@dataclass(frozen=True)
class BuildPlan:
    """The whole of `build.json`.

    target, title, stack: the device's name, what its vendor calls it, and which of its software stacks is meant.
    backend: the Python package that builds: TensorRT or TensorRT-RTX.
    version: the version that the backend must have, as far as it counts, such as "10.3"; null where any will do.
    compute_capability: such as "8.7".
    cuda: the CUDA version that comes with the stack; null where it fixes none.
    network_sha256: hex, of `network.onnx`.
    inputs: hex SHA-256 of each file of the bundle that it was made from, by its path in the bundle.
    parity: the bundle's "portable" verdict.
    profiles: in the order that the engine has them.
    lowered: what was changed in the graph, for the engine's record.
    weights, hardware_compatibility, version_compatible: as in `EngineRecord`.
    """

    schema_version: int
    target: str
    title: str
    stack: str
    backend: Literal["tensorrt", "tensorrt_rtx"]
    version: str | None
    compute_capability: str
    cuda: str | None
    network_sha256: str
    inputs: dict[str, str]
    parity: Parity
    profiles: tuple[Profile, ...]
    lowered: dict[str, Any]
    weights: Weights = "inside"
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False

    def to_json(self) -> bytes:
        """Return the plan as UTF-8 JSON; the same plan gives the same bytes."""
        return schema.to_json(self)


def load_plan(path: Path) -> BuildPlan:
    """Read a plan.

    Raises: InputError if it is no JSON, of another schema version, or a field is missing, unknown or of the wrong form.
    """
    plan = schema.read_json(BuildPlan, read_file(path), str(path), SCHEMA_VERSION, _REMEDY)
    check_profiles(plan.profiles, str(path))
    if not plan.profiles:
        raise InputError(f"{path}: profiles: expected at least one, found none; {_REMEDY}")
    return plan
